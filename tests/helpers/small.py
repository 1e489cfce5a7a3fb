"""A run that is small enough for a test: real bundled images, no autoencoder, a few thousand parameters."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import read_json
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import merge, run_from

ROOT = Path(__file__).parents[2]
FASHION = ROOT / "data" / "fashion"

# AdamW divides each gradient by its size. Where that is all rounding (1e-9 to 1e-7 here; of the keys' biases
# always), any two ways of computing the same run apart by whole steps, unless eps stands above it.
STEADY = {"eps": 1e-3}
NO_DROPOUT = {"attention_dropout": 0.0, "projection_dropout": 0.0}  # dropout draws other masks on every rank
SETTINGS: dict[str, Any] = {
    "name": "small",
    "stage": "ar_pretrain",
    "data": {
        "train": str(FASHION / "train"),
        "evaluation": str(FASHION / "evaluation"),
        "image_size": 32,
        "image_channels": 1,
    },
    "autoencoder": {"kind": "identity"},
    "model": {
        "size": "test",
        "num_classes": 10,
        "num_class_tokens": 2,
        "latent_channels": 1,
        "latent_size": 32,
        "patch_size": 8,
        "num_context_tokens": 16,
    },
    "flow": {"num_noise_draws": 2},
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9, "warmup_steps": 2},
    "training": {
        "max_steps": 6,
        "global_batch_size": 8,
        "log_every": 2,
        "checkpoint_every": 2,
        "num_validation_samples": 20,
    },
    "sampling": {"num_steps": 2},
    "tracking": {"wandb": False},
}


SHAPE = {"size": "test", "num_classes": 10, "latent_channels": 1, "latent_size": 32, "patch_size": 8}
TOKEN_SETS = {"num_class_tokens": 2, "num_parts": 4, **NO_DROPOUT}
# What each other family changes in SETTINGS.
FAMILIES: dict[str, dict[str, Any]] = {
    "transdiff_parts": {
        "stage": "pretrain",
        "model": {
            "paradigm": "transdiff_parts",
            **SHAPE,
            **NO_DROPOUT,
            "num_class_tokens": 2,
            "order": "random",
        },
    },
    "sit": {"stage": "pretrain", "model": {"paradigm": "sit", **SHAPE}},
    "dit": {"stage": "pretrain", "model": {"paradigm": "dit", **SHAPE}, "sampling": {"solver": "ancestral"}},
    "acdit": {
        "stage": "pretrain",
        "model": {"paradigm": "acdit", **SHAPE},
        "sampling": {"solver": "dpmpp_2m", "grid": "nonzero"},
    },
    "xar": {
        "stage": "pretrain",
        "model": {"paradigm": "xar", **SHAPE, **NO_DROPOUT},
        "sampling": {"part_guidance": "growing"},
    },
    "flowar": {
        "stage": "pretrain",
        "model": {"paradigm": "flowar", **SHAPE, **NO_DROPOUT},
        "sampling": {"solver": "euler", "grid": "dense_end", "part_guidance": "growing"},
    },
    "ardiff": {
        "stage": "pretrain",
        "model": {"paradigm": "ardiff", **SHAPE, "order": "random"},
        "sampling": {"solver": "ancestral", "part_guidance": "growing"},
    },
    "mar": {
        "stage": "pretrain",
        "model": {"paradigm": "mar", **SHAPE, **TOKEN_SETS},
        "sampling": {"solver": "ancestral"},
    },
}


def small_run(folder: Path, **changes: Any) -> RunConfig:
    """``SETTINGS`` with ``changes`` (nested dictionaries), writing below ``folder``; a ``model.paradigm`` has
    its own model.
    """
    base = SETTINGS if "paradigm" not in changes.get("model", {}) else {**SETTINGS, "model": {}}
    return run_from(merge(base, {"output_dir": str(folder), **changes}))


def without_checksums(*files: Path) -> None:
    """Take the checksums out of JSON files: such were written by earlier versions."""
    for file in files:
        file.write_text(
            json.dumps({name: value for name, value in read_json(file).items() if name != "crc32"})
        )


def twice(act: Callable[[], object]) -> list[object]:
    """The results of a function that two threads call at once; an error is raised here."""
    together = threading.Barrier(2)

    def one(_: int) -> object:
        together.wait()
        return act()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))
