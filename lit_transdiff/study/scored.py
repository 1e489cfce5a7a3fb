"""What a run scored, by which evaluation, and who judged it: values of different judges do not compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import judged_by
from lit_transdiff.study.records import Evaluation, Run
from lit_transdiff.study.repeats import Pooled, pooled, seeds

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
    """``eval/NAME`` of the run's evaluation, the mean over its repeats, beside the last value of every logged metric."""
    scores = {f"{FULL}{name}": score.mean for name, score in pooled_scores(run.repeats).items()}
    return {**{key: value for key, value in run.summary.items() if isinstance(value, int | float)}, **scores}


def pooled_scores(repeats: Sequence[Evaluation]) -> dict[str, Pooled]:
    """Every score of an evaluation over its repeats."""
    names = dict.fromkeys(name for evaluation in repeats for name in evaluation.scores)
    found = {name: pooled(repeats, name) for name in names}
    return {name: score for name, score in found.items() if score is not None}


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
    if (count := len({repr(evaluation.manifest.get("seed")) for evaluation in run.repeats})) > 1:
        words += f", mean of {count} seeds"
    other = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in run.differences(run.evaluation).items())
    return f"{words} (the newest; not the run's own: {other})" if other else words


def sampler(evaluation: Evaluation) -> str:
    """Solver, steps and guidance, where the manifest says them; interval and scales where they are not the plain ones."""
    sampling = evaluation.manifest.get("sampling") or {}
    names = ("solver", "num_steps", "guidance_scale")
    if not all(name in sampling for name in names):
        return ""
    plain: dict[str, tuple[Any, ...]] = {
        "guidance_interval": ([0, 1], (0, 1)),
        "reference_guidance": (None, [], ()),
        "reference_steps": (None, [], ()),
        "drift_scale": (1,),
        "noise_scale": (1,),
    }
    others = {name.replace("_", " "): sampling[name] for name in plain if name in sampling and sampling[name] not in plain[name]}
    words = "{} {} x {:g}".format(*(sampling[name] for name in names))
    return ", ".join([words, *(f"{name} {value}" for name, value in others.items())])


def evaluation_in_words(group: Sequence[Evaluation]) -> str:
    """What tells an evaluation, or its repeats, from the others of its run: sampler, images, judge, weights and seeds."""
    manifest = group[0].manifest
    training = manifest.get("training") or {}
    parts = {
        "": sampler(group[0]),
        "images ": f"{manifest['num_images']:,}" if "num_images" in manifest else None,
        "by ": manifest.get("extractor"),
        "against ": Path(manifest["reference"]).stem if manifest.get("reference") else None,
        "of ": Path(manifest["checkpoint"]).name if manifest.get("checkpoint") else None,
        "step ": training.get("step"),
        "seed " if len(group) == 1 else "seeds ": seeds(group),
    }
    return ", ".join(f"{word}{part}" for word, part in parts.items() if part not in (None, "", "?"))
