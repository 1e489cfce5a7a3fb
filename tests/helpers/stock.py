"""Fits by Lightning's own Trainer and strategies; started by torchrun with a folder, in which ``found.json``
is left.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lit_transdiff.distributed.strategies import DDP
from lit_transdiff.stages.holders import averages_of
from lit_transdiff.training.build import build
from tests.helpers.small import NO_DROPOUT, small_run

STEPS, SAVED = 6, 3
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "ours": DDP,
    "fsdp": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
}


def fit(folder: Path, name: str, resume: bool) -> dict[str, Any]:
    """Losses, and the averages at the end, of a run from the beginning or from its
    checkpoint of step SAVED.
    """
    pl.seed_everything(0, verbose=False)
    parts = build(small_run(folder, model=NO_DROPOUT, training={"max_steps": STEPS}))
    saves = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    several: dict[str, Any] = {"devices": 2, "strategy": STRATEGIES[name]()} if name in STRATEGIES else {}
    trainer = pl.Trainer(
        max_steps=STEPS,
        callbacks=[] if resume else [saves],
        enable_checkpointing=not resume,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **several,
    )
    trainer.fit(
        parts.stage, datamodule=parts.data, ckpt_path=folder / name / f"step={SAVED}.ckpt" if resume else None
    )
    averages = averages_of(trainer).averaged_state()
    norm = torch.stack([value.double().square().sum() for value in averages.values()]).sum().sqrt().item()
    return {
        "step": trainer.global_step,
        "norm": norm,
        **{key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    found = {name: [fit(folder, name, resume) for resume in (False, True)] for name in STRATEGIES}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
