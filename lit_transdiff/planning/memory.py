"""The activation memory of a stage's forward and backward pass, estimated without running it.

The stage runs once on fake tensors (shapes without values), so that the estimate for any size takes seconds
on any machine. It counts the tensors saved by autograd in the precision of the run, and by the Triton kernels
if the run has them and Triton is installed here. Other attention is counted as in fused kernels, without the
matrix of attention weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_transdiff.config import ModelSettings, RunConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.kernels.counting import counted_kernels
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.flops import row_cost
from lit_transdiff.models.kernel_blocks import HAS_TRITON
from lit_transdiff.models.paradigm import Paradigm, network_class, stacks_of
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.blocks import gathers, wants_kernels
from lit_transdiff.stages.optim import build_optimizer


@dataclass(frozen=True)
class PassCost:
    """The memory and FLOPs of a forward and backward pass of a micro-batch.

    Kept until the backward pass are ``fixed_bytes`` (copies of the weights in bfloat16) and ``row_bytes`` per
    row (only the inputs of recomputed blocks). The peak adds ``work_bytes`` per row. Recomputation adds
    ``recomputed_flops`` per row to ``row_flops``.
    """

    fixed_bytes: float
    row_bytes: float
    work_bytes: float
    row_flops: float
    recomputed_flops: float
    plain: PassCost | None = None  # the cost without Triton kernels, if this one is with them

    def under(self, strategy: str) -> PassCost:
        """The cost under a strategy, which may have no kernels."""
        return self.plain if self.plain is not None and gathers(strategy) else self

    def kept(self, rows: int) -> float:
        """The peak in bytes."""
        return self.fixed_bytes + rows * (self.row_bytes + self.work_bytes)


@dataclass(frozen=True)
class ModelCost:
    """The parameter counts of a stage's model."""

    parameters: int
    trained: int
    moments: int  # size of the optimizer's state without averages
    parts: dict[str, int]  # per network
    # The largest block, or all parameters outside of blocks: the most that ZeRO-3 and FSDP gather at once.
    largest_unit: int


def fake_stage(run: RunConfig) -> TransDiffStage:
    """The run's stage without values; call inside a ``FakeTensorMode``."""
    model = without_attention_dropout(run.model)
    training = replace(
        run.training,
        kernels=counts_kernels(run),
        compile=False,
        activation_checkpointing="none",
        activation_checkpointing_every=1,
        precision="fp32",
    )
    return STAGES[run.stage](
        replace(run, model=model, training=training), IdentityAutoencoder(model.latent_channels)
    )


def counts_kernels(run: RunConfig) -> bool:
    """Whether the memory of a run is that of its Triton kernels, which work in half precision alone."""
    return HAS_TRITON and wants_kernels(run) and run.training.precision != "fp32"


def without_kernels(run: RunConfig) -> RunConfig:
    return replace(run, training=replace(run.training, kernels=False))


def without_attention_dropout(model: ModelSettings) -> ModelSettings:
    """``model`` without dropout of attention weights, which happens inside the fused kernel."""
    has = any(field.name == "attention_dropout" for field in fields(model))  # type: ignore[arg-type]
    return replace(model, attention_dropout=0.0) if has else model  # type: ignore[type-var]


def model_cost(run: RunConfig) -> ModelCost:
    """Count the parameters."""
    with torch.device("meta"):
        model = fake_stage(run).model
    blocks = (block for stack in model.block_lists().values() for block in stack)
    units = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in model.parameters())
    return ModelCost(
        parameters=total,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        moments=count_moments(run),
        parts={
            name: size
            for name, part in model.named_children()
            if (size := sum(p.numel() for p in part.parameters()))
        },
        largest_unit=max(*units, total - sum(units)),
    )


