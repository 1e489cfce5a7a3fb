"""From a run's configuration to a trained model in its run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.base.endings import CheckpointError
from lit_transdiff.base.files import unless_full
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.checkpoints.export import export_checkpoint, write_export
from lit_transdiff.checkpoints.format import Checkpoint
from lit_transdiff.checkpoints.places import pinned_run
from lit_transdiff.checkpoints.portable import write_generator
from lit_transdiff.checkpoints.run_folder import (
    check_checkpoint,
    check_folder,
    last_checkpoint,
    open_folder,
    trained_steps,
)
from lit_transdiff.config import RunConfig, require
from lit_transdiff.config.targets import save_tensors
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.names import class_names
from lit_transdiff.distributed import (
    STRATEGIES,
    accumulation,
    compute_dtype,
    num_nodes,
    strategy_name,
    trainer_settings,
    world_size,
)
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.preparatory import PreparatoryStage
from lit_transdiff.tracking.loggers import MetricsCSV, build_loggers, wandb_of
from lit_transdiff.tracking.wandb_run import WandbRun
from lit_transdiff.training.build import Parts, build, build_data, describe_parts, export_info, layout_of
from lit_transdiff.training.callbacks import (
    CALLBACKS,
    LogTraining,
    Progress,
    SampleGrids,
    SaveOrigin,
    StopOnNonFinite,
)
from lit_transdiff.training.checkpointing import Checkpoints, TryAgain, agreed_checkpoint, what_changes
from lit_transdiff.training.execution import FirstStep, execution_of, matmul_precision
from lit_transdiff.training.first_rank import wait_for_export
from lit_transdiff.training.guard import GuardSteps, RollBack
from lit_transdiff.training.mirroring import mirrored
from lit_transdiff.training.online_evaluation import OnlineEvaluation
from lit_transdiff.training.preemption import StopRequest, stop_request
from lit_transdiff.training.profiling import ProfileSteps
from lit_transdiff.training.rhythm import Rhythm, StepCallback, due_times
from lit_transdiff.training.slow_ranks import SlowRanks
from lit_transdiff.training.tracking import WATCHED, BestModel, EveryNode, Track, log_models


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run: its folder, its last step, and the last value of each metric."""

    folder: Path
    step: int
    metrics: dict[str, float]


def build_callbacks(
    parts: Parts, start: int, request: StopRequest, tracker: WandbRun | None, own: Sequence[Callback] = ()
) -> list[Callback]:
    """All callbacks of a run, with the user's ``own``; the order counts in ``step_callbacks`` only."""
    run = parts.run
    rhythm = Rhythm(run, step_callbacks(parts, start, tracker), request)
    named = [CALLBACKS[name](run) for name in run.training.callbacks]
    bar = [] if any(isinstance(callback, ProgressBar) for callback in own) else [Progress(run.name)]
    return [*rhythm.callbacks, *bar, FirstStep(), SaveOrigin(run, export_info(parts)), *own, *named]


def step_callbacks(parts: Parts, start: int, tracker: WandbRun | None) -> list[StepCallback]:
    """The callbacks of a run's steps, in order: online scores precede the step's numbers, samples follow."""
    run, stage, autoencoder, folder = parts.run, parts.stage, parts.autoencoder, parts.run.folder
    guarded = isinstance(stage, TransDiffStage) and (
        run.safety.on_bad_step != "stop" or run.safety.spike_factor > 0
    )
    callbacks: list[StepCallback] = [
        GuardSteps(run.safety, folder) if guarded else StopOnNonFinite(folder / "checkpoints"),
        LogTraining(run, compute_dtype(run)),
        Checkpoints(run, start, layout_of(run)),
    ]
    if run.training.profile_steps:
        callbacks.append(ProfileSteps(run.training.profile_steps, folder / "profile"))
    if tracker is not None:
        callbacks.append(Track(tracker, run, parts.data))
        if num_nodes(run) > 1:
            callbacks.append(EveryNode(tracker))
    if autoencoder is not None and isinstance(stage, TransDiffStage):
        names = class_names(parts.data, run.model.num_classes)
        if run.evaluation.every:
            callbacks.insert(0, OnlineEvaluation(Generator(stage.model, autoencoder, run, names), run))
        go_on = run.checkpoint.on_error == "continue"
        callbacks.append(SampleGrids(autoencoder, names, folder / "samples", tracker, go_on))
        callbacks.append(BestModel(folder / "best", partial(export_model, parts)))
    if run.safety.slow_rank and world_size(run) > 1:
        callbacks.append(SlowRanks(run, tracker))
    return callbacks


