"""The entries of a comparison, their scores, and their judges: scores of different judges do not compare."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import EVALUATE, judged_by
from lit_transdiff.flow.solvers import steps_in_words
from lit_transdiff.study.records import Evaluation, Run
from lit_transdiff.study.repeats import Pooled, decided_by, pooled, repeats, seeds

FULL, ONLINE = "eval/", "online/"  # scores of ``evaluate``, and scores during training with fewer images
# settings of the evaluation
ONLINE_JUDGES = ("extractor", "reference", "online_images", "label_mode", "num_neighbours")


def metric_of(key: str) -> str | None:
    """The metric of a score ``eval/NAME``, ``eval/EXTRACTOR/NAME`` or ``online/NAME``, or None."""
    prefix = next((prefix for prefix in (FULL, ONLINE) if key.startswith(prefix)), None)
    name = key.removeprefix(prefix).rpartition("/")[2] if prefix else ""
    return name if name in METRICS else None


def extractor_of(key: str) -> str:
    """The extractor in the name of a score ``eval/EXTRACTOR/NAME``; empty for those of the main one."""
    return key.removeprefix(FULL).rpartition("/")[0] if key.startswith(FULL) else ""


def higher_is_better(key: str) -> bool:
    """Whether higher is better: for scores according to the table of metrics, for all else (losses) False."""
    name = metric_of(key)
    return name is not None and METRICS[name].higher_is_better


def title_of(key: str) -> str:
    """The title of a score in a table, or the name of another metric."""
    name = metric_of(key)
    if name is None:
        return key
    by = f" by {extractor_of(key)}" if extractor_of(key) else ""
    return METRICS[name].title + by + (", online" if key.startswith(ONLINE) else "")


@dataclass(frozen=True)
class Entry:
    """A run with the evaluation of its ``own`` settings, or another evaluation of it, with its ``repeats``.

    An evaluation with other settings is compared as a run that evaluates the same model with those settings.
    """

    run: Run
    repeats: list[Evaluation]  # the newest first
    own: bool = True

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the newest evaluation, or empty."""
        return self.repeats[0].manifest if self.repeats else {}

    @property
    def other(self) -> dict[str, Any]:
        """The sampling settings and number of images that differ from the run's own."""
        return {} if self.own else without_seed(self.run.differences(self.repeats[0]))

    @property
    def settings(self) -> dict[str, Any]:
        """The effective settings by dotted name."""
        return self.run.settings | self.other

    @property
    def stage(self) -> str:
        """The stage of the run; an evaluation with other settings counts as a stage of its own."""
        return self.run.stage if self.own else EVALUATE

    @property
    def identity(self) -> tuple[Any, ...]:
        """The properties beside settings that repeats share; without a known seed, also the model."""
        decided = decided_by(self.manifest) if self.repeats else {}
        if "seed" not in self.run.settings:
            return tuple(decided.items())
        others = {name: value for name, value in decided.items() if name not in ("model", "run")}
        return () if self.own else tuple(others.items())

    def scores(self) -> dict[str, Pooled]:
        """The scores ``eval/NAME`` over repeats; for the run itself also the last values of logged metrics.

        Logged scores count only if the run has no result files, which are more precise about their
        conditions.
        """
        logged = self.run.summary.items() if self.own else ()
        numbers = {key: Pooled(value, None, 1) for key, value in logged if isinstance(value, int | float)}
        found = {
            key: value
            for key, value in numbers.items()
            if not (key.startswith(FULL) and self.run.evaluations)
        }
        return found | {f"{FULL}{name}": score for name, score in pooled_scores(self.repeats).items()}

    def judge(self, key: str) -> tuple[Any, ...]:
        """The key of comparable values: the judge of a score, or the stage for another metric."""
        if key.startswith(ONLINE):
            return tuple(str(self.run.settings.get(f"evaluation.{name}")) for name in ONLINE_JUDGES)
        if not key.startswith(FULL):
            return (self.run.stage,)
        return judged_by(self.manifest, key.removeprefix(FULL)) if self.repeats else ("unknown",)

    def judge_in_words(self) -> str:
        """Judge, sampler, number of seeds, and the settings that are not the run's own, as text."""
        words = ", ".join(
            word for word in (judge_in_words(self.manifest), sampler_in_words(self.manifest)) if word
        )
        if (count := len({repr(evaluation.manifest.get("seed")) for evaluation in self.repeats})) > 1:
            words += f", mean of {count} seeds"
        other = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in self.other.items())
        return f"{words} (not the run's own: {other})" if other else words


