"""A step waits for nothing: no number is fetched from the device unless it is logged or saved."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # item(), float(), if tensor
    torch.ops.aten.nonzero.default,  # indexing by a boolean mask
    torch.ops.aten.equal.default,
}


class Waits(TorchDispatchMode):
    """Counts operations for which a GPU's host would wait, by the place that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            frames = [
                f"{f.filename}:{f.lineno}"
                for f in traceback.extract_stack()
                if "_python_dispatch" not in f.filename
            ]
            self.places[" < ".join(frames[-2::-1][:3])] += 1
        return func(*args, **(kwargs or {}))


def waits(folder: Path, steps: int, **settings: Any) -> Counter[str]:
    rare = {"log_every": 100, "checkpoint_every": 100, "micro_batch_size": 4, **settings.pop("training", {})}
    run = small_run(folder, name=f"steps-{steps}", training={**rare, "max_steps": steps}, **settings)
    with Waits() as found:
        train(run, say=lambda text: None)
    return found.places


@pytest.mark.parametrize("stage", ["ar_pretrain", "mrar_finetune"])
def test_more_steps_fetch_no_more_numbers(tmp_path: Path, stage: str):
    settings = {"stage": stage, "model": {"num_references": 4 if stage == "mrar_finetune" else 1}}
    few, many = waits(tmp_path, 3, **settings), waits(tmp_path, 7, **settings)
    assert sum(few.values()) > 0  # the end of a run saves and validates
    assert many == few, many - few
