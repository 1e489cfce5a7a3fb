"""Started by torchrun from the tests: several fits in one pair of processes. ``python fits.py PLAN.json``.

The plan is a list of [settings of a run, step at which it is broken off or null]; the last line of output
says that all are done.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

import torch

from lit_transdiff.config.loading import run_from
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.training.trainer import train


class PowerCut(RuntimeError):
    """The run is broken off here."""


def break_off_at(step: int | None) -> None:
    """Make every rank fail in the forward pass after ``step`` steps."""
    original = getattr(TransDiffStage, "whole_objective", TransDiffStage.objective)
    TransDiffStage.whole_objective = original  # type: ignore[attr-defined]

    def objective(self, batch, normal):  # type: ignore[no-untyped-def]
        if step is not None and self.global_step == step and self.trainer.training:
            raise PowerCut(f"step {step}")
        return original(self, batch, normal)

    TransDiffStage.objective = objective  # type: ignore[method-assign]


def main() -> None:
    faulthandler.dump_traceback_later(880, exit=True)
    torch.set_num_threads(1)
    for settings, step in json.loads(Path(sys.argv[1]).read_text()):
        print("fit", settings["name"], flush=True)
        break_off_at(step)
        try:
            train(run_from(settings))
        except PowerCut as error:
            print("broken off at", error, flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
