"""Differences between results as text, with confidence intervals over the sampled images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_transdiff.evaluation.scores import value
from lit_transdiff.study.records import Evaluation
from lit_transdiff.study.scored import FULL, Entry, title_of

NORMAL = 1.96  # standard errors on each side of a 95 % interval
MOST_COMPARED = 5  # the most entries to compare with the first
HOW = "These are 95 % intervals over the sampled images; they do not cover other training seeds."


def gaps_in_words(entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
    """The differences of a few entries from the first in those scores ``keys`` that have standard errors.

    Entries of several seeds are left out, because their spread is more informative.
    """
    single = [entry for entry in entries if len(entry.repeats) == 1]
    if not 1 < len(single) <= MOST_COMPARED:
        return []
    first, *others = single
    told = []
    for other in others:
        found = [text for key in keys if (text := gap_in_words(first, other, key))]
        told += [f"{other.run.name} against {first.run.name}: {', '.join(found)}."] if found else []
    return [*told, HOW] if told else []


def gap_in_words(first: Entry, other: Entry, key: str) -> str | None:
    """``recall +0.12 ± 0.03``, or a bound on the difference; None without errors or a common judge."""
    name = key.removeprefix(FULL)
    errors = [standard_error(entry.repeats[0], name) for entry in (first, other)]
    if first.judge(key) != other.judge(key) or not all(map(math.isfinite, errors)):
        return None
    gap = value(other.repeats[0].scores[name]) - value(first.repeats[0].scores[name])
    size = NORMAL * math.hypot(*errors)
    if abs(gap) <= size:
        return f"{title_of(key)} no difference above {abs(gap) + size:.2g}"
    return f"{title_of(key)} {gap:+.2g} ± {size:.2g}"


def standard_error(result: Evaluation, name: str) -> float:
    """The standard error of a score; NaN if the result has none, as in earlier versions."""
    errors = result.manifest.get("standard_errors")
    error = errors.get(name) if isinstance(errors, dict) and name in result.scores else None
    return float(error) if isinstance(error, int | float) else math.nan
