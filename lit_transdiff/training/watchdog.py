"""The watchdog ends a process without progress and reports its state, so that no job hangs."""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed

from lit_transdiff.base.endings import EXIT_STALLED
from lit_transdiff.data.names import planned_names
from lit_transdiff.distributed.flight_recorder import last_collectives

WAITING = "waiting for data"


class Watchdog(pl.Callback):
    """End the process with ``EXIT_STALLED`` when a step, or its data, takes longer than ``seconds``.

    The rhythm of the run pauses it during work of any length. With ``seconds`` 0 it is off.
    """

    def __init__(self, seconds: float, folder: Path) -> None:
        self.seconds = seconds
        self.folder = folder  # the run folder
        self.poll = min(1.0, seconds / 4)
        self.busy_with: tuple[str, int] | None = None  # (activity, micro-step); None between two steps
        self.last = ("starting", 0)
        self.since = time.monotonic()
        self.stop = threading.Event()

    def watch(self, what: str, micro_step: int) -> None:
        self.since, self.last = time.monotonic(), (what, micro_step)
        self.busy_with = self.last

    def rest(self) -> None:
        self.busy_with = None

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.rest()
        if self.seconds == 0:
            return
        self.stop.clear()
        threading.Thread(target=self.look, args=(trainer,), daemon=True, name="watchdog").start()

    def on_train_epoch_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.watch(WAITING, trainer.global_step * trainer.accumulate_grad_batches)

    def on_train_batch_start(
        self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Any, i: int
    ) -> None:
        self.watch("computing", i)

    def on_train_batch_end(
        self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.watch(WAITING, i + 1)

    def on_validation_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.watch(WAITING, trainer.global_step * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.stop.set()

    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        self.stop.set()
        # Either torch's loader reports it, or the pipe breaks on which the worker was sending a batch.
        broken = isinstance(exception, ConnectionError | EOFError) and self.last[0] == WAITING
        if broken or "DataLoader worker" in str(exception):
            print(self.describe(trainer, "lost a data worker", *self.last), file=sys.stderr, flush=True)
        if isinstance(exception, torch.distributed.DistError):  # a collective failed, or took too long
            self.tell_collectives(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """The thread's function: check every ``poll`` seconds."""
        while not self.stop.wait(self.poll):
            busy = self.busy_with
            if busy is not None and time.monotonic() - self.since > self.seconds:
                try:
                    problem = f"stalled for {self.seconds:.0f} s (safety.stall_seconds)"
                    print(self.describe(trainer, problem, *busy), file=sys.stderr, flush=True)
                    self.tell_collectives(trainer)
                    faulthandler.dump_traceback(all_threads=True)
                finally:  # even if the message fails
                    os._exit(EXIT_STALLED)

    def tell_collectives(self, trainer: pl.Trainer) -> None:
        if told := last_collectives(self.folder, trainer.global_rank):
            print(f"lit-transdiff: {told}", file=sys.stderr, flush=True)

    def describe(self, trainer: pl.Trainer, problem: str, what: str, micro_step: int) -> str:
        shown = planned_names(trainer.datamodule, micro_step)  # type: ignore[attr-defined]
        step = micro_step // trainer.accumulate_grad_batches + 1
        return (
            f"lit-transdiff: rank {trainer.global_rank} on {platform.node()}: {problem} while {what} in step "
            f"{step}. Samples of that batch: {shown}. This process ends now."
        )
