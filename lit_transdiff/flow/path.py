"""The linear path between data (t = 0) and noise (t = 1), and what follows from it.

x_t = (1 - t) x + t noise,   v = d x_t / d t = noise - x   (arXiv 2506.09482, section 3.2; arXiv 2209.03003).

Shapes: x, noise, x_t, v [B, ...]; t [B] or a scalar. t and the mixing are float32.
"""

from __future__ import annotations

from torch import Tensor


def spread(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [B] (or a scalar) with trailing axes, so that it multiplies ``like`` [B, ...] row by row."""
    return t.float().reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t.float()


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the linear path."""
    t = spread(t, x)
    return (1 - t) * x + t * noise


def target_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The regression target, v = noise - x."""
    return noise - x


def to_clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean x that ``x_t`` and ``v`` imply."""
    return x_t - spread(t, x_t) * v


def to_noise(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The noise that ``x_t`` and ``v`` imply."""
    return x_t + (1 - spread(t, x_t)) * v


def velocity_to_score(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The score, grad log p_t(x_t) = -noise / t, that ``v`` implies; defined for t > 0."""
    return -to_noise(x_t, v, t) / spread(t, x_t)


def score_to_velocity(x_t: Tensor, score: Tensor, t: Tensor) -> Tensor:
    """The velocity that a score implies; defined for t < 1."""
    t = spread(t, x_t)
    return -(t * score + x_t) / (1 - t)
