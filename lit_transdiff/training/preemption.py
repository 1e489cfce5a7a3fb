"""Stopping on request: after a signal, a closed terminal or Ctrl-C, the run saves at the end of the step.

The exit code tells the scheduler whether to start the job again.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_transdiff.base.endings import STOP_SIGNALS, Preempted, code_of, ending_when_asked

PATIENCE = 30.0  # seconds that a step may take after the request


class StopRequest:
    """Whether this process was asked to stop.

    The handler only notes it: saving in a handler deadlocks ranks.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.since = math.inf  # the time.monotonic() of the request
        self.heard: list[int] = []

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is None and os.environ.get("LOCAL_RANK", "0") == "0":
            said = "Ctrl-C: the run is saved at the end of this step; a second one quits at once."
            os.write(2, f"\nlit-transdiff: {said}\n".encode())
        if self.received is None:
            self.received, self.since = signal.Signals(number).name, time.monotonic()

    @property
    def code(self) -> int:
        """The exit code for the signal received, 0 if none was."""
        return 0 if self.received is None else code_of(signal.Signals[self.received])

    def listen(self) -> None:
        """Install the handlers again, because Lightning installs its own."""
        for number in self.heard:
            signal.signal(number, self.handle)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen in the block, then restore the handlers and pass on a signal that no step has handled."""
    request = StopRequest()
    with ending_when_asked(request.handle):
        request.heard = [number for number in STOP_SIGNALS if signal.getsignal(number) == request.handle]
        yield request
    if request.received is not None and callable(signal.getsignal(signal.Signals[request.received])):
        signal.raise_signal(signal.Signals[request.received])


class StopOnRequest(pl.Callback):
    """Lets all ranks save between two steps and ``leave`` together if any rank was asked to stop."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.latest: Arriving | None = None
        self.agreed = False  # all ranks know of the request

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.request.listen()
        if trainer.received_sigterm:
            self.request.received, self.request.since = "SIGTERM", time.monotonic()

    def asked(self, trainer: pl.Trainer) -> bool:
        """Whether the run ends before the next step. All ranks must call this once per step."""
        return self.agreed or self.any_rank(trainer)

    def leave(self, trainer: pl.Trainer, stage: pl.LightningModule) -> NoReturn:
        """End the run after its last step was saved: raise ``Preempted`` on all ranks."""
        code = int(
            trainer.strategy.reduce(torch.tensor(self.request.code, device=stage.device), reduce_op="max")
        )
        where, step = self.request.received or "another rank was asked", trainer.global_step
        state = f"the checkpoint of step {step} is complete" if step > 0 else "no step was taken yet"
        raise Preempted(f"asked to stop ({where}): {state}; the same command goes on from there.", code)

    def is_impatient(self, trainer: pl.Trainer) -> bool:
        """Whether a step of many passes takes too long; several ranks always complete it together."""
        return trainer.world_size == 1 and time.monotonic() >= self.request.since + PATIENCE

    def break_off(self, trainer: pl.Trainer) -> NoReturn:
        """End the run in the middle of a step: raise ``Preempted``."""
        lost = f"step {trainer.global_step + 1} did not end in {PATIENCE:.0f} s and is broken off"
        text = f"{lost}; the same command goes on from the checkpoint before it."
        raise Preempted(f"asked to stop ({self.request.received}): {text}", self.request.code)

    def now(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to stop, known at once: all ranks wait for each other here."""
        self.agreed = self.agreed or not trainer.strategy.reduce_boolean_decision(
            self.request.received is None
        )
        return self.agreed

    def any_rank(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to stop, known one step later: each step sums one number over ranks.

        Only the previous step's sum is read, so that the host does not wait for the devices.
        """
        asked = self.request.received is not None
        if trainer.world_size == 1:
            return asked
        sum_of_ranks = torch.full((), int(asked), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(sum_of_ranks)
        before, self.latest = self.latest, Arriving(sum_of_ranks)
        return before is not None and before.value() > 0


class Arriving:
    """A number on its way from the device to the host."""

    def __init__(self, number: Tensor) -> None:
        self.number, self.arrived = number, None
        if number.is_cuda:
            self.number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(
                number, non_blocking=True
            )
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def value(self) -> float:
        """Wait until the number has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.number.item()
