"""Renamed state dicts, and checks of their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lit_transdiff.config.checks import listed


@dataclass(frozen=True)
class Mapped:
    """A renamed state dict, its keys without a counterpart, and names of tables that were made anew."""

    state: dict[str, Tensor]
    left_over: dict[str, Tensor]
    made: tuple[str, ...] = ()


def check_layout(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` with the keys that are missing, unexpected or of another shape."""
    problems = [f"missing: {key} {list(shape)}" for key, shape in shapes.items() if key not in state]
    found = {key: tuple(value.shape) for key, value in state.items()}
    problems += [f"unexpected: {key} {list(shape)}" for key, shape in found.items() if key not in shapes]
    differ = [key for key in shapes if key in found and found[key] != shapes[key]]
    problems += [f"of another shape: {k} {list(found[k])}, expected {list(shapes[k])}" for k in differ]
    if problems:
        raise ValueError(f"the checkpoint does not fit: {listed(problems, between='; ')}")
