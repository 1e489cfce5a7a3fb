"""The rank that makes the others wait.

In a step all ranks wait for the slowest, so that steps take equally long everywhere. Ranks differ in their
own work before they meet the others: the wait for data, and the forward pass. (With zero3 and fsdp, ranks
also meet in the forward pass, and only the wait for data is a rank's own.)

Shapes: W ranks.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.stages.base import log_now
from lit_transdiff.tracking.wandb_run import WandbRun
from lit_transdiff.training.rhythm import StepCallback

log = logging.getLogger(__name__)
LOOKS = 3  # times in a row that a rank lags before it is named
LEAST = 0.005  # seconds a step by which a rank must exceed the median: less is the clock's noise


class SlowRanks(StepCallback):
    """Gather every rank's own work when numbers are logged, and name a rank that lags again and again, once.

    It is the last of a run's step callbacks, so that what the others do is nobody's own work.
    """

    def __init__(self, run: RunConfig, tracker: WandbRun | None) -> None:
        self.run = run
        self.tracker = tracker
        self.in_a_row: tuple[int, int] = (
            -1,
            0,
        )  # the slowest rank, and how often it has lagged without a break
        self.named: set[int] = set()  # the ranks that this process has named

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.reset()
        self.free_since = time.perf_counter()
        self.began: float | torch.cuda.Event = self.free_since

    def reset(self) -> None:
        self.waited, self.computed, self.steps = 0.0, 0.0, 0
        self.passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def before_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch) -> None:
        self.waited += time.perf_counter() - self.free_since
        self.begin(stage)

    def between_steps(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.begin(stage)  # other callbacks may just have saved a checkpoint

    def begin(self, stage: pl.LightningModule) -> None:
        self.began = event() if stage.device.type == "cuda" else time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.free_since = time.perf_counter()

    def on_before_backward(self, trainer: pl.Trainer, stage: pl.LightningModule, loss: Tensor) -> None:
        if isinstance(self.began, float):
            self.computed += time.perf_counter() - self.began
        else:
            self.passes.append((self.began, event()))

    def after_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch) -> None:
        self.free_since = time.perf_counter()

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.steps += 1
        if self.rhythm.due("numbers"):
            self.compare(trainer, stage)
            self.reset()
        self.free_since = time.perf_counter()

    def compare(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Gather the seconds of all ranks (one small collective), log the slowest, and name it if it lags."""
        for began, ended in self.passes:
            ended.synchronize()
            self.computed += began.elapsed_time(ended) / 1000
        own = torch.tensor([self.waited, self.computed], device=stage.device) / self.steps
        parts = trainer.strategy.all_gather(own).view(-1, 2).cpu()  # [W, 2]
        slowest, lag = lag_of(parts.sum(dim=1).tolist())
        log_now(trainer, {"throughput/slowest_rank": float(slowest), "throughput/slowest_rank_lag": lag})
        before = self.in_a_row[1] if self.in_a_row[0] == slowest else 0
        self.in_a_row = slowest, before + 1 if lag >= self.run.safety.slow_rank else 0
        if self.in_a_row[1] >= LOOKS and slowest not in self.named:
            self.named.add(slowest)
            self.tell(trainer, slowest, lag, parts)

    def tell(self, trainer: pl.Trainer, slowest: int, lag: float, parts: Tensor) -> None:
        """Name the rank and its node, in the log and by an alert."""
        node = trainer.strategy.broadcast(platform.node(), src=slowest)
        if not trainer.is_global_zero:
            return
        waited, computed = parts[slowest].tolist()
        text = (
            f"rank {slowest} on {node} makes the others wait: its own work takes {waited + computed:.3g} s a "
            f"step (waiting for data {waited:.3g} s, forward pass {computed:.3g} s), {lag:.2f} times the "
            f"median of the ranks (safety.slow_rank)"
        )
        log.warning("step %d: %s", trainer.global_step, text)
        if self.tracker is not None:
            with self.rhythm.resting():
                self.tracker.alert(f"{self.run.name}: a slow rank", text)


def event() -> torch.cuda.Event:
    """The moment that the GPU reaches."""
    moment = torch.cuda.Event(enable_timing=True)
    moment.record()
    return moment


def lag_of(seconds: Sequence[float]) -> tuple[int, float]:
    """The slowest of W ranks, and its seconds as a multiple of their median; 1 within the clock's noise."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    median = sorted(seconds)[(len(seconds) - 1) // 2]  # the lower one: of two ranks, the faster
    lags = seconds[slowest] - median > LEAST and median > 0
    return slowest, seconds[slowest] / median if lags else 1.0
