"""How a setting is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any


def unknown(what: str, value: object, allowed: Iterable[str]) -> ValueError:
    """The one wording for a name that is not in a table: field, value, what is allowed, nearest match."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{what}: {value!r} is not known.{hint} Allowed: {', '.join(names)}.")


def require(condition: bool, what: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming the field, the value received and what is allowed, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{what}: got {value!r}; allowed: {allowed}.")


def check_finite(config: Any, prefix: str = "") -> None:
    """Refuse numbers of a configuration, and of its sections, that are NaN or infinite."""
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            check_finite(value, f"{name}.")
        items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        numbers = [item for item in items if isinstance(item, float)]
        require(all(map(math.isfinite, numbers)), name, value, "finite numbers")
