"""What a data module may say of its classes and samples, for people.

``DataModule`` says all of it. Any other module of Lightning that yields ``Batch`` will do: where it has no ``class_names``,
``keys`` or ``planned_keys``, or fails in them, the names are missing in messages and pictures, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

NAMES_SHOWN = 16  # names in a message


def class_names(data: Any, num_classes: int) -> list[str]:
    """The names of the classes, or their numbers."""
    return list(getattr(data, "class_names", None) or map(str, range(num_classes)))


def sample_names(data: Any, samples: Tensor) -> str:
    """The names of the samples of a batch (any shape)."""
    return names_in_words(lambda: data.keys(samples))


def planned_names(data: Any, micro_step: int) -> str:
    """The names of the samples that this rank reads in a micro-step."""
    return names_in_words(lambda: data.planned_keys(micro_step))


def names_in_words(names: Callable[[], Sequence[str]]) -> str:
    """The first names, or ``unknown``: a message about something else must not fail for them."""
    try:
        found = list(names())
    except Exception:
        return "unknown"
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return (", ".join(map(str, found[:NAMES_SHOWN])) or "unknown") + more