def build_trainer(parts: Parts, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """Lightning's Trainer for a run. The whole run is one epoch; the data order has its own epochs."""
    run, training = parts.run, parts.run.training
    validates = run.data.evaluation is not None or not isinstance(parts.data, DataModule)
    also_saves = any(isinstance(callback, CheckpointCallback) for callback in callbacks)
    own = "which holds tensors in parts; the run has its own checkpoints"
    allowed = f"none with strategy {strategy_name(run)}, {own}"
    require(not also_saves or STRATEGIES[strategy_name(run)].whole, "callbacks", "ModelCheckpoint", allowed)
    return pl.Trainer(
        **trainer_settings(run),
        max_steps=training.max_steps,
        max_epochs=-1,
        gradient_clip_val=run.optimizer.gradient_clip or None,
        val_check_interval=due_times(run)["validation"].every * accumulation(run),
        check_val_every_n_epoch=None,  # count over the whole run
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=loggers,
        use_distributed_sampler=False,
        enable_checkpointing=also_saves,  # Checkpoints writes those of the run
        enable_model_summary=False,
        default_root_dir=run.folder,
    )


def train(
    run: RunConfig,
    say: Callable[[str], None] = print,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    data: pl.LightningDataModule | None = None,
    stage: pl.LightningModule | None = None,
) -> TrainResult:
    """Train a run to its end, from its last checkpoint if there is one, and export the averaged weights.

    A finished run is left unchanged. ``callbacks`` and ``loggers`` of Lightning are added to the run's;
    ``data`` (any data module that yields ``Batch``) and ``stage`` replace those that its settings name.
    """
    say = rank_zero_only(say)
    with mirrored(run, say) as upload:
        return train_in_folder(run, say, upload, callbacks, loggers, data, stage)


def train_in_folder(
    run: RunConfig,
    say: Callable[[str], None],
    upload: Callable[[], None],
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    data: pl.LightningDataModule | None,
    stage: pl.LightningModule | None,
) -> TrainResult:
    """``train`` in the run folder of this machine; ``upload`` begins to copy it to its mirror."""
    if trained_steps(run) >= run.training.max_steps:
        check_folder(pinned_run(run)[0])
        upload()
        step = trained_steps(run)
        say(f"{run.name}: already trained to step {step} in {run.folder}")
        return TrainResult(run.folder, step, {})
    untrained = None if stage is None else deepcopy(stage.state_dict())
    with FolderLock(run.folder) as lock:
        while True:
            pl.seed_everything(run.seed, verbose=False)
            parts = build(run, data=data, stage=stage)
            say(describe_parts(parts))
            rank_zero_only(lock.take)()
            upload()
            try:
                all_loggers = [*build_loggers(parts.run), *loggers]
                with stop_request() as request:
                    result = fit(parts, agreed_checkpoint(run), request, all_loggers, say, callbacks)
                break
            except (TryAgain, RollBack) as reason:
                say(f"{run.name}: {reason}")
                if stage is not None and untrained is not None:
                    stage.load_state_dict(untrained)
        rank_zero_only(write_model)(parts)
        if (tracker := wandb_of(all_loggers)) is not None:
            log_models(tracker, parts.run, result.metrics.get(WATCHED))
            tracker.finish()
        wait_for_export(run, result.step, lock)
    return result


def fit(
    parts: Parts,
    checkpoint: Checkpoint | None,
    request: StopRequest,
    loggers: list[Logger],
    say: Callable[[str], None],
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train from a checkpoint or the beginning, to the last step or until a callback ends training."""
    run = parts.run
    start = checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        rank_zero_only(check_checkpoint)(run, checkpoint)
    execution = execution_of(run, parts.stage)
    rank_zero_only(open_folder)(run, world_size(run), parts.places, execution)
    if checkpoint is not None and start >= run.training.max_steps:
        if start > (planned := run.training.max_steps):
            say(f"{run.name}: already trained to step {start}, beyond training.max_steps, {planned}")
        return TrainResult(run.folder, start, dict(checkpoint.manifest["metrics"]))
    trainer = build_trainer(
        parts, build_callbacks(parts, start, request, wandb_of(loggers), callbacks), loggers
    )
    if checkpoint is not None:
        changes = what_changes(checkpoint, layout_of(run))
        say(f"continuing from {checkpoint.folder}" + (f"; {changes}" if changes else ""))
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            dropped = logger.drop_after(checkpoint.step if checkpoint else -1)
            if dropped and checkpoint is not None and (tracker := wandb_of(loggers)) is not None:
                tracker.rewind_to = checkpoint.step
    with matmul_precision(run.training.matmul_precision):
        trainer.fit(parts.stage, datamodule=parts.data, ckpt_path=checkpoint.folder if checkpoint else None)
    step, planned = trainer.global_step, run.training.max_steps
    if step != planned and not trainer.should_stop:
        raise RuntimeError(f"training ended at step {step} of {planned}.")
    if step != planned:
        ended = f"a callback ended training at step {step} of {planned}"
        say(f"{run.name}: {ended}; the same call goes on from there")
    return TrainResult(
        run.folder, step, {name: float(value) for name, value in trainer.callback_metrics.items()}
    )


def write_model(parts: Parts) -> None:
    """Export the last checkpoint; a preparatory stage may read training batches for it."""
    run, stage = parts.run, parts.stage
    checkpoint = last_checkpoint(run)
    if checkpoint is None:  # none could be written, and training went on
        text = "no checkpoint could be written, of which the model would be made. Make room first."
        raise CheckpointError(f"{run.folder}: {text}")
    checkpoint = checkpoint.index()
    if isinstance(stage, TransDiffStage):
        return export_checkpoint(checkpoint, run.folder / "export", own=True)
    info = {**export_info(parts), "step": checkpoint.step, "weights": "last"}
    info["images_seen"] = checkpoint.manifest["images_seen"]
    if not isinstance(stage, PreparatoryStage):  # the user's own
        weights = checkpoint.weights(None)
        write = lambda folder: save_tensors(weights, folder / "model.safetensors")  # noqa: E731
        return write_export(run.folder / "export", run, info, write, own=True)
    stage.load_state_dict(checkpoint.weights(None))
    batches = (build_data(run) if isinstance(parts.data, DataModule) else parts.data).train_dataloader()
    write_export(run.folder / "export", run, info, lambda folder: stage.export(folder, batches), own=True)


def export_model(parts: Parts, trainer: pl.Trainer, folder: Path, more: Mapping[str, Any]) -> None:
    """Export the current averaged weights to ``folder``, with ``more`` entries in export.json.

    All ranks call this.
    """
    run, stage, step = parts.run, parts.stage, trainer.global_step
    assert isinstance(stage, TransDiffStage)
    state = {name: value.cpu().contiguous() for name, value in stage.averaged_model().state_dict().items()}
    if trainer.is_global_zero:
        weights = {"weights": f"ema {run.optimizer.ema_decay}", **more}
        info = {**export_info(parts), "step": step, "images_seen": step * run.images_per_step, **weights}
        with unless_full(folder, run.checkpoint.on_error == "continue"):
            write_export(folder, run, info, lambda path: write_generator(state, path), own=True)
