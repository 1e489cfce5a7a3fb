"""From a run's configuration to a trained model in its run folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_transdiff.config import RunConfig, require, unknown
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.references import num_groups
from lit_transdiff.distributed import accumulation, micro_batch_size, precision_of, strategy_name, trainer_settings, world_size
from lit_transdiff.evaluation.online import OnlineEvaluation
from lit_transdiff.export import export_folder, read_export, write_export
from lit_transdiff.models.adapt import match
from lit_transdiff.models.autoencoder import Autoencoder, check_latents, load_autoencoder
from lit_transdiff.runfolder import check_folder, last_checkpoint, open_folder, trained_steps
from lit_transdiff.sampling import Generator, check_sampling
from lit_transdiff.stages import PREPARATORY, STAGES
from lit_transdiff.stages.autoencoder import AutoencoderStage
from lit_transdiff.stages.base import ToLatents, TransDiffStage
from lit_transdiff.stages.callbacks import LogTraining, Progress, SampleGrids, SaveOrigin, StopOnNonFinite
from lit_transdiff.tracking.callbacks import BestModel, Track, log_models
from lit_transdiff.tracking.loggers import MetricsCSV, build_loggers, wandb_of


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
    strategy_name(run)
    micro_batch_size(run)


def build(run: RunConfig) -> Parts:
    """The stage, its data and its autoencoder; every mismatch between them is reported here."""
    check_run(run)
    if run.stage in PREPARATORY:
        return Parts(run, PREPARATORY[run.stage](run), build_data(run, None), None, "")
    autoencoder = build_autoencoder(run)
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
        f"strategy    {strategy_name(run)}, precision {precision_of(run)}",
    ]
    return "\n".join([*lines, *([report] if report else [])])


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def build_trainer(parts: Parts) -> pl.Trainer:
    """Lightning's Trainer for a run. The whole run is one epoch of max_steps; the data order has its own."""
    run, training = parts.run, parts.run.training
    checkpoints = ModelCheckpoint(
        dirpath=run.folder / "checkpoints",
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        every_n_train_steps=training.checkpoint_every,
        save_top_k=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    numbers = LogTraining(training.log_every, run.images_per_step)
    callbacks: list[Callback] = [
        StopOnNonFinite(training.log_every, training.checkpoint_every),
        numbers,
        Progress(run.name, numbers),
        SaveOrigin(run),
        checkpoints,
    ]
    loggers = build_loggers(run)
    log = wandb_of(loggers)
    if log is not None:
        callbacks.append(Track(log, run, parts.data))
    if parts.autoencoder is not None and isinstance(parts.stage, TransDiffStage):
        generator = Generator(parts.stage.model, parts.autoencoder, run, parts.data.class_names)
        callbacks.append(SampleGrids(generator, run.folder / "samples", training.sample_every, log))
        callbacks.append(BestModel(run.folder / "best", partial(export_model, parts)))
        if run.evaluation.every:  # before LogTraining, which would count its time as waiting for data
            callbacks.insert(1, OnlineEvaluation(generator, run))
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
    pl.seed_everything(run.seed, verbose=False)
    parts = build(run)
    say(describe(run, parts.stage, parts.data.index_of("data.train"), parts.report))
    rank_zero_only(open_folder)(run)
    trainer = build_trainer(parts)
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.drop_after(int(checkpoint.stem.split("-")[1]) if checkpoint else -1)
    trainer.fit(parts.stage, datamodule=parts.data, ckpt_path=checkpoint)
    if trainer.global_step != run.training.max_steps:
        raise RuntimeError(f"training ended at step {trainer.global_step} of {run.training.max_steps}.")
    save_last_step(trainer, run)
    export_model(parts, trainer, run.folder / "export")
    if (log := wandb_of(trainer.loggers)) is not None:
        best = next((callback for callback in trainer.callbacks if isinstance(callback, BestModel)), None)  # type: ignore[attr-defined]
        log_models(log, run, best)
        log.finish()
    return TrainResult(run.folder, trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()})


def save_last_step(trainer: pl.Trainer, run: RunConfig) -> None:
    """Keep the last step as the checkpoint, so that the run can be made longer; earlier ones go. All ranks call this."""
    last = run.folder / "checkpoints" / f"step-{trainer.global_step:08d}.ckpt"
    if last_checkpoint(run) == last:
        return
    trainer.strategy.barrier()
    trainer.save_checkpoint(last)
    if trainer.is_global_zero:
        for earlier in set(last.parent.glob("step-*.ckpt")) - {last}:
            earlier.unlink()


def export_model(parts: Parts, trainer: pl.Trainer, folder: Path) -> None:
    """Write the trained model to ``folder``. All ranks call this."""
    if trainer.is_global_zero:
        write_export(folder, parts.run, export_info(parts, trainer), weights_writer(parts))
    trainer.strategy.barrier()


def weights_writer(parts: Parts) -> Callable[[Path], None]:
    """What writes the stage's weights; an autoencoder also measures its latents, on training batches from the start."""
    stage = parts.stage
    if isinstance(stage, AutoencoderStage):
        batches = build_data(parts.run, None).train_dataloader()
        return lambda folder: stage.export(folder, batches)
    return stage.export  # type: ignore[return-value]


def export_info(parts: Parts, trainer: pl.Trainer) -> dict[str, Any]:
    """What an export says of itself."""
    run = parts.run
    return {
        "name": run.name,
        "stage": run.stage,
        "step": trainer.global_step,
        "images_seen": trainer.global_step * run.images_per_step,
        "weights": f"ema {run.optimizer.ema_decay}" if run.stage in STAGES else "last",
        "autoencoder": parts.autoencoder.fingerprint if parts.autoencoder else None,
        "class_names": list(parts.data.class_names),
    }
