"""Repeats: evaluations that differ only in their seed, combined to one with mean and spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev  # exact: the spread of equal values is 0
from typing import Any, Protocol, TypeVar

from lit_transdiff.evaluation.scores import DECIDING, Score, measured_std, value


class Result(Protocol):
    """An evaluation of any source."""

    @property
    def scores(self) -> dict[str, Any]: ...

    @property
    def manifest(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Pooled:
    """A score over repeats: mean, standard deviation (of a single repeat: over splits, if any), number."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.std is None else f" ± {self.std:.2g}")


def repeats(results: Sequence[R]) -> list[list[R]]:
    """Group the results that differ only in their seeds, the newest of each group first."""
    groups: dict[tuple[str, ...], list[R]] = {}
    for result in results:
        groups.setdefault(tuple(decided_by(result.manifest).values()), []).append(result)
    return [
        sorted(group, key=lambda result: str(result.manifest.get("date", "")), reverse=True)
        for group in groups.values()
    ]


def decided_by(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The part of a manifest that repeats share: all conditions of a score except the seed."""
    model = manifest.get("weights_fingerprint") or manifest.get("checkpoint")
    shared = (name for name in DECIDING if name not in ("seed", "metrics", "weights_fingerprint"))
    return {"model": str(model), **{name: repr(manifest.get(name)) for name in shared}}


def pooled(group: Sequence[Result], name: str) -> Pooled | None:
    """A score over repeats, each seed once (a seed always gives the same images); None if no one has it."""
    by_seed: dict[str, Score] = {}
    for result in group:
        if name in result.scores:
            by_seed.setdefault(str(result.manifest.get("seed")), result.scores[name])
    if len(by_seed) == 1:
        (score,) = by_seed.values()
        return Pooled(value(score), measured_std(score), 1)
    return over([value(score) for score in by_seed.values()])


def over(values: Sequence[float]) -> Pooled | None:
    """Pool values over seeds: NaN if any is not finite, no spread for a single value, None for no value."""
    if not values or not all(map(math.isfinite, values)):
        return Pooled(math.nan, None, len(values)) if values else None
    return Pooled(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def seeds(group: Sequence[Result]) -> str:
    """The seeds of repeats as text."""
    found = sorted({result.manifest.get("seed") for result in group}, key=lambda seed: (seed is None, seed))
    return ", ".join("?" if seed is None else str(seed) for seed in found)
