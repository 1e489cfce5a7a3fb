"""From a run's configuration to a trained model in its run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor

from lit_transdiff.checkpoint import Checkpoint
from lit_transdiff.config import RunConfig, require, unknown
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.references import num_groups
from lit_transdiff.distributed import (
    accumulation,
    check_spread,
    micro_batch_size,
    precision_of,
    strategy_name,
    trainer_settings,
    world_size,
)
from lit_transdiff.distributed.preemption import StopOnRequest, StopRequest, stop_request
from lit_transdiff.distributed.saving import Checkpoints, TryAgain, agreed_checkpoint, spread, what_changes
from lit_transdiff.distributed.watchdog import Pause, Resume, Watchdog
from lit_transdiff.evaluation.online import OnlineEvaluation
from lit_transdiff.export import export_checkpoint, export_folder, read_export, write_export
from lit_transdiff.models.adapt import match
from lit_transdiff.models.autoencoder import Autoencoder, check_latents, load_autoencoder
from lit_transdiff.runfolder import check_folder, last_checkpoint, open_folder, trained_steps
from lit_transdiff.sampling import Generator, check_sampling
from lit_transdiff.stages import PREPARATORY, STAGES
from lit_transdiff.stages.autoencoder import AutoencoderStage
from lit_transdiff.stages.base import ToLatents, TransDiffStage
from lit_transdiff.stages.callbacks import LogTraining, Progress, SampleGrids, SaveOrigin, StopOnNonFinite
from lit_transdiff.stages.guard import GuardSteps, RollBack
from lit_transdiff.tracking.callbacks import WATCHED, BestModel, Track, log_models
from lit_transdiff.tracking.loggers import MetricsCSV, build_loggers, wandb_of
from lit_transdiff.tracking.wandb_run import WandbRun


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves: its folder, its last step, and the last value of each metric."""

    folder: Path
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, built and checked, before training."""

    run: RunConfig
    stage: pl.LightningModule
    data: DataModule
    autoencoder: Autoencoder | None
    report: str


def check_run(run: RunConfig, made: Collection[str] = ()) -> None:
    """Refuse names that are in no table and settings that do not fit together or the run folder.

    ``made`` are files and folders that do not exist yet but will, when the run starts (the steps of a pipeline before it).
    """
    if run.stage not in STAGES and run.stage not in PREPARATORY:
        raise unknown("stage", run.stage, [*STAGES, *PREPARATORY])
    check_sampling(run.sampling)
    check_folder(run)
    if run.init_from is not None and run.init_from not in made:
        export_folder(run.init_from)
    check_spread(run)
    if run.stage in PREPARATORY:
        policy, factor = run.safety.on_bad_step, run.safety.spike_factor
        require(policy == "stop", "safety.on_bad_step", policy, f"'stop' in stage {run.stage}")
        require(factor == 0, "safety.spike_factor", factor, f"0 in stage {run.stage}")


def build(run: RunConfig) -> Parts:
    """The stage, its data and its autoencoder; every mismatch between them is reported here."""
    check_run(run)
    if run.stage in PREPARATORY:
        return Parts(run, PREPARATORY[run.stage](run), build_data(run, None), None, "")
    autoencoder = build_autoencoder(run)
    if run.training.compile:
        autoencoder.compile_parts()
    data = build_data(run, autoencoder)
    stage = STAGES[run.stage](run, to_latents(autoencoder, data.index_of("data.train").kind))
    return Parts(run, stage, data, autoencoder, initialise_from(run, stage))


def build_autoencoder(run: RunConfig) -> Autoencoder:
    """The run's frozen autoencoder, checked against the latents that the model expects."""
    autoencoder = load_autoencoder(run.autoencoder.kind, run.autoencoder.path, run.data.image_channels)
    channels, size = autoencoder.latent_channels, run.data.image_size // autoencoder.downsampling
    model = run.model
    require(model.latent_channels == channels, "model.latent_channels", model.latent_channels, f"the autoencoder's {channels}")
    allowed = f"{size}, which is data.image_size / {autoencoder.downsampling}"
    require(model.latent_size == size, "model.latent_size", model.latent_size, allowed)
    return autoencoder


