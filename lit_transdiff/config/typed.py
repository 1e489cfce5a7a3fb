"""Conversion of values in files and overrides to the types of their fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Union

from lit_transdiff.config.checks import require
from lit_transdiff.config.yaml_text import BOOLEANS, number_of

WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
LARGEST = 2**63 - 1  # largest integer that all libraries support
MAX_SHOWN = 80  # characters of a refused value in a message


def quoted(names: Iterable[object]) -> str:
    return ", ".join(f"`{as_text(name) or name}`" for name in names)


def type_in_words(hint: Any) -> str:
    """A type as text, as in ``integer or null``; the members of a ``Literal`` by name."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return quoted(parts)
    if origin is list:
        return f"list of {type_in_words(parts[0])}s".replace("texts", "names")
    if origin is dict:
        return f"{type_in_words(parts[0])}: {type_in_words(parts[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else type_in_words(part) for part in parts)
    return WORDS.get(hint, "settings")


def typed(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value`` of the field ``name`` to its type ``hint``.

    Text is read according to the type: 010 is ten for an integer and stays 010 for text. Raises
    ``ValueError`` for a value of another type.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(value):
        return value  # a finished section
    if dataclasses.is_dataclass(hint):
        return section(value, typing.cast(type, hint), name)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in parts:
            return None
        kinds = [part for part in parts if part is not types.NoneType]
        nested = isinstance(value, list | dict)
        fits = [part for part in kinds if (typing.get_origin(part) in (list, dict)) == nested]
        return typed_or_refused(value, (fits or kinds)[0], name, hint)
    return typed_or_refused(value, hint, name, hint)


def typed_or_refused(value: Any, kind: Any, name: str, hint: Any) -> Any:
    """``value`` as a ``kind``; the error mentions the whole ``hint``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and isinstance(value, list):
        return [typed(item, parts[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): typed(item, parts[1], f"{name}.{key}") for key, item in value.items()}
    result = None
    if origin is Literal:
        result = next((part for part in parts if as_text(part) == as_text(value)), None)
    elif kind in READERS:
        result = READERS[kind](value)
    if result is None:
        shown = value if len(str(value)) <= MAX_SHOWN else f"{str(value)[:MAX_SHOWN]}..."
        require(False, name, shown, type_in_words(hint).replace("`", "") + hint_of(value, kind))
    return result


def hint_of(value: Any, kind: Any) -> str:
    """A hint for the error message."""
    if kind is str and value is None:
        return " (in quotes where it says null)"
    if kind in (int, float) and isinstance(value, str):
        return " in decimal digits, as 10" if kind is int else " in decimal digits, as 0.001 or 1e-3"
    names = [str(part) for part in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def section(value: Any, schema: type, name: str) -> Any:
    """Make a dataclass from its settings by name; others have their defaults."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {value!r}; expected settings (key: value).")
    hints, prefix = typing.get_type_hints(schema), f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    values = {key: typed(item, hints[key], prefix + key) for key, item in value.items()}
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(key in values or not needed, prefix + key, None, type_in_words(hints[key]))
    return schema(**values)


def as_text(value: Any) -> str | None:
    """The text of a value, as it was written."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float | Path) else None


def as_boolean(value: Any) -> bool | None:
    """A boolean, or None for other values."""
    return value if isinstance(value, bool) else BOOLEANS.get(value) if isinstance(value, str) else None


def as_float(value: Any) -> float | None:
    """A number, which may be infinite or NaN (other checks refuse those), or None for other values."""
    number = number_of(value) if isinstance(value, str) else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or (isinstance(number, int) and abs(number) > LARGEST)
    ):
        return None
    return float(number)


def as_integer(value: Any) -> int | None:
    """An integer that fits into 64 bits, also written as 1e3 or 10.0, or None for other values."""
    number = number_of(value) if isinstance(value, str) else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not math.isfinite(number)
        or abs(number) > LARGEST
    ):
        return None
    try:
        exact = Decimal(value.replace("_", "") if isinstance(value, str) else number)
    except ArithmeticError:  # an exponent beyond all bounds
        return None
    return int(exact) if exact == exact.to_integral_value() else None


READERS: dict[Any, Any] = {int: as_integer, float: as_float, bool: as_boolean, str: as_text}
