"""Checks of settings and the wording of their errors."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lit_transdiff.base.hub import hub_place, is_on_hub


def unknown(what: str, value: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table: field, value, nearest match, allowed names."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{what}: {value!r} is not known.{hint} Allowed: {', '.join(names)}.")


def require_known(what: str, name: Any, table: Collection[Any]) -> None:
    """Raise the error ``unknown`` unless a name is in a table."""
    if name not in table:
        raise unknown(what, name, table)


@contextmanager
def errors_at(
    place: str | Path, kinds: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """Put the place of a value, such as its file, before the message of an error in the block."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{place}: {error}") from error


def require(condition: bool, what: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` with the field, its value and what is allowed, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{what}: got {value!r}; allowed: {allowed}{'' if allowed.endswith('?') else '.'}")


FOLDER_NAME = "the name of one folder, without '/', '\\' and '$', in which '~' or a space does not come first"


def is_folder_name(name: Any) -> bool:
    """Whether a string is the name of a single folder, also for a shell."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return name.isprintable() and not re.search(r"^[~\s]|[/\\$]", name)


def expanded(path: str, what: str) -> str:
    """A path with ``~`` and ``$NAME`` expanded.

    Raises ``ValueError`` for undefined variables and unknown users.

    An existing path with a ``$`` in its name stays unchanged, and so does a ``pipe:`` command, which has its
    own shell. Raises ``ValueError`` also for ``hf://`` without the name of a repository.
    """
    if is_on_hub(path):
        return str(hub_place(os.path.expandvars(path), what))
    if path.startswith("pipe:") or ("$" in path and os.path.lexists(path)):
        return path
    result = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{\w+\})", result)
    require(unset is None, what, path, f"variables that are set; {unset[0] if unset else ''} is not")
    lost = result.startswith("~") and not os.path.lexists(result)
    allowed = "the folder of a user that exists; where a name begins with ~, write ./~..."
    require(not lost, what, path, allowed)
    return result


MADE = (
    "output_dir",
    "cache.dest",
    "evaluation.reference",
    "distributed.nvme_path",
    "checkpoint.mirror",
)  # settings of output paths
SHARED = ("data", "experiments")  # folders of the checkout that an installed package has, too
BUNDLED = "data/fashion"  # images and trained models: nothing is written there


def roots() -> tuple[Path, Path]:
    """The folders of this program's own files: the checkout, and the place of an installed package."""
    return Path(__file__).parents[2], Path(sys.prefix, "share", "lit-transdiff")


def shipped(path: str) -> str:
    """The path of a shipped file from any working directory; existing paths are unchanged."""
    if not os.path.lexists(path) and path.split("/")[0] in SHARED:
        for root in roots():
            if (root / path).exists():
                return str(root / path)
    return path


def expand(config: Any, *names: str) -> None:
    """Expand the paths of a configuration in its ``__post_init__``, given their dotted names."""
    for name in names:
        field = name.rpartition(".")[2]
        value = getattr(config, field)

        def path_of(text: str, name: str = name) -> str:
            path = expanded(text, name)
            return path if name in MADE else shipped(path)

        if isinstance(value, str):
            object.__setattr__(config, field, path_of(value))
        elif isinstance(value, dict):
            object.__setattr__(config, field, {key: path_of(text) for key, text in value.items()})


def check_finite(config: Any, prefix: str = "") -> None:
    """Refuse NaN and infinite numbers in a configuration and its sections."""
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            check_finite(value, f"{name}.")
        items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        numbers = [item for item in items if isinstance(item, float)]
        require(all(map(math.isfinite, numbers)), name, value, "finite numbers")


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all class names are non-negative integers in ASCII digits."""
    return all(name.isascii() and name.isdecimal() for name in names)


def require_classes(what: str, names: Sequence[str], expected: Sequence[str], whose: str) -> None:
    """Raise ``ValueError`` unless the class names ``names`` equal ``expected``, which belong to ``whose``.

    If one side has numbers for names and the other words, or one has no names, only the number of classes is
    compared.
    """
    if list(names) == list(expected) or not names or not expected:
        return
    if len(names) == len(expected) and are_numbers(names) != are_numbers(expected):
        return
    only, missing = [n for n in names if n not in expected], [n for n in expected if n not in names]
    if len(names) != len(expected):
        more = f", with {some(only)}" if only else ""
        less = f", without {some(missing)}" if missing else ""
        got = f"{len(names)} classes{more}{less}"
        allowed = (
            f"the {len(expected)} of {whose}; an empty folder keeps the number of a class without images"
        )
    else:
        c = next(c for c, (one, other) in enumerate(zip(names, expected, strict=True)) if one != other)
        got = f"class {c} {names[c]!r}" + ("" if only else ", the same classes in another order")
        allowed = f"{expected[c]!r}, which is class {c} of {whose}; pack both from folders of the same names"
    raise ValueError(f"{what}: got {got}; allowed: {allowed}.")


def listed(items: Sequence[object], most: int = 10, between: str = ", ") -> str:
    """The first items, and the number of the others, for messages."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(map(str, items[:most])) + more


def some(names: Sequence[object]) -> str:
    """The first few names, for messages."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
