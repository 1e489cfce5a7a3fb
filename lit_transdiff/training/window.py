"""Sums of training since numbers were last logged, preserved over a restart.

Shapes: W ranks, T time bins.
"""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

TIME_BINS = 10


class Window:
    """The sums of this rank, on its device. ``state`` covers all ranks, for checkpoints within a window."""

    def __init__(self, device: torch.device) -> None:
        self.bins = torch.zeros(2, TIME_BINS, device=device)  # sums of row losses by time, and row counts
        self.loss = torch.zeros((), device=device)  # the sum of the passes' mean losses
        self.passes = 0.0
        self.waited = 0.0  # seconds waited for data
        self.start = time.perf_counter()

    def add_rows(self, rows: Tensor, t: Tensor) -> None:
        """Add a pass by the losses of its rows and their times in [0, 1]."""
        bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        self.bins[0].index_add_(0, bins, rows.float())
        self.bins[1].index_add_(0, bins, torch.ones_like(rows, dtype=torch.float32))
        self.add(rows.mean())

    def add(self, loss: Tensor) -> None:
        """Add a pass by its mean loss."""
        self.loss += loss
        self.passes += 1

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def means(self, trainer: pl.Trainer) -> tuple[float, dict[int, float]]:
        """The mean loss, and that of each non-empty time bin, over all ranks."""
        sums = torch.cat([self.bins.flatten(), self.loss[None] / self.passes])
        *bins, loss = trainer.strategy.reduce(sums, reduce_op="mean").tolist()
        pairs = zip(bins[:TIME_BINS], bins[TIME_BINS:], strict=True)
        return loss, {b: total / rows for b, (total, rows) in enumerate(pairs) if rows > 0}

    def state(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The sums of all ranks [W, ...] and their units. All ranks must call this."""
        sums = torch.cat([self.bins.flatten(), self.loss[None]])
        ranks = trainer.strategy.all_gather(sums) if trainer.world_size > 1 else sums[None]
        return {
            "sums": ranks.cpu().clone(),
            "passes": self.passes,
            "accumulation": trainer.accumulate_grad_batches,
            "waited": self.waited,
            "seconds": self.seconds(),
        }

    def go_on(self, state: dict[str, Any], trainer: pl.Trainer) -> None:
        """Continue an earlier window: exactly with the same number of ranks, else with equal shares."""
        sums, world = state["sums"].to(self.loss.device), trainer.world_size
        own = sums[trainer.global_rank] if len(sums) == world else sums.mean(dim=0)
        share = 1.0 if len(sums) == world else len(sums) / world  # a mean loss needs no share
        longer = trainer.accumulate_grad_batches / state["accumulation"]  # current passes per earlier pass
        self.bins = own[:-1].view(2, TIME_BINS) * share
        self.loss = own[-1] * longer
        self.passes, self.waited = state["passes"] * longer, state["waited"]
        self.start = time.perf_counter() - state["seconds"]
