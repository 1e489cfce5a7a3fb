"""Averages of the weights along training: their names, and those whose length is chosen afterwards.

A power-function average of width s (arXiv 2312.02696, section 3 and appendix C) weighs the weights after update i with a power of
i, such that the standard deviation of this profile is s times the length of training. Snapshots of two such averages give, as a
linear combination, the average of any other width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

EMA = "ema"  # the optimizer state of the average that stands for the trained model; the others' names begin with it
POWER = f"{EMA}_power_"


def constant_state(decay: float) -> str:
    """Name of the optimizer state that holds a further average of constant ``decay``."""
    return f"{EMA}_{decay!r}"


def power_state(width: float) -> str:
    """Name of the optimizer state that holds the power-function average of ``width``."""
    return f"{POWER}{width!r}"


def width_of(state: str) -> float | None:
    """The width in the name of a power-function average; ``None`` for other names."""
    found = re.fullmatch(rf"{POWER}(0?\.\d+)", state)
    return float(found[1]) if found else None


def power_of(width: float) -> float:
    """The exponent gamma of a relative ``width``, 0 < width < 12^-0.5: the root above 0 of appendix C.2."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def power_decay(update: int, width: float) -> float:
    """What the average keeps of itself at ``update`` = 1, 2, ...: (1 - 1 / update)^(gamma + 1) (eq. 4 there); 0 at the first."""
    return (1 - 1 / update) ** (power_of(width) + 1)


def overlap(update_a: float, width_a: float, update_b: float, width_b: float) -> float:
    """Inner product of the profiles of two averages, each taken at an update (appendix C.3)."""
    a, b = power_of(width_a), power_of(width_b)
    exponent = b if update_a < update_b else -a
    return (a + 1) * (b + 1) * (update_a / update_b) ** exponent / ((a + b + 1) * max(update_a, update_b))


def combination(snapshots: Sequence[tuple[int, float]], update: int, width: float) -> tuple[np.ndarray, float]:
    """Factors of ``snapshots`` (their update and width) whose sum is closest to the average of ``width`` at ``update``.

    Also the distance of the two profiles relative to that of the average: 0 where it is one of the snapshots.
    """
    products = np.array([[overlap(*one, *other) for other in snapshots] for one in snapshots])
    wanted = np.array([overlap(*one, update, width) for one in snapshots])
    factors = np.linalg.lstsq(products, wanted, rcond=1e-12)[0]
    norm = overlap(update, width, update, width)
    left = norm - 2 * factors @ wanted + factors @ products @ factors
    return factors, math.sqrt(max(0.0, left) / norm)
