"""AdamW (arXiv 1711.05101) with averaged weights; on a GPU in one pass over memory, with clipping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_transdiff.checkpoints.averages import Averaging, loss_of

if TYPE_CHECKING:
    from lit_transdiff.kernels.adamw import Tables, Updated

log = logging.getLogger(__name__)
STATES = ("step", "exp_avg", "exp_avg_sq")  # torch's names


@dataclass(frozen=True)
class Addresses:
    """Where the tensors of a parameter were: addresses, and the dictionary and number of its states."""

    parameter: nn.Parameter
    weight: int
    gradient: int  # 0 without one
    states: Mapping[str, Tensor] | None
    count: int

    @classmethod
    def now(cls, p: nn.Parameter, states: Mapping[str, Tensor] | None) -> Addresses:
        gradient = 0 if p.grad is None else p.grad.data_ptr()
        return cls(p, p.data_ptr(), gradient, states, len(states or ()))


@dataclass(frozen=True)
class FusedUpdate:
    """Tensors and tables of the kernels for every step until a tensor moves; ``tables`` is None if they do
    not apply.
    """

    places: list[Addresses]
    steps: list[Tensor]  # of the parameters that have a gradient
    tables: Tables | None

    def lasts(self, states: Mapping[Any, Any]) -> bool:
        """Whether all tensors are where they were. The host does this in every step, so it makes no lists."""
        for place in self.places:
            p, now = place.parameter, states.get(place.parameter)
            gradient = p.grad
            if (
                now is not place.states
                or len(now or ()) != place.count
                or p.data_ptr() != place.weight
                or (0 if gradient is None else gradient.data_ptr()) != place.gradient
            ):
                return False
        return True


class AveragedAdamW(Averaging, torch.optim.AdamW):
    """AdamW with averaged weights.

    With ``kernels``, steps after the first are those of ``lit_transdiff.kernels.adamw`` for whole float32
    tensors on a GPU. It remains off where a strategy gives the optimizer parts of tensors. Whoever replaces a
    single tensor of a parameter's states, instead of the states of the parameter, calls ``forget``.
    """

    kernels = False
    max_norm: float | None = None  # to which the next step clips the gradients
    prepared: FusedUpdate | None = None

    def clips(self, gradient_clip_val: float | None, gradient_clip_algorithm: str | None) -> bool:
        """Whether the next step clips the gradients itself, given Lightning's settings."""
        by_norm = gradient_clip_algorithm in (None, "norm") and self.tables() is not None
        self.max_norm = (gradient_clip_val or None) if by_norm else None
        return by_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = loss_of(closure)
        tables = None if self.skip_step else self.tables()
        if tables is None:
            super().step()
            return loss
        from lit_transdiff.kernels.adamw import AdamW, adamw_step

        assert self.prepared is not None
        torch._foreach_add_(self.prepared.steps, 1)
        settings = [
            AdamW(group["lr"], 1 - group["lr"] * group["weight_decay"], group["betas"], group["eps"])
            for group in self.param_groups
        ]
        update = self.count_update()
        adamw_step(tables, settings, [1 - decay(update) for decay in self.decays.values()], self.max_norm)
        return loss

    def forget(self) -> None:
        """Find all tensors anew in the next step."""
        self.prepared = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.forget()

    def tables(self) -> Tables | None:
        """The addresses that the kernels read and write in a step; None where the kernels do not apply."""
        if not self.kernels:
            return None
        if self.prepared is None or not self.prepared.lasts(self.state):
            self.prepared = self.prepare()
        return self.prepared.tables

    def prepare(self) -> FusedUpdate:
        """The places of all tensors, and the kernels' tables of them."""
        from lit_transdiff.kernels.adamw import Tables

        groups = [
            [self.part(p) for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        parts = [part for group in groups for part in group]
        takes = bool(parts) and all(map(can_take, parts))
        places = [Addresses.now(p, self.state.get(p)) for p in self._trained()]
        steps = [part.step for part in parts if part is not None]
        return FusedUpdate(places, steps, Tables(groups) if takes else None)  # type: ignore[arg-type]

    def part(self, p: nn.Parameter) -> Updated | None:
        """A parameter with its gradient and its states, if it has them."""
        from lit_transdiff.kernels.adamw import Updated

        state: Mapping[str, Tensor] = self.state.get(p, {})
        if p.grad is None or not state.keys() >= {*STATES, *self.decays}:
            return None
        averages = tuple(state[name] for name in self.decays)
        return Updated(state["step"], p, p.grad, state["exp_avg"], state["exp_avg_sq"], averages)


def can_take(part: Updated | None) -> bool:
    """Whether the kernels apply to a parameter and work on its device."""
    if part is None:
        return False
    device = part.weight.device
    kinds = {(t.dtype, t.device, t.is_contiguous()) for t in part.tensors}
    return kinds == {(torch.float32, device, True)} and adamw_works(device)


@cache
def adamw_works(device: torch.device) -> bool:
    """Whether Triton compiles the kernels for a device; if not, log why."""
    try:
        from lit_transdiff.kernels.adamw import AdamW, Tables, Updated, adamw_step

        weight, gradient, mean, square, average = torch.ones(5, 8, device=device).unbind()
        part = Updated(torch.ones((), device=device), weight, gradient, mean, square, (average,))
        adamw_step(Tables([[part]]), [AdamW(1e-3, 1.0, (0.9, 0.9), 1e-8)], [0.1], 1.0)
    except Exception as error:  # compilers and their tools have no common error class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        log.warning("the Triton kernels of AdamW do not work here, torch's are used: %s", reason)
        return False
    return True
