"""Averages of the weights along training: their decay, update, swap, gathering, export and combination.

The optimizer keeps them as further float32 states, so whatever shards, saves and restores its states does so
for them. A *holder* is a tensor that this rank updates: a whole parameter, a shard of one, or a flat
partition of many. Its *pieces* say which elements of which parameters it stores. Optimizer states, including
the averages, have the holder's shape, so that the same code serves every strategy.

A power-function average of width s (arXiv 2312.02696, section 3 and appendix C) weights the parameters after
update i by a power of i such that the standard deviation of this profile is s times the length of training. A
linear combination of snapshots of two such averages gives the average of any other width.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_transdiff.config import OptimizerConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl

Decay = Callable[[int], float]  # update number 1, 2, ... -> decay of an average
EMA = "ema"  # optimizer state of the average used as the trained model; a prefix of the others' names
POWER = f"{EMA}_power_"


def constant_state(decay: float) -> str:
    """The optimizer state of a further average with constant ``decay``."""
    return f"{EMA}_{decay!r}"


def power_state(width: float) -> str:
    """The optimizer state of the power-function average of ``width``."""
    return f"{POWER}{width!r}"


def width_of(state: str) -> float | None:
    """The width in the name of a power-function average; ``None`` for other names."""
    match = re.fullmatch(rf"{POWER}(0?\.\d+)", state)
    return float(match[1]) if match else None


# --- decay


def average_decays(config: OptimizerConfig) -> dict[str, Decay]:
    """The name and decay of each average; the first one is validated, sampled and exported."""
    constant = {EMA: config.ema_decay} | {constant_state(decay): decay for decay in config.more_ema_decays}
    decays: dict[str, Decay] = {
        name: partial(constant_decay, decay=decay) for name, decay in constant.items()
    }
    return decays | {power_state(width): partial(power_decay, width=width) for width in config.power_widths}


def constant_decay(update: int, decay: float) -> float:
    return decay


def power_of(width: float) -> float:
    """The exponent gamma of a relative ``width``, 0 < width < 12^-0.5: the positive root in appendix C.2."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def power_decay(update: int, width: float) -> float:
    """The decay at ``update`` = 1, 2, ...: (1 - 1 / update)^(gamma + 1) (eq. 4), 0 at the first."""
    return (1 - 1 / update) ** (power_of(width) + 1)


# --- update


