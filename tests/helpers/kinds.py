"""One run of each kind that takes memory and time in its own way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_transdiff.config import RunConfig
from tests.helpers.small import FAMILIES, small_run

MIDDLE = {
    "width": 64,
    "num_heads": 4,
    "encoder_blocks": 3,
    "decoder_blocks": 2,
    "patch_size": 4,
    "num_context_tokens": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "one-step": {"model": MIDDLE},
    "recomputed": {"model": MIDDLE, "training": {"activation_checkpointing": "all"}},
    "decoder recomputed": {"model": MIDDLE, "training": {"activation_checkpointing": "decoder"}},
    "every other": {
        "model": MIDDLE,
        "training": {"activation_checkpointing": "all", "activation_checkpointing_every": 2},
    },
    "bf16": {"model": MIDDLE, "training": {"precision": "bf16-mixed"}},
    "Muon": {"model": MIDDLE, "optimizer": {"name": "muon"}},
    "MRAR": {"stage": "mrar_finetune", "model": {**MIDDLE, "num_references": 4}},
    "SiT": FAMILIES["sit"] | {"model": {**FAMILIES["sit"]["model"], "width": 64, "patch_size": 4}},
    "DiT": FAMILIES["dit"] | {"model": {**FAMILIES["dit"]["model"], "width": 64, "patch_size": 4}},
    "parts": FAMILIES["transdiff_parts"]
    | {"model": {**FAMILIES["transdiff_parts"]["model"], "width": 64, "patch_size": 4}},
    "scales": {
        "stage": "pretrain",
        "model": {
            **FAMILIES["transdiff_parts"]["model"],
            "order": "raster",
            "parts": "scales",
            "patch_size": 4,
        },
    },
    "ACDiT": FAMILIES["acdit"] | {"model": {**FAMILIES["acdit"]["model"], "width": 64, "patch_size": 4}},
    "xAR": FAMILIES["xar"] | {"model": {**FAMILIES["xar"]["model"], "width": 64, "patch_size": 4}},
    "FlowAR": FAMILIES["flowar"]
    | {"model": {**FAMILIES["flowar"]["model"], "width": 64, "head_width": 64, "patch_size": 4}},
    "ARDiff": FAMILIES["ardiff"]
    | {"model": {**FAMILIES["ardiff"]["model"], "width": 64, "head_width": 128, "patch_size": 4}},
    "MAR": FAMILIES["mar"]
    | {"model": {**FAMILIES["mar"]["model"], "width": 64, "head_width": 128, "patch_size": 4}},
}


def kind_run(folder: Path, kind: str) -> RunConfig:
    """The small run of that kind, without dropout in attention."""
    run = small_run(folder, **KINDS[kind])
    return (
        replace(run, model=replace(run.model, attention_dropout=0.0))
        if hasattr(run.model, "attention_dropout")
        else run
    )