def build_data(run: RunConfig, autoencoder: Autoencoder | None) -> DataModule:
    """The run's data, opened and checked against its index."""
    data = DataModule(
        run.data,
        num_references=run.model.num_references if autoencoder else 1,
        num_classes=run.model.num_classes,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=micro_batch_size(run),
        max_steps=run.training.max_steps,
        seed=run.seed,
        num_validation_samples=run.training.num_validation_samples,
        autoencoder_fingerprint=autoencoder.fingerprint if autoencoder else None,
    )
    data.setup("fit")
    return data


def to_latents(autoencoder: Autoencoder, kind: str) -> ToLatents:
    """What makes latents of a batch: images are encoded by the frozen autoencoder, cached moments are only sampled.

    The first batch is checked: an autoencoder whose normalisation does not fit the data is refused.
    """
    checked = False

    def convert(values: Tensor, noise: Tensor) -> Tensor:
        nonlocal checked
        autoencoder.to(values.device)
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            moments = autoencoder.encode(values) if kind == "images" else values.float()
            latents = autoencoder.sample(moments, noise)
        if not checked:
            check_latents(latents)
            checked = True
        return latents

    return convert


def initialise_from(run: RunConfig, stage: TransDiffStage, load: bool = True) -> str:
    """Load the (averaged) weights of ``init_from``; the report says what was copied, adapted, dropped and newly made.

    With ``load`` false only the report is made; the model may then be on the meta device.
    """
    if run.init_from is None:
        return ""
    export = read_export(run.init_from)
    try:
        found, report = match(stage.model, export.state, run.init_positions)
    except ValueError as error:
        raise ValueError(f"init_from: {export.folder}: {error}") from error
    if load:
        stage.model.load_state_dict(found)
    return f"initialised from {export.folder}: {report}"


def plan(run: RunConfig, made: Collection[str] = ()) -> str:
    """What a run would do, checked as far as possible without the things in ``made`` that earlier steps will make."""
    check_run(run, made)
    trained_now = run.stage in PREPARATORY or run.autoencoder.path in made
    autoencoder = None if trained_now else build_autoencoder(run)
    index = None if run.data.train in made else build_data(run, autoencoder).index_of("data.train")
    if run.stage in PREPARATORY:
        return describe(run, PREPARATORY[run.stage](run), index)
    with torch.device("meta"):  # shapes are enough, and a large model takes neither time nor memory
        stage = STAGES[run.stage](run, lambda values, noise: values)
    report = f"initialised from {run.init_from}" if run.init_from in made else initialise_from(run, stage, load=False)
    return describe(run, stage, index, report)


