"""Classifier-free guidance, as a wrapper that makes one velocity_fn of two."""

from __future__ import annotations

from torch import Tensor

from lit_transdiff.flow.loss import VelocityFn


def guide(
    conditional: VelocityFn, unconditional: VelocityFn, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> VelocityFn:
    """v = u + scale (c - u) where low <= t <= high, else c (arXiv 2207.12598; interval: arXiv 2404.07724).

    A scale of 1 is no guidance: the unconditional function is then never called, nor is it outside the interval.
    """
    if scale < 1:
        raise ValueError(f"guidance scale: got {scale!r}; allowed: 1 (no guidance) and more.")
    if scale == 1:
        return conditional
    low, high = interval
    always = (low, high) == (0, 1)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        c = conditional(x_t, t)
        if not (always or low <= float(t.flatten()[0]) <= high):
            return c
        u = unconditional(x_t, t)
        return u + scale * (c - u)

    return guided
