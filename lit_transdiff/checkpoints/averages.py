"""Averages of the weights along training, from the decay to the export: named, kept, swapped in, gathered and combined.

The optimizer keeps them as further states, in float32: whatever shards, saves and restores its states does the same to them.
A *holder* is a tensor that this rank updates: a whole parameter, a shard of one, or a flat partition of many. Its *pieces* say
which elements of which parameter it holds. The states of the optimizer, the averages among them, have the holder's shape, so the
same few lines serve every strategy.

A power-function average of width s (arXiv 2312.02696, section 3 and appendix C) weighs the weights after update i with a power of
i, such that the standard deviation of this profile is s times the length of training. Snapshots of two such averages give, as a
linear combination, the average of any other width.
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

Decay = Callable[[int], float]  # of an average, at the update 1, 2, ...
EMA = "ema"  # the optimizer state of the average that stands for the trained model; the others' names begin with it
POWER = f"{EMA}_power_"


def constant_state(decay: float) -> str:
    """Name of the optimizer state that holds a further average of constant ``decay``."""
    return f"{EMA}_{decay!r}"


def power_state(width: float) -> str:
    """Name of the optimizer state that holds the power-function average of ``width``."""
    return f"{POWER}{width!r}"


def width_of(state: str) -> float | None:
    """The width in the name of a power-function average; ``None`` for other names."""
    found = re.fullmatch(rf"{POWER}(0?\.\d+)", state)
    return float(found[1]) if found else None


# --- decay ----------------------------------------------------------------------------------------------------------------------


def average_decays(config: OptimizerConfig) -> dict[str, Decay]:
    """Name of each average of the weights -> its decay; the first one is validated, sampled and exported."""
    constant = {EMA: config.ema_decay} | {constant_state(decay): decay for decay in config.more_ema_decays}
    decays: dict[str, Decay] = {name: partial(constant_decay, decay=decay) for name, decay in constant.items()}
    return decays | {power_state(width): partial(power_decay, width=width) for width in config.power_widths}


def constant_decay(update: int, decay: float) -> float:
    return decay


def power_of(width: float) -> float:
    """The exponent gamma of a relative ``width``, 0 < width < 12^-0.5: the root above 0 of appendix C.2."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def power_decay(update: int, width: float) -> float:
    """What the average keeps of itself at ``update`` = 1, 2, ...: (1 - 1 / update)^(gamma + 1) (eq. 4 there); 0 at the first."""
    return (1 - 1 / update) ** (power_of(width) + 1)


# --- update ---------------------------------------------------------------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """Before an optimizer among a class's bases: it keeps averages of the parameters, which start from the first ones.

    After every step ``average <- decay average + (1 - decay) parameter``, for each of ``decays``: name of the state -> decay. A
    strategy that shards the optimizer's tensors shards these with them.
    ``skip_step`` makes ``step`` change nothing, whatever the gradients. ``num_updates`` of the first group counts the others.
    """

    def __init__(self, params: Iterable[Any], *, decays: Mapping[str, Decay], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._step_supports_amp_scaling = False  # of float16: gradients are unscaled before they are clipped, not in the step
        self.decays = dict(decays)
        self.skip_step = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states; torch gives them the precision of their parameters, the averages keep their own."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(number, {}) for group in state_dict["param_groups"] for number in group["params"]]
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
        self.param_groups[0]["num_updates"] = update = self.param_groups[0].get("num_updates", 0) + 1
        for p, value in first.items():
            for name in self.decays:
                self.state[p][name] = value.clone()
        if averaged:
            weights = [p.detach().float() for p in averaged]
            for name, decay in self.decays.items():
                torch._foreach_lerp_([self.state[p][name] for p in averaged], weights, 1 - decay(update))
        return loss


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What the closure of an optimizer's step gives: it runs forward and backward."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# --- holders --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """``length`` elements: from ``start`` of a flattened parameter, at ``offset`` of the flattened holder."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Holder:
    """A tensor that this rank updates, and what it holds. ``owned`` is false where another rank holds the same and writes it."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    owned: bool = True


def flat(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor as a flat view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def parameter_shapes(stage: pl.LightningModule) -> dict[str, list[int]]:
    """Parameter -> shape of the whole, also where it is cut (ZeRO-3 keeps the shape aside)."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in stage.named_parameters()}


class Averages(ABC):
    """The averages of a stage in training: everything follows from ``holders``, which the strategy knows."""

    world_size: int

    @property
    @abstractmethod
    def stage(self) -> pl.LightningModule: ...

    @property
    @abstractmethod
    def optimizer(self) -> Optimizer:
        """The optimizer itself, without what wraps it."""

    @abstractmethod
    def holders(self) -> Iterator[Holder]:
        """What this rank updates, and what it holds of parameters that are not trained."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring what the model computes with up to date, after holders have changed."""

    @property
    def set_aside(self) -> dict[Tensor, Tensor]:
        """Weights that wait, beside their stage, while the model holds averages that are more precise than they are."""
        return vars(self.stage).setdefault("weights_set_aside", {})

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchange weights and averages in place; a second call exchanges them back. Nothing happens before the first step.

        Weights that are less precise than their average are set aside instead: in their place it would be rounded.
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
    def average_distance(self) -> Tensor:
        """[2]: squared distance between weights and averages, and squared norm of the weights, of what this rank owns."""
        sums = torch.zeros(2, device=self.stage.device)
        for holder in self.holders():
            average, weights = self.optimizer.state.get(holder.tensor, {}).get(EMA), flat(holder.tensor).float()
            if holder.owned and average is not None:
                sums += torch.stack([(weights - flat(average)).square().sum(), weights.square().sum()]).to(sums)
        return sums

    @torch.no_grad()
    def averaged_state(self) -> dict[str, Tensor]:
        """State dict of the stage with averages for weights, whole and float32 on every rank. All ranks call it together."""
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
        return {name: value for name, value in self.stage.state_dict().items() if name not in names and torch.is_tensor(value)}


# --- combination ----------------------------------------------------------------------------------------------------------------


def overlap(update_a: float, width_a: float, update_b: float, width_b: float) -> float:
    """Inner product of the profiles of two averages, each taken at an update (appendix C.3)."""
    a, b = power_of(width_a), power_of(width_b)
    exponent = b if update_a < update_b else -a
    return (a + 1) * (b + 1) * (update_a / update_b) ** exponent / ((a + b + 1) * max(update_a, update_b))


def combination(snapshots: Sequence[tuple[int, float]], update: int, width: float) -> tuple[np.ndarray, float]:
    """Factors of ``snapshots`` (their update and width) whose sum is closest to the average of ``width`` at ``update``.

    Also the distance of the two profiles relative to that of the average: 0 where it is one of the snapshots.
    """
    products = np.array([[overlap(*one, *other) for other in snapshots] for one in snapshots])
    wanted = np.array([overlap(*one, update, width) for one in snapshots])
    factors = np.linalg.lstsq(products, wanted, rcond=1e-12)[0]
    norm = overlap(update, width, update, width)
    left = norm - 2 * factors @ wanted + factors @ products @ factors
    return factors, math.sqrt(max(0.0, left) / norm)
