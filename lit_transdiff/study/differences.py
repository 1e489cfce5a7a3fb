"""Differences between results in words, each with the interval that the choice of images leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_transdiff.evaluation.scores import value
from lit_transdiff.study.records import Evaluation
from lit_transdiff.study.scored import FULL, Entry, title_of

NORMAL = 1.96  # standard errors on both sides hold 95 %
MOST_COMPARED = 5  # entries that are compared with the first
HOW = "These are 95 % intervals over the images that were drawn; they do not cover other seeds of training."


def gaps_in_words(entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
    """What each of a few entries differs in from the first, in the scores ``keys`` whose standard errors both know.

    Of entries of several seeds the spread says more; they are left out.
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
    """``recall +0.12 ± 0.03``, or above which size there is none; nothing without errors or a common judge."""
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
    """Of a score; NaN where the result has none, as those of earlier versions."""
    errors = result.manifest.get("standard_errors")
    error = errors.get(name) if isinstance(errors, dict) and name in result.scores else None
    return float(error) if isinstance(error, int | float) else math.nan
