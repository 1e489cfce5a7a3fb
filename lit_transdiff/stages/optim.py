"""Optimizers with averaged weights, their parameter groups, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lit_transdiff.checkpoints.averages import Averaging, Decay, average_decays
from lit_transdiff.config import OptimizerConfig, require, unknown
from lit_transdiff.models.paradigm import Paradigm
from lit_transdiff.stages.adamw import AveragedAdamW
from lit_transdiff.stages.muon import AveragedMuon


class Group(dict[str, Any]):
    """A parameter group: ``params``, ``weight_decay``, and ``matrices``, those of
    ``params`` in the blocks.
    """

    def __init__(self, params: list[nn.Parameter], weight_decay: float, blocks: set[nn.Parameter]) -> None:
        super().__init__(params=params, weight_decay=weight_decay)
        self.matrices = [p for p in params if p in blocks and p.ndim == 2]


Groups = list[Group]


def parameter_groups(model: Paradigm, weight_decay: float) -> Groups:
    """The trainable parameters in two groups: without weight decay (vectors, biases,
    exempt ones) and with.
    """
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and not name.endswith(".bias") and not name.startswith(model.undecayed)].append(
                p
            )
    blocks = {p for stack in model.block_lists().values() for p in stack.parameters()}
    return [Group(groups[decayed], weight_decay * decayed, blocks) for decayed in groups if groups[decayed]]


def adamw(groups: Groups, config: OptimizerConfig, decays: Mapping[str, Decay]) -> Averaging:
    return AveragedAdamW(groups, decays=decays, **adamw_settings(config))


def muon(groups: Groups, config: OptimizerConfig, decays: Mapping[str, Decay]) -> Averaging:
    """Muon: each group is split into its matrices, with their own learning rate, and the rest."""
    parts: list[dict[str, Any]] = []
    for group in groups:
        shapes, rest = (
            [tuple(p.shape) for p in group.matrices],
            set(group["params"]).difference(group.matrices),
        )
        parts.append(
            {**group, "params": group.matrices, "shapes": shapes, "lr": config.muon_lr or 10 * config.lr}
        )
        parts.append({**group, "params": [p for p in group["params"] if p in rest]})
    return AveragedMuon([part for part in parts if part["params"]], decays=decays, **adamw_settings(config))


def adamw_settings(config: OptimizerConfig) -> dict[str, Any]:
    # one kernel per step
    return dict(lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


OptimizerFn = Callable[[Groups, OptimizerConfig, Mapping[str, Decay]], Averaging]
OPTIMIZERS: dict[str, OptimizerFn] = {"adamw": adamw, "muon": muon}


def build_optimizer(model: Paradigm, config: OptimizerConfig) -> Averaging:
    """The optimizer of a run over the trainable parameters of its model."""
    groups = parameter_groups(model, config.weight_decay)
    return OPTIMIZERS[config.name](groups, config, average_decays(config))


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """Warm-up, stable, decay: constant, then in the last 15% halved six times."""
    return 0.5 ** (6 * max(0.0, progress - 0.85) / 0.15)


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "wsd": wsd}


def lr_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (from 0) relative to ``config.lr``: linear warm-up, then the
    schedule.

    By default step 0 already has an effect: the warm-up is (step + 1) / warmup_steps. With ``warmup_offset``
    0 its rate is 0. Fractional offsets match the reference, whose clock also advances within the passes of a
    step.
    """
    if step < config.warmup_steps:
        return (step + config.warmup_offset) / config.warmup_steps
    done = step + config.warmup_offset % 1 - config.warmup_steps
    progress = done / max(1, max_steps - config.warmup_steps)
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * SCHEDULES[config.schedule](min(1.0, progress))


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse unknown optimizers and schedules."""
    if config.name not in OPTIMIZERS:
        raise unknown("optimizer.name", config.name, OPTIMIZERS)
    if config.schedule not in SCHEDULES:
        raise unknown("optimizer.schedule", config.schedule, SCHEDULES)
    allowed = "null with optimizer.name=adamw"
    require(config.muon_lr is None or config.name != "adamw", "optimizer.muon_lr", config.muon_lr, allowed)