def describe(run: RunConfig, stage: pl.LightningModule, index: ShardIndex | None, report: str = "") -> str:
    """Parameter counts and planned steps, for people; ``index`` is nothing where the data are not there yet."""
    training = run.training
    total, trained = count(stage.parameters()), count(p for p in stage.parameters() if p.requires_grad)
    lines = [
        f"run         {run.name} -> {run.folder}",
        f"stage       {run.stage}",
        f"parameters  {total:,} ({trained:,} trained)",
    ]
    if isinstance(stage, TransDiffStage):
        encoder, decoder = count(stage.model.encoder.parameters()), count(stage.model.decoder.parameters())
        lines.append(f"            encoder {encoder:,}, decoder {decoder:,}")
    rows, references = training.max_steps * training.global_batch_size, run.model.num_references
    epochs = ""
    if index is not None:
        items = num_groups(index.class_counts, references)
        lines.append(f"data        {run.data.train}: {len(index):,} {index.kind}, {items:,} rows of {references}")
        epochs = f" ({rows / items:.1f} epochs)"
    else:
        lines.append(f"data        {run.data.train}: made before this run starts")
    lines += [
        f"steps       {training.max_steps:,} of {training.global_batch_size} rows{epochs}, {rows * references:,} images seen",
        f"batch       {world_size(run)} device(s) x {micro_batch_size(run)} x {accumulation(run)} pass(es)",
        f"strategy    {strategy_name(run)}, precision {precision_of(run)}"
        + (", weights in bfloat16" if run.training.precision == "bf16-true" else ""),
    ]
    return "\n".join([*lines, *([report] if report else [])])


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def build_callbacks(parts: Parts, start: int, request: StopRequest, tracker: WandbRun | None) -> list[Callback]:
    """What watches a run and saves it; the order matters where it is said."""
    run, training = parts.run, parts.run.training
    guarded = isinstance(parts.stage, TransDiffStage) and (run.safety.on_bad_step != "stop" or run.safety.spike_factor > 0)
    finite = StopOnNonFinite(training.log_every, training.checkpoint_every, run.folder / "checkpoints")
    numbers = LogTraining(run)
    checkpoints = Checkpoints(run, start, spread_of(run), before_save=finite.look)
    watchdog = Watchdog(run.safety.stall_seconds)
    # The watchdog rests in what may take long. Scores come before LogTraining, which would count their time as training's.
    slow_first: list[Callback] = []
    slow_last: list[Callback] = [SaveOrigin(run, export_info(parts)), checkpoints]
    if tracker is not None:
        slow_last.append(Track(tracker, run, parts.data))
    if parts.autoencoder is not None and isinstance(parts.stage, TransDiffStage):
        names, folder = parts.data.class_names, run.folder
        slow_last.append(SampleGrids(parts.autoencoder, names, folder / "samples", training.sample_every, tracker))
        slow_last.append(BestModel(folder / "best", partial(export_model, parts)))
        if run.evaluation.every:
            generator = Generator(parts.stage.model, parts.autoencoder, run, parts.data.class_names)
            slow_first.append(OnlineEvaluation(generator, run))
    callbacks: list[Callback] = [
        StopOnRequest(request, checkpoints, watchdog.rest),
        Pause(watchdog),
        *slow_first,
        Resume(watchdog),
        GuardSteps(run.safety, run.folder) if guarded else finite,
        numbers,
        Progress(run.name, numbers),
        Pause(watchdog),
        *slow_last,
        watchdog,
    ]
    watching = run.safety.stall_seconds > 0
    return [callback for callback in callbacks if watching or not isinstance(callback, Watchdog | Pause | Resume)]


