"""Reading results of evaluations: their folder, their numbers, and which of them are comparable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "evaluations"  # in a run folder
EVALUATE = "evaluate"  # the stage of a run that scores a trained model
JUDGED_BY = (
    "extractor",
    "extractor_fingerprint",
    "reference_hash",
    "num_images",
    "label_mode",
    "num_neighbours",
)
# The part of a manifest that affects the scores; the rest (date, speed, paths) may differ between equal ones.
DECIDING = (
    *JUDGED_BY,
    "run",
    "weights_fingerprint",
    "scored_reference",
    "sampling",
    "precision",
    "seed",
    "metrics",
    "inception_score_part",
)
# The part that earlier results do not have; unset, it does not affect the names of results.
DECIDING_IF_SET = ("extractors", "real_images_hash")

RATIO = "ratio"  # in the names of scores relative to those of other real images
NO_SPREAD = 1e-9  # relative to the value; a smaller spread counts as none
Score = float | dict[str, float]  # a number, or mean and std


def value(score: Score) -> float:
    """A score as a single number: the number itself or the mean."""
    return score["mean"] if isinstance(score, Mapping) else score


def measured_std(score: Score) -> float | None:
    """The standard deviation over a score's splits; None for a single split or equal values."""
    std = score.get("std", math.nan) if isinstance(score, Mapping) else math.nan
    return std if math.isfinite(std) and std > NO_SPREAD * abs(value(score)) else None


def score_in_words(score: Score) -> str:
    """A score as text with all digits, and its spread if it was measured."""
    std = measured_std(score)
    return f"{value(score)}" + ("" if std is None else f" ± {std:.2g}")


def judged_by(manifest: Mapping[str, Any], score: str = "") -> tuple[Any, ...]:
    """The conditions that two results must share for comparable values of a score, by its name.

    Scores of further extractors are named EXTRACTOR/METRIC; those with RATIO in their names are relative to
    other real images, and a mean is over all extractors.
    """
    extractor, _, metric = score.rpartition("/")
    further = (manifest.get("extractors") or {}).get(extractor, {})
    known = {**manifest, **further, **({"extractor": extractor} if extractor else {})}
    more = [manifest.get("real_images_hash")] if RATIO in metric else []
    more += [repr(manifest.get("extractors"))] if metric.startswith("mean_") else []
    return (*(known.get(name) for name in JUDGED_BY), *more)


def nearest_file(result: Path) -> Path:
    """The picture of samples beside their nearest training images, beside a result file."""
    return result.with_name(f"{result.stem}-nearest.png")


def result_files(folder: str | Path) -> list[Path]:
    """All result files at or below ``folder``, sorted. Raises ``FileNotFoundError`` if there is none."""
    if not Path(folder).exists():
        raise FileNotFoundError(f"{folder} does not exist. Name a folder of runs.")
    files = sorted(file for file in Path(folder).rglob("*.json") if file.parent.name == FOLDER)
    if not files:
        raise FileNotFoundError(f"{folder} contains no result ({FOLDER}/*.json): run evaluate first.")
    return files
