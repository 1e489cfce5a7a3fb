"""Differences between results as text, with confidence intervals over the sampled images, and warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_transdiff.base.student import CONFIDENCE, student
from lit_transdiff.evaluation.groups import jackknife_error, mean_error
from lit_transdiff.evaluation.scores import value
from lit_transdiff.study.records import Evaluation
from lit_transdiff.study.scored import FULL, Entry, extractor_of, higher_is_better, metric_of, title_of
from lit_transdiff.study.verdicts import NO_DIFFERENCE, in_words, word_for

MOST_COMPARED = 5  # the most entries to compare with the first
MANY = 1000  # degrees of freedom of an error without groups: a normal distribution
HOW = "These are 95 % intervals over the sampled images of these checkpoints, not over other training seeds."
# The conditions under which image i of two results has the same label, noise and group.
PAIRED_BY = ("num_images", "label_mode", "seed", "images_of_a_class", "groups")


@dataclass(frozen=True)
class Gap:
    """A difference of a score with the half width of its interval, and whether a higher score is better."""

    size: float
    half: float
    higher: bool
    parts: int = 0  # disjoint parts of the images of which this is the mean, which the whole need not share

    @property
    def word(self) -> str:
        """BETTER, WORSE or NO_DIFFERENCE."""
        return word_for(self.size, self.half, self.higher)

    def __str__(self) -> str:
        told = in_words(self.word, self.size, self.half)
        return f"{told} (mean of {self.parts} parts of the images)" if self.parts else told


def notes_on_scores(entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
    """The differences of the entries from the first, and warnings about their scores."""
    return gaps_in_words(entries, keys) + below_real(entries, keys)


def gaps_in_words(entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
    """The differences of a few entries from the first in those scores ``keys`` that have uncertainties.

    The intervals hold for all of these entries at once. Entries of several seeds are left out, because their
    spread is more informative.
    """
    single = [entry for entry in entries if len(entry.repeats) == 1]
    if not 1 < len(single) <= MOST_COMPARED:
        return []
    first, *others = single
    told = []
    for other in others:
        gaps = {key: gap_of(first, other, key, 1 - (1 - CONFIDENCE) / len(others)) for key in keys}
        found = {key: gap for key, gap in gaps.items() if gap is not None}
        words = ", ".join(f"{title_of(key)} {gap}" for key, gap in found.items())
        told += [f"{other.run.name} against {first.run.name}: {words}."] if found else []
        told += disagreements(other.run.name, first.run.name, found)
    return [*told, HOW] if told else []


def gap_of(first: Entry, other: Entry, key: str, confidence: float = CONFIDENCE) -> Gap | None:
    """The difference of ``other`` from ``first`` in a score; None without uncertainties or a common judge.

    Results of the same labels and noise are compared image by image: the values without each group of images,
    or on disjoint parts of them, are subtracted before their spread is measured.
    """
    name = key.removeprefix(FULL)
    if first.judge(key) != other.judge(key):
        return None
    pair = first.repeats[0], other.repeats[0]
    if not all(name in one.scores for one in pair):
        return None
    sizes = [value(one.scores[name]) for one in pair]
    size, half = sizes[1] - sizes[0], math.nan
    paired = all(pair[0].manifest.get(by) == pair[1].manifest.get(by) for by in PAIRED_BY)
    without, parts = (
        paired_values(pair, kind, name) if paired else None for kind in ("without_group", "parts")
    )
    count = 0
    if without is not None:
        half = student(len(without) - 1, confidence) * jackknife_error(without)
    elif parts is not None:
        size, count = float(parts.mean()), len(parts)
        half = student(count - 1, confidence) * mean_error(parts)
    else:
        half = student(MANY, confidence) * math.hypot(*(standard_error(one, name) for one in pair))
    return Gap(size, half, higher_is_better(key), count) if math.isfinite(half) else None


def paired_values(pair: Sequence[Evaluation], kind: str, name: str) -> torch.Tensor | None:
    """The differences of the values by group (or by part) of two results; None if one has none."""
    first, other = ((one.manifest.get(kind) or {}).get(name) for one in pair)
    if not isinstance(first, list) or not isinstance(other, list) or not 1 < len(first) == len(other):
        return None
    return torch.tensor(other, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)


def standard_error(result: Evaluation, name: str) -> float:
    """The standard error of a score; NaN if the result has none, as in earlier versions."""
    errors = result.manifest.get("standard_errors")
    error = errors.get(name) if isinstance(errors, dict) and name in result.scores else None
    return float(error) if isinstance(error, int | float) else math.nan


def disagreements(other: str, first: str, gaps: dict[str, Gap]) -> list[str]:
    """A warning for every metric by which one extractor calls a result better and another worse."""
    told = []
    for metric in dict.fromkeys(metric_of(key) for key in gaps):
        words = {extractor_of(key): gap.word for key, gap in gaps.items() if metric_of(key) == metric}
        words = {name: word for name, word in words.items() if word != NO_DIFFERENCE}
        if len(set(words.values())) > 1:
            by = ", ".join(f"{word} by {name or 'the main extractor'}" for name, word in words.items())
            told.append(f"Representations disagree about {other} against {first}: {metric} is {by}.")
    return told


def below_real(entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
    """A warning for every distance that is smaller than that of as many real images."""
    told = []
    for entry in entries:
        for key in keys:
            name = key.removeprefix(FULL)
            result = entry.repeats[0] if entry.repeats else None
            if result is None or name not in result.scores or higher_is_better(key):
                continue
            real = (result.manifest.get("real_scores") or {}).get(name)
            if real is not None and value(result.scores[name]) < value(real):
                told.append(
                    f"{entry.run.name}: {title_of(key)} {value(result.scores[name]):.3g} is below the "
                    f"{value(real):.3g} of real images: the model was tuned on this score, or has copies."
                )
    return told
