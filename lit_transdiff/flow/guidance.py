"""Classifier-free guidance: a wrapper that combines two velocities into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_transdiff.flow.path import expand_like
from lit_transdiff.flow.solvers import Velocity

TIME_TOLERANCE = 1e-6  # grid times are float32; that of 0.7 must lie in [0.7, 1]
Pair = Callable[[Tensor, Any], tuple[Tensor, Tensor]]  # x_t, t -> conditional and unconditional velocity
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

    def guided(x_t: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            return guided_by_row(x_t, t)
        if not low <= t <= high:
            return conditional(x_t, t)
        c, u = both(x_t, t)
        return u + schedule(scale, t) * (c - u)

    def guided_by_row(x_t: Tensor, t: Tensor) -> Tensor:
        """At a time of each row [B], of which those beyond the data count as the data's."""
        times = t.clamp(0, 1).tolist()
        scales = [schedule(scale, time) if low <= time <= high else 1.0 for time in times]
        if all(each == 1 for each in scales):
            return conditional(x_t, t)
        c, u = both(x_t, t)
        return u + expand_like(x_t.new_tensor(scales), x_t) * (c - u)

    return guided
