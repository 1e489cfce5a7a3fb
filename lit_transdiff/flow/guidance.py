"""Classifier-free guidance, as a wrapper that makes one velocity of two."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_transdiff.flow.solvers import Velocity

ROUNDING = 1e-6  # of the times of a grid, which are float32: the one at 0.7 is in [0.7, 1]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # x_t, t -> conditional and unconditional velocity


def guide(conditional: Velocity, both: Pair, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """v = u + scale (c - u) where low <= t <= high, else c (arXiv 2207.12598; interval: arXiv 2404.07724).

    ``both`` gives (c, u) in one pass. It is never called outside the interval, nor for a scale of 1, which is no guidance.
    """
    if scale < 1:
        raise ValueError(f"guidance scale: got {scale!r}; allowed: at least 1 (no guidance).")
    if scale == 1:
        return conditional
    low, high = interval[0] - ROUNDING, interval[1] + ROUNDING

    def guided(x_t: Tensor, t: float) -> Tensor:
        if not low <= t <= high:
            return conditional(x_t, t)
        c, u = both(x_t, t)
        return u + scale * (c - u)

    return guided
