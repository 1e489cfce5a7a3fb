"""Trains a run and kills itself on the way. ``python -m tests.distributed.killed RUN.json WHERE STEP RANK``.

WHERE: nowhere, step (in the forward pass), save (files are written, the marker is not), validation, worker (a data worker), or a
number of seconds after the first step. What each step used is written beside the run folder.
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
from pathlib import Path
from typing import Any

import torch

import lit_transdiff.distributed.saving as saving
from lit_transdiff.loading import run_from
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.trainer import train

WHERE, STEP, RANK = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def die() -> None:
    if int(os.environ.get("RANK", 0)) == RANK:
        Path(sys.argv[1]).with_suffix(".time").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


def watch_steps(record: Path) -> None:
    """Record what each forward pass of training uses; die there if asked to."""
    original = TransDiffStage.objective

    def objective(self: Any, batch: Any, normal: Any) -> Any:
        if self.trainer.training:
            with open(record, "a") as file:
                file.write(json.dumps([self.global_step, batch.samples.flatten().tolist()]) + "\n")
            if self.global_step == STEP and WHERE == "step":
                die()
            if self.global_step == STEP and WHERE == "worker" and int(os.environ.get("RANK", 0)) == RANK:
                Path(sys.argv[1]).with_suffix(".time").write_text(str(time.time()))
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            if WHERE[0].isdigit() and not any(thread.name == "killer" for thread in threading.enumerate()):
                killer = threading.Timer(float(WHERE), die)
                killer.name = "killer"
                killer.daemon = True
                killer.start()
        elif self.global_step == STEP and WHERE == "validation":
            die()
        return original(self, batch, normal)

    TransDiffStage.objective = objective  # type: ignore[method-assign]


def watch_saves() -> None:
    """Die when all files of the checkpoint of STEP are there but its marker is not; or, on another rank, before its own file."""
    finish, write = saving.finish_checkpoint, saving.write_rank_file

    def finish_checkpoint(partial: Path, *rest: Any) -> Any:
        if f"{STEP:08d}" in partial.name:
            die()
        return finish(partial, *rest)

    def write_rank_file(partial: Path, rank: int, tensors: Any) -> None:
        if f"{STEP:08d}" in partial.name and rank > 0:
            die()
        write(partial, rank, tensors)

    saving.finish_checkpoint, saving.write_rank_file = finish_checkpoint, write_rank_file


def main() -> None:
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    run = run_from(json.loads(Path(sys.argv[1]).read_text()))
    watch_steps(run.folder.with_name(f"{run.name}-rank-{os.environ.get('RANK', 0)}.jsonl"))
    if WHERE == "save":
        watch_saves()
    train(run)


if __name__ == "__main__":
    main()
