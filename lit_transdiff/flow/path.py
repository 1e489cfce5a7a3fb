"""The linear path between data (t = 0) and noise (t = 1), and its velocity.

x_t = (1 - t) x + t noise,   v = d x_t / d t = noise - x   (arXiv 2506.09482, section 3.2; arXiv 2209.03003).

Shapes: x, noise, x_t, v [B, ...]; t [B] or a scalar. t and the mixing are float32.
"""

from __future__ import annotations

from torch import Tensor


def expand_like(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [B] (or a scalar) with trailing axes for broadcasting against ``like`` [B, ...]."""
    return t.float().reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t.float()


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the linear path."""
    t = expand_like(t, x)
    return (1 - t) * x + t * noise


def target_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The regression target, v = noise - x."""
    return noise - x