class Averaging(torch.optim.Optimizer):
    """Mixin, first of an optimizer's bases, that keeps averages from the first parameters on.

    After every step ``average <- decay average + (1 - decay) parameter`` for each of ``decays`` (state name
    -> decay). A strategy that shards the optimizer's tensors also shards the averages. With ``skip_step`` a
    ``step`` changes nothing, whatever the gradients. ``num_updates`` of the first group counts the other
    steps.
    """

    def __init__(self, params: Iterable[Any], *, decays: Mapping[str, Decay], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._step_supports_amp_scaling = False  # float16 gradients are unscaled before clipping
        self.decays = dict(decays)
        self.skip_step = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states; averages stay float32, where torch would use the parameters' precision."""
        super().load_state_dict(state_dict)
        saved = [
            state_dict["state"].get(number, {})
            for group in state_dict["param_groups"]
            for number in group["params"]
        ]
        for p, states in zip(self._trained(), saved, strict=True):
            for name in self.decays.keys() & states.keys():
                self.state[p][name] = states[name].to(p.device, torch.float32, copy=True)

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # The averages start from the weights before the first update.
        loss = loss_of(closure)
        if self.skip_step:
            return loss
        averaged = [p for p in self._trained() if p.grad is not None]
        first = {p: p.detach().float().clone() for p in averaged if EMA not in self.state[p]}
        super().step()
        update = self.count_update()
        for p, value in first.items():
            for name in self.decays:
                self.state[p][name] = value.clone()
        if averaged:
            weights = [p.detach().float() for p in averaged]
            for name, decay in self.decays.items():
                torch._foreach_lerp_([self.state[p][name] for p in averaged], weights, 1 - decay(update))
        return loss

    def count_update(self) -> int:
        """The number of this update, from 1; the first group keeps it."""
        self.param_groups[0]["num_updates"] = self.param_groups[0].get("num_updates", 0) + 1
        return self.param_groups[0]["num_updates"]  # type: ignore[no-any-return]


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """Run the closure of an optimizer step (forward and backward) and return its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# --- holders


@dataclass(frozen=True)
class Piece:
    """``length`` elements from ``start`` of a flattened parameter, at ``offset`` of the flattened holder."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Holder:
    """A tensor that this rank updates, and its pieces. ``owned`` is false if another rank saves them."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    owned: bool = True


def flat(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor as a flat view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def parameter_shapes(stage: pl.LightningModule) -> dict[str, list[int]]:
    """Parameter name -> unsharded shape (ZeRO-3 stores it separately)."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in stage.named_parameters()}


class Averages(ABC):
    """The averages of a stage in training, derived from the ``holders`` of its strategy."""

    world_size: int

    @property
    @abstractmethod
    def stage(self) -> pl.LightningModule: ...

    @property
    @abstractmethod
    def optimizer(self) -> Optimizer:
        """The optimizer without wrappers."""

    @abstractmethod
    def holders(self) -> Iterator[Holder]:
        """The tensors that this rank updates, and its tensors of frozen parameters."""

    @abstractmethod
    def refresh(self) -> None:
        """Update the model's own tensors after holders have changed."""

    @property
    def set_aside(self) -> dict[Tensor, Tensor]:
        """Weights stored outside the model while it contains averages of higher precision."""
        return vars(self.stage).setdefault("weights_set_aside", {})

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchange weights and averages in place; a second call reverses it.

        Before the first step this has no effect.

        Weights of lower precision than their average are set aside, because the average would be rounded in
        their place.
        """
        for holder in self.holders():
            average = self.optimizer.state.get(holder.tensor, {}).get(EMA)
            if holder.tensor in self.set_aside:
                flat(holder.tensor).copy_(self.set_aside.pop(holder.tensor))
            elif average is not None:
                weights = flat(holder.tensor).clone()
                flat(holder.tensor).copy_(flat(average))
                if average.dtype == weights.dtype:
                    flat(average).copy_(weights)
                else:
                    self.set_aside[holder.tensor] = weights
        self.refresh()

    @torch.no_grad()
    def averaged_state(self) -> dict[str, Tensor]:
        """The stage's state dict with averages as weights, unsharded float32. All ranks must call this."""
        state = {name: value.detach().clone() for name, value in self.buffers().items()}
        shapes = parameter_shapes(self.stage)
        for name, shape in shapes.items():
            state[name] = torch.zeros(shape, device=self.stage.device)
        for holder in self.holders():
            value = self.optimizer.state.get(holder.tensor, {}).get(EMA, holder.tensor)
            for piece in holder.pieces if holder.owned else ():
                part = flat(value)[piece.offset : piece.offset + piece.length]
                state[piece.name].view(-1)[piece.start : piece.start + piece.length] = part
        if self.world_size > 1:
            for name in shapes:
                torch.distributed.all_reduce(state[name])
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The stage's persistent buffers."""
        names = {name for name, _ in self.stage.named_parameters()}
        return {
            name: value
            for name, value in self.stage.state_dict().items()
            if name not in names and torch.is_tensor(value)
        }


# --- combination


def overlap(update_a: float, width_a: float, update_b: float, width_b: float) -> float:
    """The inner product of the profiles of two averages at given updates (appendix C.3)."""
    a, b = power_of(width_a), power_of(width_b)
    exponent = b if update_a < update_b else -a
    return (a + 1) * (b + 1) * (update_a / update_b) ** exponent / ((a + b + 1) * max(update_a, update_b))


def combination(
    snapshots: Sequence[tuple[int, float]], update: int, width: float
) -> tuple[np.ndarray, float]:
    """Coefficients of ``snapshots`` (update, width) that best approximate another average.

    Also returns the distance of the profiles relative to the norm of the target: 0 for one of the snapshots.
    """
    products = np.array([[overlap(*one, *other) for other in snapshots] for one in snapshots])
    target = np.array([overlap(*one, update, width) for one in snapshots])
    factors = np.linalg.lstsq(products, target, rcond=1e-12)[0]
    norm = overlap(update, width, update, width)
    left = norm - 2 * factors @ target + factors @ products @ factors
    return factors, math.sqrt(max(0.0, left) / norm)
