"""AdamW (arXiv 1711.05101) with averaged weights; on a GPU in one pass over memory, with clipping."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_transdiff.checkpoints.averages import Averaging, loss_of

if TYPE_CHECKING:
    from lit_transdiff.kernels.adamw import Tables, Updated

log = logging.getLogger(__name__)
STATES = ("step", "exp_avg", "exp_avg_sq")  # torch's names


class AveragedAdamW(Averaging, torch.optim.AdamW):
    """AdamW with averaged weights.

    With ``kernels``, steps after the first are those of ``lit_transdiff.kernels.adamw`` for whole float32
    tensors on a GPU. It remains off where a strategy gives the optimizer parts of tensors.
    """

    kernels = False
    max_norm: float | None = None  # to which the next step clips the gradients
    known: tuple[list[int], Tables | None] = ([], None)  # the last addresses, and their tables

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

        torch._foreach_add_([self.state[p]["step"] for p in self.moved()], 1)
        settings = [
            AdamW(group["lr"], 1 - group["lr"] * group["weight_decay"], group["betas"], group["eps"])
            for group in self.param_groups
        ]
        update = self.count_update()
        adamw_step(tables, settings, [1 - decay(update) for decay in self.decays.values()], self.max_norm)
        return loss

    def moved(self) -> list[nn.Parameter]:
        """The parameters that have a gradient."""
        return [p for p in self._trained() if p.grad is not None]

    def tables(self) -> Tables | None:
        """The addresses that the kernels read and write in a step; None where the kernels do not apply."""
        if not self.kernels:
            return None
        now = [tensor.data_ptr() for p in self.moved() for tensor in (p, p.grad, *self.state[p].values())]
        if now != self.known[0]:
            self.known = (now, self.new_tables())
        return self.known[1]

    def new_tables(self) -> Tables | None:
        from lit_transdiff.kernels.adamw import Tables

        groups = [
            [self.part(p) for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        parts = [part for group in groups for part in group]
        return Tables(groups) if parts and all(map(can_take, parts)) else None  # type: ignore[arg-type]

    def part(self, p: nn.Parameter) -> Updated | None:
        """A parameter with its gradient and its states, if it has them."""
        from lit_transdiff.kernels.adamw import Updated

        state: dict[str, Tensor] = self.state[p]
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
