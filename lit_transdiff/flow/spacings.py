"""The steps of a diffusion chain that a sampler takes: ``spacing(num_steps, length)``, in rising order."""

from __future__ import annotations

from collections.abc import Callable


def even_steps(num_steps: int, length: int) -> list[int]:
    """n equidistant steps from the first to the last (the spacing of MAR's and DiT's released samplers)."""
    return [round(i * (length - 1) / (num_steps - 1)) for i in range(num_steps)]


def strided_steps(num_steps: int, length: int) -> list[int]:
    """n equidistant steps from the first on; the last is one stride before the end."""
    return [i * length // num_steps for i in range(num_steps)]


def nonzero_steps(num_steps: int, length: int) -> list[int]:
    """n steps after the first, to the last, at equal distances (the spacing of ACDiT's released sampler)."""
    stride = (length - 1) / num_steps  # this form of the division decides how halves are rounded
    return [round(i * stride) for i in range(1, num_steps + 1)]


SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "paper": even_steps,
    "uniform": strided_steps,
    "nonzero": nonzero_steps,
}
