"""Pipelines: shared preparation, then runs that are trained, sampled and scored, then a comparison.

The preparation makes the autoencoder, the classifier, the caches and the reference statistics. Completed
steps are skipped, so the same command continues where it was stopped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lit_transdiff.checkpoints.run_folder import open_folder
from lit_transdiff.config import RunConfig, errors_at, expand, expanded, require, require_classes
from lit_transdiff.config.loading import (
    check_keys,
    load_run,
    of_environment,
    plain_settings,
    read_yaml,
    resolved,
    to_yaml,
)
from lit_transdiff.config.paths import results_folder
from lit_transdiff.config.targets import below
from lit_transdiff.config.typed import typed
from lit_transdiff.data.index import read_index
from lit_transdiff.distributed import world_size
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.metrics import check_evaluation
from lit_transdiff.evaluation.prepare import cache, check_statistics, statistics
from lit_transdiff.sampling.draw import draw_samples
from lit_transdiff.sampling.generator import Generator, load_generator
from lit_transdiff.stages import PREPARATORY, STAGES
from lit_transdiff.study.table import check_output, write_comparison
from lit_transdiff.tracking.evaluations import evaluation_run, log_evaluation, log_own_scores
from lit_transdiff.tracking.place import placed, trial_place
from lit_transdiff.tracking.wandb_run import check_mode
from lit_transdiff.training.build import build_data, outline
from lit_transdiff.training.mirroring import mirror_results
from lit_transdiff.training.trainer import train


@dataclass(frozen=True)
class CacheStep:
    """Image shards whose latents are cached with the autoencoder of the first run of the three stages."""

    source: str
    dest: str  # below the pipeline's output_dir
    flips: bool = False

    def __post_init__(self) -> None:
        expand(self, "cache.source", "cache.dest")


@dataclass(frozen=True)
class RunStep:
    """A recipe (path relative to the pipeline's file) with its own overrides."""

    recipe: str
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pipeline:
    """The steps of ``lit-transdiff run``, all with ``output_dir`` as their folder."""

    output_dir: str
    runs: list[RunStep]
    cache: list[CacheStep] = field(default_factory=list)
    reference_images: str | None = None  # image shards for the reference statistics of the evaluations
    samples_per_class: int = 8
    overrides: list[str] = field(default_factory=list)  # for all runs

    def __post_init__(self) -> None:
        expand(self, "output_dir", "reference_images")
        for i, step in enumerate(self.cache):
            below(Path(self.output_dir), step.dest, f"cache[{i}].dest")


STEPS: dict[str, type[RunStep] | type[CacheStep]] = {"runs": RunStep, "cache": CacheStep}
PATH_SETTINGS = ("output_dir", "cache", "reference_images")  # settings that may contain ${output_dir}


def load_pipeline(
    path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> tuple[Pipeline, list[RunConfig]]:
    """Read a pipeline and all its runs, and check every setting before anything starts.

    ``overrides`` and ``imports`` apply to all runs. ``output_dir`` also moves the pipeline's own files, whose
    paths may begin with ``${output_dir}``.
    """
    moved = [item.split("=", 1)[1] for item in overrides if item.startswith("output_dir=")]
    pipeline = read_pipeline(path, moved)
    common = [*pipeline.overrides, *overrides, f"output_dir={pipeline.output_dir}"]
    runs = []
    for step in pipeline.runs:
        recipe = Path(path).parent / expanded(step.recipe, f"{path}: recipe")
        runs.append(load_run(recipe, [*step.overrides, *common], imports))
    names = [run.name for run in runs]
    require(len(set(names)) == len(names), "runs", names, "runs of different names")
    allowed = f"at least one run of {', '.join(STAGES)}"
    require(any(run.stage not in PREPARATORY for run in runs), "runs", names, allowed)
    for run in runs:
        check_evaluation(run.evaluation, scores=run.stage in STAGES)
    return pipeline, runs


def read_pipeline(path: str | Path, moved: Sequence[str]) -> Pipeline:
    """Read the pipeline of a YAML file; the last of ``moved``, if any, replaces its ``output_dir``."""
    given = of_environment(read_yaml(path))
    if "stage" in given:
        raise ValueError(f"{path} is the recipe of one run; start it with: lit-transdiff train {path}")
    check_keys(given, Pipeline, "", str(path))
    for name, schema in STEPS.items():
        steps = plain_settings(given).get(name)
        for i, step in enumerate(steps if isinstance(steps, list) else []):
            check_keys(step, schema, f"{name}[{i}].", str(path))
    given["output_dir"] = moved[-1] if moved else given.get("output_dir", "runs")
    with errors_at(path):
        # Only the paths are resolved here: references in the overrides are to settings of the runs.
        settings = plain_settings(given) | resolved(given, [name for name in PATH_SETTINGS if name in given])
        pipeline = typed(settings, Pipeline, "")
    assert isinstance(pipeline, Pipeline)
    require(len(pipeline.runs) > 0, "runs", pipeline.runs, "at least one recipe")
    return pipeline


def run_pipeline(pipeline: Pipeline, runs: list[RunConfig], fabric: Fabric) -> None:
    """Do all steps that are not complete yet."""
    for run in runs:
        wanted = world_size(run)
        allowed = f"the {fabric.world_size} that this command runs in (torchrun starts several)"
        require(wanted == fabric.world_size, f"{run.name}: distributed: processes", wanted, allowed)
    check_images(pipeline, runs)
    start = time.monotonic()
    root = Path(pipeline.output_dir)
    check_output(root)

    def announce(text: str) -> None:
        if fabric.is_global_zero:
            print(f"\n[{time.monotonic() - start:5.0f} s] {text}")

    for run in [run for run in runs if run.stage in PREPARATORY]:
        announce(f"train       {run.name}")
        train(run)
    stages = [run for run in runs if run.stage not in PREPARATORY]
    for step in pipeline.cache:
        announce(f"cache       {step.source} -> {root / step.dest}")
        own, data = stages[0].autoencoder, stages[0].data
        cache(step.source, root / step.dest, autoencoder=own, data=data, fabric=fabric, flips=step.flips)
    if pipeline.reference_images is not None:
        announce(f"reference   {pipeline.reference_images} -> {stages[0].evaluation.reference}")
        prepare_reference(pipeline.reference_images, stages[0], fabric)
    for run in stages:
        announce(f"train       {run.name}")
        train(run)
        announce(f"evaluate    {run.name}")
        sample_and_score(run, pipeline.samples_per_class, fabric)
    if fabric.is_global_zero:
        announce(f"compare     {root}")
        print(write_comparison(root, root))
        print(farewell(root, stages[-1]))


def check_images(pipeline: Pipeline, runs: Sequence[RunConfig]) -> None:
    """Refuse images that do not fit a run, including those whose latents are cached for it later."""
    sources = {str(Path(pipeline.output_dir) / step.dest): step.source for step in pipeline.cache}
    for run in runs:
        data = run.data
        if data.train in sources:
            data = replace(data, train=sources[data.train], evaluation=sources.get(data.evaluation or ""))
        elif run.stage in STAGES:
            continue  # the run itself checks existing data
        with errors_at(run.name):
            images = build_data(replace(run, data=data))
            source = pipeline.reference_images
            if run.stage in STAGES and source is not None and Path(source).suffix != ".npz":
                names = read_index(source).class_names
                require_classes("reference_images", names, images.class_names, "data.train")


def farewell(root: Path, last: RunConfig) -> str:
    """The closing lines: where the pictures are, and commands to try next."""
    module = Path(sys.argv[0]).name == "__main__.py"  # started by python -m lit_transdiff
    started = os.path.relpath(sys.executable if module else sys.argv[0]) + " -m lit_transdiff" * module
    command = "lit-transdiff" if shutil.which("lit-transdiff") else started
    trained = f"--checkpoint {shlex.quote(str(last.folder))}"
    pair = f"0,{last.model.num_classes - 1}" if last.model.num_classes > 1 else "0"
    commands = [
        f"{command} sample {trained} --classes {pair} --per-class 8 --seed 1",
        # needs two classes
        *([f"{command} sample {trained} --classes {pair} --fuse halves"] if "," in pair else []),
        f"{command} evaluate {trained} sampling.solver=heun sampling.num_steps=10",
        f"{command} compare {shlex.quote(str(root))}",
    ]
    grid = last.folder / "samples" / "final" / "grid.png"
    pictures = [f"{root / 'comparison.png'}  (the stages side by side)", str(grid)]
    gap = "\n" + " " * len("Try next:  ")
    return f"Pictures:  {gap.join(pictures)}\nTry next:  {gap.join(commands)}"


def prepare_reference(source: str, run: RunConfig, fabric: Fabric) -> None:
    """Compute the reference statistics of a run's evaluations, or check existing ones."""
    settings = run.evaluation
    if settings.reference is None:
        raise ValueError("reference_images: the runs do not set evaluation.reference, the statistics file.")
    if fabric.is_global_zero:
        extractor = load_extractor(settings.extractor, settings.extractor_weights, fabric.device)
        make = check_statistics if Path(settings.reference).exists() else statistics
        make(source, settings.reference, data=run.data, extractor=extractor)
    fabric.barrier()


def sample_and_score(run: RunConfig, per_class: int, fabric: Fabric) -> dict[str, Any]:
    """Sample and score a trained run, unless done; an MRAR run also gets a grid of successive images."""
    generator = load_generator(run.folder, fabric.device)
    classes = list(range(min(run.model.num_classes, 10)))
    folder = run.folder / "samples" / "final"
    grid, export = folder / "grid.png", run.folder / "export" / "export.json"
    is_drawn = grid.exists() and grid.stat().st_mtime >= export.stat().st_mtime
    if fabric.is_global_zero and not is_drawn:
        draw_samples(generator, classes, per_class, folder)
        if run.model.num_references > 1:
            draw_samples(generator, classes, 1, folder.with_name("references"), references=True)
    return score_own(run, generator, fabric)


def score_own(run: RunConfig, generator: Generator, fabric: Fabric) -> dict[str, Any]:
    """Score a trained run with its own settings, unless that is done; the run itself logs the scores."""
    if run.tracking.wandb:
        check_mode()
    start = time.time()
    result = evaluate(generator, run.evaluation, run.sampling, fabric=fabric, output=run.folder, reuse=True)
    if fabric.is_global_zero:
        log_own_scores(run, result, new=Path(result["file"]).stat().st_mtime >= start)
        mirror_results(run)
    fabric.barrier()
    return result


def train_and_score(run: RunConfig, fabric: Fabric) -> None:
    """Train a run to its end, then score it."""
    check_evaluation(run.evaluation, scores=True)
    train(run)
    result = score_own(run, load_generator(run.folder, fabric.device), fabric)
    fabric.print(f"scored: {result['file']}")


def score_checkpoint(
    generator: Generator,
    settings: RunConfig,
    output: Path | None,
    fabric: Fabric,
    *,
    save_images: str | None = None,
) -> dict[str, Any]:
    """Score a trained model with any sampling and evaluation settings, as a separate run in W&B.

    A trial of a sweep also gets a run folder of its own.
    """
    checkpoint = generator.checkpoint
    run = placed(evaluation_run(settings, checkpoint))
    if run.tracking.wandb:
        check_mode()
    trial = trial_place() is not None
    folder = output or (run.folder if trial else results_folder(checkpoint))
    if trial and fabric.is_global_zero:
        open_folder(run)
    fabric.barrier()
    result = evaluate(
        generator,
        settings.evaluation,
        settings.sampling,
        fabric=fabric,
        output=folder,
        reuse=trial,
        save_images=save_images,
    )
    if fabric.is_global_zero:
        log_evaluation(run, result, folder, trial=trial)
    fabric.barrier()
    return result


def dry_run(
    runs: Sequence[RunConfig], pipeline: Pipeline | None = None, say: Callable[[str], None] = print
) -> None:
    """Print the configuration, parameter counts and planned steps of each run, and write nothing."""
    if pipeline is not None:
        check_images(pipeline, runs)
    made = {str(Path(pipeline.output_dir) / step.dest) for step in pipeline.cache} if pipeline else set()
    for run in runs:
        text = outline(run, made)
        say(to_yaml(run))
        say(text + "\n")
        made |= {str(run.folder), str(run.folder / "export")}
