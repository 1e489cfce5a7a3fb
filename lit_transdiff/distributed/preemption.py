"""Being asked to stop: SIGTERM or SIGUSR1 -> save at the end of the step, and exit so that a scheduler starts the job again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from lit_transdiff.distributed.saving import Checkpoints
from lit_transdiff.endings import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. The handler does nothing else: saving inside one deadlocks several ranks."""

    def __init__(self) -> None:
        self.received: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def listen(self) -> None:
        """Take the signals (again: Lightning takes them too). Only the main thread of a process can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.handle)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens inside, and gives the signals back."""
    request = StopRequest()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    request.listen()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnRequest(pl.Callback):
    """Between two steps, when any rank was asked to stop: all ranks save together and raise ``Preempted``.

    ``before_save`` is called before the save, which may take long.
    """

    def __init__(self, request: StopRequest, checkpoints: Checkpoints, before_save: Callable[[], None]) -> None:
        self.request = request
        self.checkpoints = checkpoints
        self.before_save = before_save

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.request.listen()
        if trainer.received_sigterm:
            self.request.received = "SIGTERM"

    def on_train_batch_start(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Any, i: int) -> None:
        if i % trainer.accumulate_grad_batches:
            return
        if not self.any_rank(trainer):
            return
        self.before_save()
        step = trainer.global_step
        if step > 0 and step != self.checkpoints.saved_step:
            self.checkpoints.save(trainer)
        self.checkpoints.settle(trainer)
        where = self.request.received or "another rank was asked"
        kept = f"the checkpoint of step {step} is complete" if step > 0 else "no step was taken yet"
        raise Preempted(f"asked to stop ({where}): {kept}; the same command goes on from there.")

    def any_rank(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked: one number, summed over the ranks in every step."""
        asked = torch.tensor(int(self.request.received is not None), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(asked)
        return asked.item() > 0