def count_moments(run: RunConfig) -> int:
    """Count the optimizer's state on fake tensors: for AdamW two numbers per parameter, for Muon one."""
    with FakeTensorMode():
        optimizer = build_optimizer(fake_stage(run).model, run.optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        kept = [item for states in optimizer.state.values() for item in states.items()]
    return sum(value.numel() for name, value in kept if name not in optimizer.decays and name != "step")


@dataclass(frozen=True)
class Counts:
    """``count_passes`` with one block per stack, and what one more block in each stack adds."""

    base: Tensor
    more: dict[str, Tensor]
    plain: Counts | None = None  # without Triton kernels, if these are with them


def counts_of(run: RunConfig, bf16: bool) -> Counts:
    """Measure passes of one and two rows with one and two blocks per stack; all costs are linear in both."""
    ones = dict.fromkeys(stacks_of(run.model), 1)
    base = count_passes(run, ones, bf16)
    plain = counts_of(without_kernels(run), bf16) if counts_kernels(run) else None
    return Counts(base, {name: count_passes(run, ones | {name: 2}, bf16) - base for name in ones}, plain)


def pass_cost(run: RunConfig, bf16: bool, counts: Counts | None = None) -> PassCost:
    """The cost of a pass of the run, from its ``counts``, which do not depend on what is recomputed."""
    stacks, training = stacks_of(run.model), run.training
    counts = counts or counts_of(run, bf16)
    base, more = counts.base, counts.more
    cost = row_cost(run.model, run.flow.num_noise_draws, STAGES[run.stage].head_alone)
    kept, again = base[:, 0] + sum((stacks[name] - 1) * more[name][:, 0] for name in stacks), 0.0
    blocks: list[tuple[float, float]] = []  # bytes per row kept by a block and made in its backward pass
    for name, count in more.items():
        _, whole, inputs = (count[1] - count[0]).tolist()
        recomputed = stacks[name] if name in training.recomputed(stacks) else 0
        chosen = range(0, recomputed, training.activation_checkpointing_every)
        blocks += [(inputs, whole) if i in chosen else (whole, whole / 8) for i in range(stacks[name])]
        kept = kept - len(chosen) * (count[:, 1] - count[:, 2])
        again += cost.stacks[name] * len(chosen) / stacks[name]
    row = float(kept[1] - kept[0])
    plain = None if counts.plain is None else pass_cost(run, bf16, counts.plain)
    return PassCost(float(kept[0]) - row, row, worst_moment(blocks), cost.flops, again, plain)


def worst_moment(blocks: Sequence[tuple[float, float]]) -> float:
    """The peak of the backward pass beyond the total kept by ``blocks``: (bytes kept, bytes made) of each.

    When the backward pass reaches a block, the memory kept by later blocks is free again. The block then
    makes its activations anew, or their gradients (an eighth of the activations, which is more than was
    measured).
    """
    behind, worst = 0.0, 0.0
    for kept, made in reversed(blocks):
        worst = max(worst, made - behind)
        behind += kept
    return worst


def count_passes(run: RunConfig, blocks: dict[str, int], bf16: bool) -> Tensor:
    """``count_pass`` of one and two rows, with the given number of blocks in each stack: [2, 3]."""
    stacks = network_class(run.model).stacks
    model = replace(run.model, **{stacks[name].depth: number for name, number in blocks.items()})  # type: ignore[type-var]
    return torch.stack([count_pass(replace(run, model=model), rows, bf16) for rows in (1, 2)])


class Standard:
    """A ``Normal`` for fake tensors with a given number of rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape)

    def shared(self) -> float:
        """The mean."""
        return 0.0


def count_pass(run: RunConfig, rows: int, bf16: bool) -> Tensor:
    """Bytes kept, the part of them in blocks, and bytes of the blocks' inputs: [3] float64."""
    with FakeTensorMode():
        stage = fake_stage(run)
        stage.train()
        config = run.model
        values = torch.zeros(
            rows, config.num_references, config.latent_channels, config.latent_size, config.latent_size
        )
        numbers = torch.zeros(rows, dtype=torch.int64)
        samples = torch.zeros(rows, config.num_references, dtype=torch.int64)
        batch = Batch(values, numbers, samples, numbers, stage.model.blank(rows))
        kernels = counted_kernels() if counts_kernels(run) else nullcontext()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with kept_tensors(stage.model) as kept, autocast, kernels:
            stage.objective(batch, Standard(rows))
    in_blocks = sum(size for name, size in kept.bytes.items() if name)
    return torch.tensor([sum(kept.bytes.values()), in_blocks, sum(kept.inputs.values())], dtype=torch.float64)


class Kept:
    """The bytes saved by autograd per block ("" outside of blocks), and the size of each block's input."""

    def __init__(self, parameters: set[int]) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.inputs: dict[str, int] = defaultdict(int)  # in all calls of a block during a pass
        self.block = ""
        self.seen: dict[int, Any] = {}  # keeps storages alive, so that no id is reused
        self.parameters = parameters

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen and storage._cdata not in self.parameters:
            self.seen[storage._cdata] = storage
            self.bytes[self.block] += storage.nbytes()
        return tensor


@contextmanager
def kept_tensors(model: Paradigm) -> Iterator[Kept]:
    """Count the tensors saved for the backward pass within the block."""
    kept = Kept({p.untyped_storage()._cdata for p in model.parameters()})
    handles = []
    for stack, blocks in model.block_lists().items():
        for name, block in ((f"{stack}.{i}", block) for i, block in enumerate(blocks)):

            def enter(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                kept.block = name
                kept.inputs[name] += inputs[0].numel() * inputs[0].element_size()

            def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                kept.block = ""

            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        yield kept
    for handle in handles:
        handle.remove()
