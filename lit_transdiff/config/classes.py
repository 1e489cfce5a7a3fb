"""Class names: choosing classes by text, and matching the classes of two models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from lit_transdiff.config import require

FEW = 12  # number of names that a message lists
ClassRows = list[int | None]  # for each class of a model the corresponding class of another model, or None


def full_names(names: Sequence[str], count: int) -> list[str]:
    """A name for each of ``count`` classes, by default its number."""
    return [names[c] if c < len(names) else str(c) for c in range(count)]


def choose_classes(text: str | None, names: Sequence[str], what: str = "--classes") -> list[int]:
    """The classes that a text names (``sneaker,ankle boot``, ``0,7``, ``0-3``), each once; by default ten.

    A name may contain commas. Raises ``ValueError`` for unknown classes; ``what`` names the option for the
    message.
    """
    if text is None:
        return list(range(min(10, len(names))))
    parts, chosen, i = text.split(","), [], 0
    while i < len(parts):
        ends = range(len(parts), i, -1)
        end = next((end for end in ends if found_by_name(",".join(parts[i:end]), names)), i + 1)
        chosen += classes_of(",".join(parts[i:end]).strip(), names, what)
        i = end
    return list(dict.fromkeys(chosen))


def classes_of(word: str, names: Sequence[str], what: str) -> list[int]:
    """The class of a name or a number, or those of a range of numbers."""
    first, _, last = word.partition("-")
    if re.fullmatch("[0-9]{1,9}-[0-9]{1,9}", word) and not found_by_name(word, names):
        require(int(first) <= int(last) < len(names), what, word, allowed(names, word))
        return list(range(int(first), int(last) + 1))
    return [class_of(word, names, what)]


def class_of(word: str, names: Sequence[str], what: str) -> int:
    """The class of a name (case-insensitive if unique) or a number; ``#3`` is always a number."""
    number = int(word.removeprefix("#")) if re.fullmatch("#?[0-9]{1,9}", word) else len(names)
    matches = set() if word.startswith("#") and number < len(names) else set(found_by_name(word, names))
    matches |= {number} & set(range(len(names)))
    require(len(matches) > 0, what, word, allowed(names, word))
    ways = " or ".join(f"#{c} (class {names[c]})" for c in sorted(matches))
    require(len(matches) == 1, what, word, f"{ways}; the word stands for each")
    return matches.pop()


def found_by_name(word: str, names: Sequence[str]) -> list[int]:
    """The classes with exactly this name or, if there are none, those that differ only in case."""
    exact = [c for c, name in enumerate(names) if name == word.strip()]
    return exact or [c for c, name in enumerate(names) if name.casefold() == word.strip().casefold()]


def allowed(names: Sequence[str], word: str) -> str:
    """A text of the allowed classes, with the nearest match."""
    listed = ", ".join(names[:FEW]) + (", ..." if len(names) > FEW else "")
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    nearest = f"; did you mean {folded[close[0]]}?" if close else ""
    return f"numbers 0 to {len(names) - 1}, ranges of them as 0-3, and names of classes: {listed}{nearest}"


def embedding_rows(
    how: str | Mapping[str, str | None], names: Sequence[str], old: Sequence[str]
) -> ClassRows:
    """The class of ``old`` that provides the embedding of each class of ``names``, or None.

    Raises ``ValueError`` if the classes are not the ``same``, and for an unknown class in a map.
    """
    if isinstance(how, str):
        ways: dict[str, Callable[[], ClassRows]] = {
            "new": lambda: [None] * len(names),
            "by_name": lambda: [old.index(name) if name in old else None for name in names],
            "by_number": lambda: [c if c < len(old) else None for c in range(len(names))],
            "same": lambda: same(names, old),
        }
        return ways[how]()
    rows: ClassRows = [None] * len(names)
    for name, other in how.items():
        c = class_of(name, names, "init_classes: class of this run")
        rows[c] = None if other is None else class_of(other, old, f"init_classes: {name}: class of init_from")
    return rows


def same(names: Sequence[str], old: Sequence[str]) -> ClassRows:
    """Identical classes. Raises ``ValueError`` for other classes, with the settings that allow them."""
    unnamed = any(all(name == str(c) for c, name in enumerate(known)) for known in (names, old))
    if len(names) == len(old) and (unnamed or list(names) == list(old)):
        return list(range(len(names)))
    pairs = enumerate(zip_longest(names, old))
    differ, pair = next((c, pair) for c, pair in pairs if pair[0] != pair[1])
    counts = zip((len(names), len(old)), pair, strict=True)
    here, there = (f"{count} classes, class {differ} is {name or 'none'}" for count, name in counts)
    ways = (
        "init_classes=new (all class embeddings are made anew; all else is kept), init_classes=by_name "
        "(those of equal names are kept), init_classes=by_number, or init_classes={new name: old name}"
    )
    allowed = f"for the same classes only, but {here} here, and {there} there; for others: {ways}"
    raise ValueError(f"init_classes: got 'same'; allowed: {allowed}.")
