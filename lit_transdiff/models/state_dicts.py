"""Renamed state dicts, and checks of their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mapped:
    """A renamed state dict, the keys that have no counterpart, and names of tables made because none were
    given.
    """

    state: dict[str, Tensor]
    left_over: dict[str, Tensor]
    made: tuple[str, ...] = ()


def check_layout(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` listing every key that is missing, unexpected or of another shape."""
    problems = [f"missing: {key} {list(shape)}" for key, shape in shapes.items() if key not in state]
    problems += [
        f"unexpected: {key} {list(value.shape)}" for key, value in state.items() if key not in shapes
    ]
    problems += [
        f"of another shape: {key} {list(state[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        raise ValueError("the checkpoint does not fit:\n  " + "\n  ".join(problems))
