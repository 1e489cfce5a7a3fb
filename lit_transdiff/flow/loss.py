"""Densities of t, and the flow-matching loss: an objective plus weighted loss terms.

Shapes: x [B, ...] clean latents, noise [B, ...], t [B]. Randomness is an argument: uniform or normal numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_transdiff.config import FlowConfig, require_known
from lit_transdiff.flow.path import expand_like, target_velocity


def logit_normal(normal: Tensor, config: FlowConfig) -> Tensor:
    """t = sigmoid(mean + std n); the paper uses mean 0 and std 1."""
    return torch.sigmoid(config.density_mean + config.density_std * normal)


def uniform(normal: Tensor, config: FlowConfig) -> Tensor:
    """t uniform in (0, 1): the normal CDF of n."""
    return torch.special.ndtr(normal)


Density = Callable[[Tensor, FlowConfig], Tensor]  # standard normal numbers -> t
DENSITIES: dict[str, Density] = {"logit_normal": logit_normal, "uniform": uniform}


def draw_times(normal: Tensor, config: FlowConfig) -> Tensor:
    """Training times in [0, 1] from standard normal numbers of any shape, float32.

    The density is shifted (above 1: towards noise; arXiv 2403.03206, eq. 23) and optionally truncated to
    multiples of 1 / n; the reference uses n = 1000. These are float64, because 1000 times the float32 k /
    1000 is not k for some k.
    """
    t = shift_times(DENSITIES[config.density](normal.float(), config), config.shift)
    return t if config.discretize is None else torch.floor(t * config.discretize).double() / config.discretize


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t), written so that 0 and 1 are exact fixed points; the identity for s = 1."""
    return t if shift == 1 else t / (t + (1 - t) / shift)


@dataclass(frozen=True)
class Prediction:
    """A predicted velocity with the x, noise, t and x_t behind it: all [B, ...], t [B]."""

    velocity: Tensor
    x: Tensor
    noise: Tensor
    t: Tensor
    x_t: Tensor

    @property
    def target(self) -> Tensor:
        """The velocity of the path."""
        return target_velocity(self.x, self.noise)

    @property
    def clean(self) -> Tensor:
        """The clean latents that the predicted velocity implies, x_t - t v."""
        return self.x_t - expand_like(self.t, self.x_t) * self.velocity


LossFn = Callable[[Prediction, FlowConfig], Tensor]  # -> the loss of every row, [B]


def velocity_error(prediction: Prediction, config: FlowConfig) -> Tensor:
    """Mean squared error of the velocity (arXiv 2506.09482, eq. 8)."""
    return (prediction.velocity - prediction.target).square().flatten(1).mean(1)


def clean_error(prediction: Prediction, config: FlowConfig) -> Tensor:
    """Mean squared error of the clean latents, i.e. that of the velocity weighted by t^2."""
    return (prediction.clean - prediction.x).square().flatten(1).mean(1)


def direction_error(prediction: Prediction, config: FlowConfig) -> Tensor:
    """1 - cosine similarity of predicted and true velocity (direction loss of arXiv 2501.01423)."""
    return 1 - nn.functional.cosine_similarity(prediction.velocity.flatten(1), prediction.target.flatten(1))


OBJECTIVES: dict[str, LossFn] = {"velocity": velocity_error, "clean": clean_error}
LOSS_TERMS: dict[str, LossFn] = {"direction": direction_error}


def flow_matching_loss(prediction: Prediction, config: FlowConfig) -> Tensor:
    """The objective plus weighted loss terms of every row, [B]; the batch loss is the mean."""
    rows = OBJECTIVES[config.objective](prediction, config)
    for name, weight in config.loss_terms.items():
        rows = rows + weight * LOSS_TERMS[name](prediction, config)
    return rows


def check_flow(config: FlowConfig) -> None:
    """Refuse unknown densities, objectives and loss terms."""
    require_known("flow.density", config.density, DENSITIES)
    require_known("flow.objective", config.objective, OBJECTIVES)
    for name in config.loss_terms:
        require_known("flow.loss_terms", name, LOSS_TERMS)
