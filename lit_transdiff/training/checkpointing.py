"""Saving checkpoints: when, by which rank, and the handling of failures."""

from __future__ import annotations

import errno
import logging
import threading
import time
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.base.endings import CheckpointError
from lit_transdiff.base.hub import is_on_hub
from lit_transdiff.checkpoints.averages import parameter_shapes
from lit_transdiff.checkpoints.format import (
    PARTIAL,
    WRITTEN,
    Checkpoint,
    checkpoint_folder,
    complete_checkpoints,
    finish_checkpoint,
    prune,
    put_aside,
    write_rank_file,
)
from lit_transdiff.checkpoints.run_folder import last_checkpoint
from lit_transdiff.config import RunConfig, unknown
from lit_transdiff.config.targets import remove_written
from lit_transdiff.distributed import world_size
from lit_transdiff.distributed.sharding import Sharding
from lit_transdiff.training.rhythm import StepCallback

SIGHT_PATIENCE = 120.0  # seconds until a shared file system shows a folder on all nodes
log = logging.getLogger(__name__)


class TryAgain(Exception):
    """This attempt must end, but another one can continue from the last checkpoint."""


def agreed_checkpoint(run: RunConfig) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint; damaged ones are put aside with a warning.

    Each rank reads its share of the files. Without a process group, ``Checkpoints.setup`` compares the ranks'
    results.
    """
    while (checkpoint := newest_checkpoint(run)) is not None:
        file = damaged_file(checkpoint, world_size(run))
        if file is None:
            break
        path = checkpoint.folder / file
        log.warning("%s is damaged: it is not what was written. The checkpoint before it is used.", path)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            put_aside(checkpoint)
    return checkpoint


def damaged_file(checkpoint: Checkpoint, world: int) -> str | None:
    """The name of a damaged file of a checkpoint, or None.

    Each rank reads its share, and the result is shared.
    """
    name: str | None = None
    try:
        name = checkpoint.damaged_file(getattr(rank_zero_only, "rank", 0), world)
    except FileNotFoundError as error:  # another rank has just put it aside
        name = Path(error.filename).name
    names: list[Any] = [name]
    if torch.distributed.is_initialized():
        names *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(names, name)
    return next((name for name in names if name is not None), None)


def newest_checkpoint(run: RunConfig) -> Checkpoint | None:
    """The newest complete checkpoint; with a process group, the one that the first rank sees.

    Other nodes wait for it, because a shared file system may show a new folder there later.
    """
    checkpoint = last_checkpoint(run)
    if not torch.distributed.is_initialized():
        return checkpoint
    choice = [checkpoint.step if checkpoint else None]
    torch.distributed.broadcast_object_list(choice, src=0)
    deadline = time.monotonic() + SIGHT_PATIENCE
    while (checkpoint.step if checkpoint else None) != choice[0]:
        if time.monotonic() > deadline:
            text = f"{run.folder}: the first rank sees the checkpoint of step {choice[0]}, not {checkpoint}."
            raise CheckpointError(errno.ESTALE, text)
        time.sleep(0.5)
        checkpoint = last_checkpoint(run)
    return checkpoint


class Checkpoints(StepCallback):
    """Save between two steps, after the validation of the first, so that a resumed run repeats nothing.

    Tensors are copied to CPU memory; with ``checkpoint.asynchronous`` a thread then writes the files while
    training continues, and all ranks report a failure together at the next save or at the end. ``start`` is
    the step of the checkpoint that this rank is about to load; ``layout`` is that of the run over devices.
    """

    def __init__(self, run: RunConfig, start: int, layout: dict[str, Any]) -> None:
        self.run = run
        self.start = start
        self.layout = layout
        self.folder = run.folder / "checkpoints"
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None
        self.saved_step = 0
        self.metrics: dict[str, float] = {}  # from the checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the attempt if ranks saw different checkpoints, or commits of the Hub; the next one agrees."""
        mine = (self.start, *filter(is_on_hub, (self.run.init_from, self.run.autoencoder.path)))
        starts: list[Any] = [mine] * trainer.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(starts, mine)
        if len(set(starts)) > 1:
            raise TryAgain(f"ranks saw different last checkpoints or commits ({starts}); they agree now")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, stage: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["metrics"] = numbers_of(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, stage: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.metrics = checkpoint.get("metrics", {})

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.saved_step = trainer.global_step
        for name, value in self.metrics.items():
            trainer.callback_metrics.setdefault(name, torch.tensor(value))  # newer scores may exist already
        if self.run.data.evaluation is None or self.run.training.num_validation_samples == 0:
            self.check_best(trainer)
        if trainer.is_global_zero and self.folder.exists():
            for rest in [*self.folder.glob(f"step-*{PARTIAL}"), *self.folder.glob("step-*.removed")]:
                remove_written(rest, WRITTEN)

    def on_validation_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.check_best(trainer)

    def check_best(self, trainer: pl.Trainer) -> None:
        """Refuse a ``keep_best`` metric that no validation and no callback logs."""
        metric = self.run.checkpoint.keep_best
        if metric is not None and metric not in (known := self.known_metrics(trainer)):
            raise unknown("checkpoint.keep_best", metric, known)

    def known_metrics(self, trainer: pl.Trainer) -> list[str]:
        """The metrics that checkpoints may record, including those logged less often than validation."""
        run = self.run
        later = [f"online/{name}" for name in run.evaluation.metrics] if run.evaluation.every else []
        later += ["val/feature_diversity"] if run.training.sample_every else []
        return sorted({*filter(judges, trainer.callback_metrics), *later})

    def between_steps(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.rhythm.saves and trainer.global_step != self.saved_step:
            with self.rhythm.resting():
                self.save(trainer)

    def finish(self, trainer: pl.Trainer) -> None:
        with self.rhythm.resting():
            self.settle(trainer)

    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        self.wait()

    def last(self) -> Path | None:
        """The newest complete checkpoint, after the current write."""
        self.wait()
        return max((c.folder for c in complete_checkpoints(self.folder)), default=None)

    def wait(self) -> None:
        """Wait until the thread has written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def settle(self, trainer: pl.Trainer) -> None:
        """Wait for the last save. If it failed on any rank, all ranks warn or raise, by ``on_error``."""
        self.wait()
        error, self.error = self.error, None
        if trainer.strategy.reduce_boolean_decision(error is None):
            return
        last = self.last()
        message = (
            f"{error or 'another rank could not write'} The last complete checkpoint is {last or 'none yet'}."
        )
        if self.run.checkpoint.on_error == "stop":
            raise CheckpointError(
                errno.EIO, f"step {self.saved_step}: no checkpoint could be written: {message}"
            )
        log.warning("step %d: no checkpoint could be written, training goes on: %s", self.saved_step, message)

    def save(self, trainer: pl.Trainer) -> None:
        """Save this step. All ranks must call this."""
        self.settle(trainer)
        strategy = cast(Sharding, trainer.strategy)
        step = self.saved_step = trainer.global_step
        partial = checkpoint_folder(self.folder, step).with_name(
            checkpoint_folder(self.folder, step).name + PARTIAL
        )
        if trainer.is_global_zero:
            remove_written(partial, WRITTEN)
            partial.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        tensors, training = strategy.slices(), strategy.training_state()
        manifest = self.manifest(trainer, step)
        arguments = (partial, trainer.global_rank, trainer.world_size, tensors, training, manifest)
        if self.run.checkpoint.asynchronous:
            self.thread = threading.Thread(target=self.write, args=arguments, name=f"checkpoint {step}")
            self.thread.start()
        else:
            self.write(*arguments)
            self.settle(trainer)

    def manifest(self, trainer: pl.Trainer, step: int) -> dict[str, Any]:
        """The content of the checkpoint's manifest."""
        images, milestone = step * self.run.images_per_step, self.run.checkpoint.keep_every_images
        before = (step - self.run.training.checkpoint_every) * self.run.images_per_step
        return {
            "step": step,
            "images_seen": images,
            "shapes": parameter_shapes(trainer.lightning_module),
            "metrics": numbers_of(trainer),
            "milestone": milestone > 0 and images // milestone > max(0, before) // milestone,
            **self.layout,
        }

    def write(self, partial: Path, rank: int, world: int, tensors: Any, training: Any, manifest: Any) -> None:
        """Write the files, possibly in a thread: without collectives, ranks meet through their files."""
        try:
            write_rank_file(partial, rank, tensors)
            if rank == 0:
                finish_checkpoint(
                    partial, world, training, manifest, self.run.distributed.timeout_minutes * 60
                )
                prune(self.folder, self.run.checkpoint)
        except CheckpointError as error:
            self.error = error
            if rank == 0:
                remove_written(partial, WRITTEN)


def numbers_of(trainer: pl.Trainer) -> dict[str, float]:
    """The last values of the metrics that judge the weights."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if judges(name)}


def judges(metric: str) -> bool:
    """Whether a metric judges the weights of a step."""
    return not metric.startswith(("train/", "throughput/"))


def layout(strategy: str, world: int, micro_batch: int, precision: str) -> dict[str, Any]:
    """The layout of a run over devices, as far as rounding depends on it."""
    return {
        "strategy": strategy,
        "world": world,
        "micro_batch_size": micro_batch,
        "precision": precision,
        "device": "gpu" if torch.cuda.is_available() else "cpu",
    }


def what_changes(checkpoint: Checkpoint, now: dict[str, Any]) -> str:
    """Describe the effect of continuing with another layout; "" if training continues exactly."""
    changed = [f"{k} {checkpoint.manifest[k]} -> {v}" for k, v in now.items() if checkpoint.manifest[k] != v]
    if not changed:
        return ""
    keys = {text.split()[0] for text in changed}
    lines = [
        f"continued with {', '.join(changed)}. The data, noise, times and dropped labels of each step stay "
        "the same."
    ]
    if keys & {"strategy", "world", "micro_batch_size", "device"}:
        lines.append(
            "Sums are taken in another order: losses agree within float32 rounding, not bit for bit."
        )
    if keys & {"world", "micro_batch_size"}:
        lines.append("Dropout draws other masks: its generator is seeded by step, pass and rank.")
    if "precision" in keys:
        lines.append("Rounding is that of the other precision from here on.")
    return "\n".join(lines)
