"""Trains a run and kills itself on the way. ``python -m tests.helpers.killed RUN.json WHERE STEP RANK``.

WHERE: nowhere, step (in the forward pass), save (files are written, the marker is not), validation, scores
(of an evaluation, before they are logged), worker (a data worker), stuck (a data worker stops and stays), or
a number of seconds after the first step. What each step used is written beside the run folder.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lit_transdiff.training.checkpointing as saving
from lit_transdiff.config.loading import run_from
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.training import online_evaluation as online
from lit_transdiff.training.trainer import train


@dataclass
class Kill:
    """A death, once: at ``where`` in step ``step`` of rank ``rank``. ``time_file`` gets the moment."""

    time_file: Path
    where: str
    step: int
    rank: int
    done: bool = False

    @property
    def here(self) -> bool:
        return int(os.environ.get("RANK", 0)) == self.rank

    def process(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        self.done = True
        self.time_file.write_text(str(time.time()))
        self.time_file.with_suffix(".pid").write_text(str(number))
        os.kill(number, how)

    def die(self) -> None:
        if self.here:
            self.process(os.getpid())


def watch_steps(kill: Kill, record: Path) -> None:
    """Record what each forward pass of training uses; die there if asked to."""
    original = TransDiffStage.objective

    def objective(self: Any, batch: Any, normal: Any) -> Any:
        now = self.global_step == kill.step
        if self.trainer.training:
            with open(record, "a") as file:
                file.write(json.dumps([self.global_step, batch.samples.flatten().tolist()]) + "\n")
            if now and kill.where == "step":
                kill.die()
            # a step may have several passes
            if now and kill.where in ("worker", "stuck") and kill.here and not kill.done:
                worker = multiprocessing.active_children()[0].pid or 0
                kill.process(worker, signal.SIGKILL if kill.where == "worker" else signal.SIGSTOP)
            if kill.where[0].isdigit() and not any(
                thread.name == "killer" for thread in threading.enumerate()
            ):
                killer = threading.Timer(float(kill.where), kill.die)
                killer.name = "killer"
                killer.daemon = True
                killer.start()
        elif now and kill.where == "validation":
            kill.die()
        return original(self, batch, normal)

    TransDiffStage.objective = objective  # type: ignore[method-assign]


def watch_saves(kill: Kill) -> None:
    """Die when all files of the checkpoint of the step are there but its marker is not; on another rank,
    before its own file.
    """
    finish, write = saving.finish_checkpoint, saving.write_rank_file

    def finish_checkpoint(partial: Path, *rest: Any) -> Any:
        if f"{kill.step:08d}" in partial.name:
            kill.die()
        return finish(partial, *rest)

    def write_rank_file(partial: Path, rank: int, tensors: Any) -> None:
        if f"{kill.step:08d}" in partial.name and rank > 0:
            kill.die()
        write(partial, rank, tensors)

    saving.finish_checkpoint, saving.write_rank_file = finish_checkpoint, write_rank_file


def watch_scores(kill: Kill) -> None:
    """Die when the evaluation of the step has its scores, and before they are logged."""
    original = online.OnlineEvaluation.scores

    def scores(self: Any, trainer: Any, job: Any) -> Any:
        found = original(self, trainer, job)
        if trainer.global_step == kill.step:
            kill.die()
        return found

    online.OnlineEvaluation.scores = scores  # type: ignore[method-assign]


def main() -> None:
    file, where, step, rank = sys.argv[1:]
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    run = run_from(json.loads(Path(file).read_text()))
    kill = Kill(Path(file).with_suffix(".time"), where, int(step), int(rank))
    watch_steps(kill, run.folder.with_name(f"{run.name}-rank-{os.environ.get('RANK', 0)}.jsonl"))
    if where == "save":
        watch_saves(kill)
    if where == "scores":
        watch_scores(kill)
    train(run)


if __name__ == "__main__":
    main()
