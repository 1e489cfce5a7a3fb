"""The rhythm of a run: the end of a step, the events that are due then, and the watchdog's pauses.

Lightning calls callbacks at every pass, and a step may take several. A ``StepCallback`` has hooks for a pass,
after a step and between two steps; the rhythm calls those of a run in the given order. Their position among
the Trainer's callbacks has no meaning: there the rhythm is first and the watchdog last, around the user's own
callbacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl

from lit_transdiff.config import RunConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.training.preemption import StopOnRequest, StopRequest
from lit_transdiff.training.watchdog import Watchdog

Event = Literal["numbers", "checkpoint", "validation", "samples", "scores"]


@dataclass(frozen=True)
class Times:
    """The steps of an event: every ``every`` steps (0: none), and optionally the last one."""

    every: int
    at_end: bool

    def due(self, step: int, max_steps: int) -> bool:
        """Whether the event is due after ``step`` steps."""
        return step > 0 and (
            (self.every > 0 and step % self.every == 0) or (self.at_end and step >= max_steps)
        )


def due_times(run: RunConfig) -> dict[Event, Times]:
    """The steps of each event of a run. Lightning itself runs validation."""
    training = run.training
    return {
        "numbers": Times(training.log_every, at_end=False),
        "checkpoint": Times(training.checkpoint_every, at_end=True),
        "validation": Times(
            min(training.validate_every or training.max_steps, training.max_steps), at_end=False
        ),
        "samples": Times(training.sample_every, at_end=True),
        "scores": Times(run.evaluation.every, at_end=run.evaluation.every > 0),
    }


class StepCallback(pl.Callback):
    """A callback with hooks for passes and steps, called by the ``rhythm`` of the run."""

    rhythm: Rhythm

    def before_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch) -> None:
        """Called when the batch of a pass has arrived."""

    def between_steps(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Called between two steps, after the validation of the first; and after the last step."""

    def finish(self, trainer: pl.Trainer) -> None:
        """Called when training ends: complete any work in progress."""

    def after_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch) -> None:
        """Called after a pass."""

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Called after a step, which ``trainer.global_step`` includes."""


class Rhythm(pl.Callback):
    """Call a run's callbacks in ``order``, stop when asked, and pause the watchdog during long work.

    The watchdog also pauses while the user's own callbacks work between two passes.
    """

    def __init__(
        self, run: RunConfig, order: Sequence[StepCallback], request: StopRequest | None = None
    ) -> None:
        self.times = due_times(run)
        self.max_steps = run.training.max_steps
        self.order = list(order)
        self.stop = StopOnRequest(request or StopRequest())
        self.watchdog = Watchdog(run.safety.stall_seconds, run.folder)
        self.step = 0  # number of the current step, from 1
        self.is_over = True  # whether the current step is complete
        self.leaving = False  # training ends after it: the last step, or a request to stop
        for callback in self.order:
            callback.rhythm = self

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The callbacks for a Trainer, in any order."""
        return [self, self.stop, *self.order, self.watchdog]

    def due(self, event: Event) -> bool:
        """Whether an event is due with this step."""
        return self.times[event].due(self.step, self.max_steps)

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is saved after this step."""
        return self.leaving or self.due("checkpoint")

    def asked_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether the run is to stop before the next step. All ranks wait for each other here."""
        return self.stop.now(trainer)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Pause the watchdog during the block."""
        busy_with = self.watchdog.busy_with
        self.watchdog.rest()
        yield
        if busy_with is not None:
            self.watchdog.watch(*busy_with)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        others = [callback for callback in trainer.callbacks if callback not in (self, self.watchdog)]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others, self.watchdog]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.step, self.is_over, self.leaving = trainer.global_step, True, False

    def on_train_batch_start(
        self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch, i: int
    ) -> None:
        self.watchdog.watch("waiting for the other ranks", i)
        for callback in self.order:
            callback.before_pass(trainer, stage, batch)
        if self.is_over:
            self.leaving = self.stop.asked(trainer)
            self.between_steps(trainer, stage)
            if self.leaving:
                self.stop.leave(trainer, stage)
            self.step, self.is_over = trainer.global_step + 1, False
        elif self.stop.is_impatient(trainer):
            self.finish(trainer)
            self.stop.break_off(trainer)
        self.watchdog.rest()  # until all callbacks are complete

    def on_train_batch_end(
        self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self.watchdog.watch("finishing", i)
        self.is_over = trainer.global_step >= self.step
        for callback in self.order:
            callback.after_pass(trainer, stage, outputs, batch)
        if self.is_over:
            for callback in self.order:
                callback.after_step(trainer, stage)
        self.watchdog.rest()

    def on_validation_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.watchdog.rest()

    def on_train_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.watchdog.rest()
        self.leaving = True
        self.between_steps(trainer, stage)

    def between_steps(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        for callback in self.order:
            callback.between_steps(trainer, stage)
        if self.leaving:
            self.finish(trainer)

    def finish(self, trainer: pl.Trainer) -> None:
        for callback in self.order:
            callback.finish(trainer)

    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        self.watchdog.rest()
