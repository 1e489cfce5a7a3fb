"""What a run scored, by which evaluation, and who judged it: values of different judges do not compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import judged_by
from lit_transdiff.study.records import Evaluation, Run

FULL, ONLINE = "eval/", "online/"  # scores of ``evaluate``, and scores while training, of fewer images
ONLINE_JUDGES = ("extractor", "reference", "online_images", "label_mode", "num_neighbours")  # settings of the evaluation


def metric_of(key: str) -> str | None:
    """The metric that ``eval/NAME`` or ``online/NAME`` is a score of; nothing for other keys."""
    prefix = next((prefix for prefix in (FULL, ONLINE) if key.startswith(prefix)), None)
    name = key.removeprefix(prefix) if prefix else ""
    return name if name in METRICS else None


def higher_is_better(key: str) -> bool:
    """From the table of metrics for scores; everything else is a loss."""
    name = metric_of(key)
    return name is not None and METRICS[name].higher_is_better


def title_of(key: str) -> str:
    """The name of a score in a table; other metrics by their own."""
    name = metric_of(key)
    return key if name is None else METRICS[name].title + (", online" if key.startswith(ONLINE) else "")


def scores_of(run: Run) -> dict[str, float]:
    """``eval/NAME`` of the run's evaluation, beside the last value of every logged metric."""
    scores = {f"{FULL}{name}": run.evaluation.value(name) for name in run.evaluation.scores} if run.evaluation else {}
    return {**{key: value for key, value in run.summary.items() if isinstance(value, int | float)}, **scores}


def default_metrics(runs: Sequence[Run]) -> list[str]:
    """The scores that any run has, in the order of the table of metrics, and the losses; online scores only where no other is."""
    found = dict.fromkeys(name for run in runs for name in scores_of(run))
    scores = [f"{prefix}{name}" for prefix in (FULL, ONLINE) for name in METRICS if f"{prefix}{name}" in found]
    full = [key for key in scores if key.startswith(FULL)]
    return (full or scores) + [name for name in ("val/loss", "train/loss") if name in found]


def judge_of(run: Run, key: str) -> tuple[Any, ...]:
    """What two runs must share for their values of ``key`` to compare: of a score its judge, of anything else the stage."""
    if key.startswith(ONLINE):
        return tuple(str(run.settings.get(f"evaluation.{name}")) for name in ONLINE_JUDGES)
    if not key.startswith(FULL):
        return (run.stage,)
    if run.evaluation is None:
        return ("unknown",)
    other = {name: value for name, value in run.differences(run.evaluation).items() if name != "evaluation.seed"}
    return (*judged_by(run.evaluation.manifest), *(f"{name} {value}" for name, value in other.items()))


def judge_in_words(run: Run) -> str:
    """Extractor, reference, images and sampler of the run's evaluation, and which of its settings are not the run's own."""
    if run.evaluation is None:
        return ""
    manifest = run.evaluation.manifest
    reference = Path(manifest["reference"]).stem if manifest.get("reference") else None
    images = f"{manifest['num_images']:,} images" if "num_images" in manifest else None
    words = ", ".join(word for word in (manifest.get("extractor"), reference, images, sampler(run.evaluation)) if word)
    other = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in run.differences(run.evaluation).items())
    return f"{words} (the newest; not the run's own: {other})" if other else words


def sampler(evaluation: Evaluation) -> str:
    """Solver, steps and guidance, where the manifest says them."""
    sampling = evaluation.manifest.get("sampling") or {}
    names = ("solver", "num_steps", "guidance_scale")
    return "{} {} x {:g}".format(*(sampling[name] for name in names)) if all(name in sampling for name in names) else ""