def build_trainer(parts: Parts, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """Lightning's Trainer for a run. The whole run is one epoch of max_steps; the data order has its own."""
    run, training = parts.run, parts.run.training
    validate_every = training.validate_every or training.max_steps
    return pl.Trainer(
        **trainer_settings(run),
        max_steps=training.max_steps,
        max_epochs=-1,
        gradient_clip_val=run.optimizer.gradient_clip or None,
        val_check_interval=min(validate_every, training.max_steps) * accumulation(run),
        check_val_every_n_epoch=None,  # count over the whole run
        limit_val_batches=1.0 if run.data.evaluation else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=loggers,
        use_distributed_sampler=False,
        enable_checkpointing=False,  # see Checkpoints
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=run.folder,
    )


def train(run: RunConfig, say: Callable[[str], None] = print) -> TrainResult:
    """Train a run to its end, continuing from its last checkpoint if there is one, and export the averaged weights.

    A run that has already finished is left as it is.
    """
    say = rank_zero_only(say)
    if trained_steps(run) >= run.training.max_steps:
        check_folder(run)
        step = trained_steps(run)
        say(f"{run.name}: already trained to step {step} in {run.folder}")
        return TrainResult(run.folder, step, {})
    while True:
        pl.seed_everything(run.seed, verbose=False)
        parts = build(run)
        say(describe(run, parts.stage, parts.data.index_of("data.train"), parts.report))
        rank_zero_only(open_folder)(run, world_size(run))
        try:
            loggers = build_loggers(run)
            with stop_request() as request:
                metrics = fit(parts, agreed_checkpoint(run), request, loggers, say)
            break
        except (TryAgain, RollBack) as reason:
            say(f"{run.name}: {reason}")
    rank_zero_only(write_model)(parts)
    if (tracker := wandb_of(loggers)) is not None:
        log_models(tracker, run, metrics.get(WATCHED))
        tracker.finish()
    wait_for_export(run)
    return TrainResult(run.folder, run.training.max_steps, metrics)


def fit(
    parts: Parts, checkpoint: Checkpoint | None, request: StopRequest, loggers: list[Logger], say: Callable[[str], None]
) -> dict[str, float]:
    """Train from a checkpoint, or from the beginning, to the end; the last values of the metrics."""
    run = parts.run
    start = checkpoint.step if checkpoint else 0
    if start >= run.training.max_steps:
        return {}
    trainer = build_trainer(parts, build_callbacks(parts, start, request, wandb_of(loggers)), loggers)
    if checkpoint is not None:
        changes = what_changes(checkpoint, spread_of(run))
        say(f"continuing from {checkpoint.folder}" + (f"; {changes}" if changes else ""))
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.drop_after(checkpoint.step if checkpoint else -1)
    trainer.fit(parts.stage, datamodule=parts.data, ckpt_path=checkpoint.folder if checkpoint else None)
    if trainer.global_step != run.training.max_steps:
        raise RuntimeError(f"training ended at step {trainer.global_step} of {run.training.max_steps}.")
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def write_model(parts: Parts) -> None:
    """Export the last checkpoint. An autoencoder also measures its latents, on training batches from the start."""
    run, stage = parts.run, parts.stage
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    checkpoint = checkpoint.index()
    if isinstance(stage, TransDiffStage):
        return export_checkpoint(checkpoint, run.folder / "export")
    stage.load_state_dict(checkpoint.weights(None))
    batches = [build_data(run, None).train_dataloader()] if isinstance(stage, AutoencoderStage) else []
    info = {**export_info(parts), "step": checkpoint.step, "images_seen": checkpoint.manifest["images_seen"], "weights": "last"}
    write_export(run.folder / "export", run, info, lambda folder: stage.export(folder, *batches))  # type: ignore[operator]


def export_model(parts: Parts, trainer: pl.Trainer, folder: Path, more: Mapping[str, Any]) -> None:
    """Write the averaged weights as they are now to ``folder``, with ``more`` in what the export says. All ranks call this."""
    run, stage, step = parts.run, parts.stage, trainer.global_step
    assert isinstance(stage, TransDiffStage)
    state = {name: value.cpu().contiguous() for name, value in stage.averaged_model().state_dict().items()}
    if trainer.is_global_zero:
        weights = f"ema {run.optimizer.ema_decay}"
        info = {**export_info(parts), "step": step, "images_seen": step * run.images_per_step, "weights": weights, **more}
        write_export(folder, run, info, lambda partial: save_file(state, partial / "model.safetensors"))


def wait_for_export(run: RunConfig) -> None:
    """Return when the first rank has written the trained model."""
    deadline = time.monotonic() + 60 * run.distributed.timeout_minutes
    while trained_steps(run) < run.training.max_steps:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.folder / 'export'}: the first rank has not written it.")
        time.sleep(0.1)


def export_info(parts: Parts) -> dict[str, Any]:
    """What an export says of itself, beside the step."""
    return {
        "name": parts.run.name,
        "stage": parts.run.stage,
        "autoencoder": parts.autoencoder.fingerprint if parts.autoencoder else None,
        "class_names": list(parts.data.class_names),
    }


def spread_of(run: RunConfig) -> dict[str, Any]:
    """How the run is spread, for its checkpoints."""
    return spread(strategy_name(run), world_size(run), micro_batch_size(run), precision_of(run))
