"""Floating-point operations of a model's matrix products in training, counted on tensors without values.

A multiply-add counts as two, and the backward pass as twice the forward one, as is usual for a model-FLOPs
utilisation.

Shapes: R references per row, M noise draws, K parts, N tokens of all parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_transdiff.models.paradigm import Paradigm, build_model, network_class, stacks_of

if TYPE_CHECKING:
    from lit_transdiff.config import ModelSettings, SamplingConfig


@dataclass(frozen=True)
class RowCost:
    """The cost of a row in training: FLOPs of both passes, and tokens through the blocks."""

    flops: float
    tokens: int
    stacks: Mapping[str, float]  # FLOPs of a forward pass through the blocks of each stack


class Zeros:
    """A ``Normal`` of a few rows, all zeros, on the current device."""

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows

    def __call__(self, *shape: int) -> Tensor:
        return torch.zeros(self.rows, *shape)

    def shared(self) -> float:
        """The mean."""
        return 0.0


class Span:
    """FLOPs within the calls of some modules."""

    def __init__(self, counter: FlopCounterMode, modules: Iterable[nn.Module]) -> None:
        self.counter, self.flops, self.start = counter, 0.0, 0.0
        for module in modules:
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave)

    def enter(self, module: nn.Module, inputs: object) -> None:
        self.start = self.counter.get_total_flops()

    def leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.flops += self.counter.get_total_flops() - self.start


COUNTED: dict[tuple[str, int, bool], RowCost] = {}


def row_cost(config: ModelSettings, draws: int, head_alone: bool = False) -> RowCost:
    """Count a row with ``draws`` noise draws; with ``head_alone`` only the head has a backward pass.

    Models with one and with two blocks per stack are run; costs are linear in these numbers.
    """
    key = (repr(config), draws, head_alone)
    if key not in COUNTED:
        stacks = stacks_of(config)
        ones = dict.fromkeys(stacks, 1)
        base, flops, each = count_row(config, ones, draws, head_alone), 0.0, {}
        for name, number in stacks.items():
            flops += (number - 1) * (
                count_row(config, ones | {name: 2}, draws, head_alone).flops - base.flops
            )
            each[name] = number * base.stacks[name]
        COUNTED[key] = RowCost(base.flops + flops, base.tokens, each)
    return COUNTED[key]


def flops_of_row(model: Paradigm, sampling: SamplingConfig) -> float:
    """About the floating-point operations of the solver's network for a row of images."""
    inside, cost = {*model.evaluated.modules()}, row_cost(model.config, draws=1).stacks
    once = sum(cost[name] for name, blocks in model.block_lists().items() if blocks[0] in inside)
    return once * sampling.num_steps * (2 if sampling.guidance_scale > 1 else 1)


def count_row(config: ModelSettings, blocks: Mapping[str, int], draws: int, head_alone: bool) -> RowCost:
    """The cost for given numbers of blocks per stack."""
    tokens, kind = 0, network_class(config)

    def count_tokens(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal tokens
        tokens += inputs[0].numel() // inputs[0].shape[-1]

    with (
        torch.device("meta"),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        depths = {kind.stacks[name].depth: number for name, number in blocks.items()}
        model = build_model(replace(config, **depths)).eval()  # type: ignore[type-var]
        stacks = {name: Span(counter, stack) for name, stack in model.block_lists().items()}
        for stack in model.block_lists().values():
            stack[0].register_forward_pre_hook(count_tokens)
        frozen = Span(counter, outside_head(model) if head_alone else ())
        run_once(model, draws)
    passes = 3.0 * counter.get_total_flops() - 2 * frozen.flops
    return RowCost(passes, tokens, {name: span.flops for name, span in stacks.items()})


def run_once(model: Paradigm, draws: int) -> None:
    """The forward pass of a training step, with one row of zeros."""
    config, normal = model.config, Zeros()
    x = torch.zeros(1, config.num_references, config.latent_channels, config.latent_size, config.latent_size)
    memory = model.condition(model.blank(1), torch.zeros(1, dtype=torch.bool), x, normal)
    tokens = torch.zeros(draws, sum(model.part_sizes), *model.token)
    model.predict(tokens, torch.zeros(draws, len(model.part_sizes)), memory)


def outside_head(model: Paradigm) -> Iterator[nn.Module]:
    """The largest modules outside the head."""

    def below(module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        for name, child in module.named_children():
            path = f"{prefix}{name}."
            if any(head.startswith(path) and head != path for head in model.head_prefixes):
                yield from below(child, path)
            elif not path.startswith(model.head_prefixes):
                yield child

    yield from below(model, "")
