"""Densities of t, and the flow-matching loss.

Shapes: x [B, ...] clean latents, noise [B, ...], t [B]. Randomness is an argument: numbers that are uniform or normal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_transdiff.config import FlowConfig
from lit_transdiff.flow.path import interpolate, target_velocity

VelocityFn = Callable[[Tensor, Tensor], Tensor]


def logit_normal(normal: Tensor, config: FlowConfig) -> Tensor:
    """t = sigmoid(mean + std n): the paper's density with mean 0 and std 1."""
    return torch.sigmoid(config.density_mean + config.density_std * normal)


def uniform(normal: Tensor, config: FlowConfig) -> Tensor:
    """t uniform in (0, 1), as the normal distribution function of n."""
    return torch.special.ndtr(normal)


DENSITIES: dict[str, Callable[[Tensor, FlowConfig], Tensor]] = {"logit_normal": logit_normal, "uniform": uniform}


def draw_times(normal: Tensor, config: FlowConfig) -> Tensor:
    """Training times in [0, 1] from standard normal numbers of any shape, float32.

    The density is shifted (above 1: towards noise; arXiv 2403.03206, eq. 23) and, as an option, truncated to multiples of
    1 / n, which the reference does with n = 1000. These are float64: 1000 times the float32 k / 1000 is not k for some k.
    """
    t = shift_times(DENSITIES[config.density](normal.float(), config), config.shift)
    return t if config.discretize is None else torch.floor(t * config.discretize).double() / config.discretize


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t), written such that 0 and 1 stay exactly what they are; the identity for s = 1."""
    return t if shift == 1 else t / (t + (1 - t) / shift)


def flow_matching_loss(velocity_fn: VelocityFn, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity for every row, [B]; the loss of a batch is its mean (arXiv 2506.09482, eq. 8)."""
    v = velocity_fn(interpolate(x, noise, t), t)
    return (v.float() - target_velocity(x, noise)).square().flatten(1).mean(1)
