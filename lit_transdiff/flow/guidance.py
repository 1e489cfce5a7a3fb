"""Classifier-free guidance: a wrapper that combines two velocities into one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_transdiff.flow.solvers import Velocity

TIME_TOLERANCE = 1e-6  # grid times are float32; that of 0.7 must lie in [0.7, 1]
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # x_t, t -> conditional and unconditional velocity
Schedule = Callable[[float, float], float]  # maximal scale, t -> scale at t


def constant_scale(scale: float, t: float) -> float:
    """A constant scale, for all times or all parts."""
    return scale


def rising(scale: float, t: float) -> float:
    """No guidance at noise (t = 1), rising linearly to the full scale at data (t = 0)."""
    return 1 + (scale - 1) * (1 - t)


GUIDANCE: dict[str, Schedule] = {"constant": constant_scale, "rising": rising}


def growing(scale: float, progress: float) -> float:
    """Rise linearly with the share of the image sampled so far, to the full scale at the last part."""
    return 1 + (scale - 1) * progress


# Maximal scale, share of the image sampled including this part (0 to 1) -> maximal scale of the part.
PART_GUIDANCE: dict[str, Schedule] = {"constant": constant_scale, "growing": growing}


def guide(
    conditional: Velocity,
    both: Pair,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    schedule: Schedule = constant_scale,
) -> Velocity:
    """v = u + scale(t) (c - u) where low <= t <= high, else c (arXiv 2207.12598; interval: arXiv 2404.07724).

    ``both`` returns (c, u) in one pass, and is not called outside the interval or for a scale of 1, which is
    no guidance.
    """
    if scale < 1:
        raise ValueError(f"guidance scale: got {scale!r}; allowed: at least 1 (no guidance).")
    if scale == 1:
        return conditional
    low, high = interval[0] - TIME_TOLERANCE, interval[1] + TIME_TOLERANCE

    def guided(x_t: Tensor, t: float) -> Tensor:
        if not low <= t <= high:
            return conditional(x_t, t)
        c, u = both(x_t, t)
        return u + schedule(scale, t) * (c - u)

    return guided
