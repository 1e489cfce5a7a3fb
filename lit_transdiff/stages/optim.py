"""AdamW with the paper's parameter groups and an average of the weights kept as one of its states.

The average (EMA) is float32 and lives in the optimizer's state, so whatever shards, saves and restores the optimizer does the
same to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_transdiff.config import OptimizerConfig, unknown


class AveragedAdamW(torch.optim.AdamW):
    """AdamW that keeps ``ema <- decay ema + (1 - decay) parameter`` after every step, starting from the first parameters."""

    def __init__(self, params: Iterable[Any], *, ema_decay: float, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.ema_decay = ema_decay

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # The closure runs forward and backward; the average starts from the weights before the first update.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = {p: p.detach().float().clone() for p in self._trained() if p.grad is not None and "ema" not in self.state[p]}
        super().step()
        for p, value in first.items():
            self.state[p]["ema"] = value
        averaged = [p for p in self._trained() if p.grad is not None]
        if averaged:
            averages = [self.state[p]["ema"] for p in averaged]
            torch._foreach_lerp_(averages, [p.detach().float() for p in averaged], 1 - self.ema_decay)
        return loss

    def average(self, p: Tensor) -> Tensor:
        """The average of a parameter; the parameter itself before the first step."""
        return self.state[p].get("ema", p.detach()) if p in self.state else p.detach()

    @torch.no_grad()
    def average_distance(self) -> Tensor:
        """[2]: the squared distance between weights and averages, and the squared norm of the weights."""
        pairs = [(p.detach().float(), self.average(p)) for p in self._trained()]
        apart = torch._foreach_norm(torch._foreach_sub([p for p, _ in pairs], [average for _, average in pairs]))
        size = torch._foreach_norm([p for p, _ in pairs])
        return torch.stack([torch.stack(apart).square().sum(), torch.stack(size).square().sum()])

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights and their averages in place; a second call exchanges them back."""
        for p in self._trained():
            if p in self.state and "ema" in self.state[p]:
                weights = p.detach().clone()
                p.copy_(self.state[p]["ema"])
                self.state[p]["ema"].copy_(weights)


@contextmanager
def averaged_weights(optimizer: AveragedAdamW) -> Iterator[None]:
    """Inside, the parameters hold their averages."""
    optimizer.swap_average()
    try:
        yield
    finally:
        optimizer.swap_average()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The paper's two groups of the trainable parameters: no decay for vectors, biases and the whole decoder; then the rest."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and not name.endswith(".bias") and not name.startswith("decoder.")].append(p)
    settings = [{"params": groups[False], "weight_decay": 0.0}, {"params": groups[True], "weight_decay": weight_decay}]
    return [group for group in settings if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AveragedAdamW:
    return AveragedAdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        ema_decay=config.ema_decay,
    )


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}


def lr_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step ``step`` (from 0) relative to ``config.lr``: linear warm-up, then the schedule down to min_lr.

    By default step 0 already moves: the warm-up is (step + 1) / warmup_steps. With ``warmup_offset`` 0 its rate is 0.
    """
    if step < config.warmup_steps:
        return (step + config.warmup_offset) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * SCHEDULES[config.schedule](min(1.0, progress))


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse a schedule that is in no table."""
    if config.schedule not in SCHEDULES:
        raise unknown("optimizer.schedule", config.schedule, SCHEDULES)
