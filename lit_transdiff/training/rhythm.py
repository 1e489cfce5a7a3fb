"""The rhythm of a run: when a step is over, what is due then and in which order, and when the watchdog rests.

Lightning calls callbacks at every pass, and a step may take several. A ``StepCallback`` says what it does with a pass, after a
step and between two steps; the rhythm calls those of a run in the order that it was given. Where they stand among the Trainer's
callbacks means nothing: there the rhythm makes itself the first and the watchdog the last, around the user's own.
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
    """Due every so many steps (0: never so), and at the last step."""

    every: int
    at_end: bool

    def due(self, step: int, max_steps: int) -> bool:
        """Whether with this step; with 0 none was taken yet."""
        return step > 0 and ((self.every > 0 and step % self.every == 0) or (self.at_end and step >= max_steps))


def due_times(run: RunConfig) -> dict[Event, Times]:
    """What comes when in a run. Lightning itself validates."""
    training = run.training
    return {
        "numbers": Times(training.log_every, at_end=False),
        "checkpoint": Times(training.checkpoint_every, at_end=True),
        "validation": Times(min(training.validate_every or training.max_steps, training.max_steps), at_end=False),
        "samples": Times(training.sample_every, at_end=True),
        "scores": Times(run.evaluation.every, at_end=run.evaluation.every > 0),
    }


class StepCallback(pl.Callback):
    """A callback that moves with the steps of a run; the ``rhythm`` that it is given to makes itself known to it."""

    rhythm: Rhythm

    def before_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch) -> None:
        """The batch of a pass has come."""

    def between_steps(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Before the first pass of a step, behind the validation that belongs to the step before; and after the last step."""

    def finish(self, trainer: pl.Trainer) -> None:
        """Training ends here: what is under way is brought to its end."""

    def after_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch) -> None:
        """A pass is over."""

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """A step is over: ``trainer.global_step`` counts it."""


class Rhythm(pl.Callback):
    """Calls the callbacks of a run in ``order``, stops the run when asked, and lets the watchdog rest in what may take long.

    The watchdog also rests while the user's own callbacks work between two passes.
    """

    def __init__(self, run: RunConfig, order: Sequence[StepCallback], request: StopRequest | None = None) -> None:
        self.times = due_times(run)
        self.max_steps = run.training.max_steps
        self.order = list(order)
        self.stop = StopOnRequest(request or StopRequest())
        self.watchdog = Watchdog(run.safety.stall_seconds)
        self.step = 0  # (from 1) to which the passes belong
        self.is_over = True  # that step
        self.leaving = False  # training ends with it: it is the last one, or the run was asked to stop
        for callback in self.order:
            callback.rhythm = self

    @property
    def callbacks(self) -> list[pl.Callback]:
        """What a Trainer is given, in any order."""
        return [self, self.stop, *self.order, self.watchdog]

    def due(self, event: Event) -> bool:
        """Whether something comes with this step."""
        return self.times[event].due(self.step, self.max_steps)

    @property
    def saves(self) -> bool:
        """Whether this step is kept, when it is over."""
        return self.leaving or self.due("checkpoint")

    def asked_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether the run is to stop before the next step. All ranks wait for each other here."""
        return self.stop.now(trainer)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What happens inside may take as long as it takes."""
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

    def on_train_batch_start(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch, i: int) -> None:
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
        self.watchdog.rest()  # until all callbacks are done

    def on_train_batch_end(self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch, i: int) -> None:
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
