"""Names of classes and samples from any data module, for messages.

``DataModule`` provides all of them. For any other Lightning module that yields ``Batch`` without
``class_names``, ``keys`` or ``planned_keys``, or with failing ones, only the names in messages and pictures
are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lit_transdiff.config.checks import listed

NAMES_SHOWN = 16  # number of names in a message


def class_names(data: Any, num_classes: int) -> list[str]:
    """The names of the classes, by default their numbers."""
    return list(getattr(data, "class_names", None) or map(str, range(num_classes)))


def sample_names(data: Any, samples: Tensor) -> str:
    """The names of the samples of a batch (any shape)."""
    return names_in_words(lambda: data.keys(samples))


def planned_names(data: Any, micro_step: int) -> str:
    """The names of the samples that this rank reads in a micro-step."""
    return names_in_words(lambda: data.planned_keys(micro_step))


def names_in_words(names: Callable[[], Sequence[str]]) -> str:
    """The first names, or ``unknown``: a message about something else must not fail here."""
    try:
        known = list(names())
    except Exception:
        return "unknown"
    return listed(known, NAMES_SHOWN) or "unknown"