def entries_of(run: Run) -> list[Entry]:
    """The run itself with the evaluation of its own settings, if any, then its other evaluations."""
    groups = repeats(run.evaluations)
    shown = run.evaluation
    own = run.repeats if shown is not None and not without_seed(run.differences(shown)) else []
    return [Entry(run, own), *(Entry(run, group, own=False) for group in groups if group != own)]


def without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation without its seed, in which repeats differ."""
    return {name: value for name, value in settings.items() if name != "evaluation.seed"}


def pooled_scores(repeats: Sequence[Evaluation]) -> dict[str, Pooled]:
    """All scores of an evaluation over its repeats."""
    names = dict.fromkeys(name for evaluation in repeats for name in evaluation.scores)
    found = {name: pooled(repeats, name) for name in names}
    return {name: score for name, score in found.items() if score is not None}


def default_metrics(there: Collection[str]) -> list[str]:
    """The available scores in the order of their table, and the losses; online scores only without others."""
    extractors = sorted({extractor_of(key) for key in there if metric_of(key)})  # the main one, "", is first
    prefixes = [*(f"{FULL}{name}/" if name else FULL for name in extractors), ONLINE]
    scores = [f"{prefix}{name}" for prefix in prefixes for name in METRICS if f"{prefix}{name}" in there]
    full = [key for key in scores if key.startswith(FULL)]
    return (full or scores) + [name for name in ("val/loss", "train/loss") if name in there]


def judge_in_words(manifest: Mapping[str, Any]) -> str:
    """Extractor, reference, number and selection of images, as text."""
    reference = Path(manifest["reference"]).stem if manifest.get("reference") else None
    images = f"{manifest['num_images']:,} images" if manifest.get("num_images") else None
    words = (manifest.get("extractor"), reference, images, manifest.get("label_mode"))
    return ", ".join(str(word) for word in words if word)


def sampler_in_words(manifest: Mapping[str, Any]) -> str:
    """Solver, steps and guidance of a manifest as text; interval and scales only if not the defaults."""
    sampling = manifest.get("sampling") or {}
    if not all(name in sampling for name in ("solver", "num_steps", "guidance_scale")):
        return ""
    steps = steps_in_words(sampling).removesuffix(" steps")
    guidance = "/".join(f"{s:g}" for s in sampling.get("reference_guidance") or [sampling["guidance_scale"]])
    low, high = sampling.get("guidance_interval") or (0, 1)
    interval = "" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]"
    scales = sampling.get("drift_scale", 1), sampling.get("noise_scale", 1)
    parts = f", {sampling['num_parts']} parts" if sampling.get("num_parts") else ""
    if (by_part := sampling.get("part_guidance", "constant")) != "constant":
        parts += f", {by_part} over parts"
    scaled = "" if scales == (1, 1) else ", scales {:g} {:g}".format(*scales)
    return f"{sampling['solver']} {steps} x {guidance}{interval}{scaled}{parts}"


def evaluation_in_words(group: Sequence[Evaluation]) -> str:
    """Sampler, judge, weights and seeds, which distinguish an evaluation from others of its run."""
    manifest = group[0].manifest
    parts = {
        "": ", ".join(filter(None, (sampler_in_words(manifest), judge_in_words(manifest)))),
        "of ": Path(manifest["checkpoint"]).name if manifest.get("checkpoint") else None,
        "step ": (manifest.get("training") or {}).get("step"),
        "seed " if len(group) == 1 else "seeds ": seeds(group),
    }
    return ", ".join(f"{word}{part}" for word, part in parts.items() if part not in (None, "", "?"))
