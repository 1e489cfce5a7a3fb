"""Optimizers with the paper's parameter groups and averages of the weights kept as some of their states.

The average (EMA) is float32 and lives in the optimizer's state, so whatever shards, saves and restores the optimizer does the
same to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lit_transdiff.checkpoints.averages import EMA, constant_state, power_decay, power_state
from lit_transdiff.config import OptimizerConfig, unknown

Decay = Callable[[int], float]  # of an average, at the update 1, 2, ...


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
        # The closure runs forward and backward; the averages start from the weights before the first update.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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


class AveragedAdamW(Averaging, torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) that keeps averages."""


def average_decays(config: OptimizerConfig) -> dict[str, Decay]:
    """Name of each average of the weights -> its decay; the first one is validated, sampled and exported."""
    constant = {EMA: config.ema_decay} | {constant_state(decay): decay for decay in config.more_ema_decays}
    decays: dict[str, Decay] = {name: partial(constant_decay, decay=decay) for name, decay in constant.items()}
    return decays | {power_state(width): partial(power_decay, width=width) for width in config.power_widths}


def constant_decay(update: int, decay: float) -> float:
    return decay


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The paper's two groups of the trainable parameters: no decay for vectors, biases and the whole decoder; then the rest."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and not name.endswith(".bias") and not name.startswith("decoder.")].append(p)
    settings = [{"params": groups[False], "weight_decay": 0.0}, {"params": groups[True], "weight_decay": weight_decay}]
    return [group for group in settings if group["params"]]


Groups = list[dict[str, Any]]  # of parameters, with their weight decay


def adamw(groups: Groups, config: OptimizerConfig, decays: Mapping[str, Decay]) -> Averaging:
    betas = (config.betas[0], config.betas[1])
    return AveragedAdamW(groups, decays=decays, lr=config.lr, betas=betas, eps=config.eps, fused=True)  # one kernel a step


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig, Mapping[str, Decay]], Averaging]] = {"adamw": adamw}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Averaging:
    """The optimizer of a run over the trainable parameters of its model."""
    groups = parameter_groups(model, config.weight_decay)
    return OPTIMIZERS[config.name](groups, config, average_decays(config))


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}


def lr_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step ``step`` (from 0) relative to ``config.lr``: linear warm-up, then the schedule down to min_lr.

    By default step 0 already moves: the warm-up is (step + 1) / warmup_steps. With ``warmup_offset`` 0 its rate is 0. Offsets
    between are the reference's, whose clock runs on within the passes of a step, in the schedule as in the warm-up.
    """
    if step < config.warmup_steps:
        return (step + config.warmup_offset) / config.warmup_steps
    done = step + config.warmup_offset % 1 - config.warmup_steps
    progress = done / max(1, max_steps - config.warmup_steps)
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * SCHEDULES[config.schedule](min(1.0, progress))


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse an optimizer or a schedule that is in no table."""
    if config.name not in OPTIMIZERS:
        raise unknown("optimizer.name", config.name, OPTIMIZERS)
    if config.schedule not in SCHEDULES:
        raise unknown("optimizer.schedule", config.schedule, SCHEDULES)
