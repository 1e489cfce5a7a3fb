"""The files of the released training, read without running code from them: state dicts, epoch and arguments."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.config import require
from lit_transdiff.files import short_hash

CHECKPOINT = "checkpoint-last.pth"
KNOWN = {"model", "model_ema", "optimizer", "scaler", "epoch", "args"}  # what the released training writes


@dataclass(frozen=True)
class Checkpoint:
    """A released file, read: its state dicts, and the rest by name."""

    path: Path
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None
    epoch: int | None
    args: dict[str, Any]
    ignored: list[str]  # entries that are not converted


def released_file(source: Path) -> Path:
    """The checkpoint in a released folder; any other source is taken as it is."""
    if (source / CHECKPOINT).is_file():
        return source / CHECKPOINT
    numbered = sorted(file.name for file in source.glob("checkpoint-*.pth")) if source.is_dir() else []
    require(not numbered, "source", str(source), f"the file itself, as the folder has no {CHECKPOINT}: {', '.join(numbered)}")
    return source


def read_file(path: Path) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` file, without running code from it: tensors, plain values and argparse's Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint that can be read without running code from it: {why(error)}") from error
    require(isinstance(content, dict), str(path), type(content).__name__, "a dictionary of state dicts")
    return content


def why(error: Exception) -> str:
    """What torch refused in a file, without its advice to run the code all the same."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    return f"it asks for {refused[1]}" if refused else str(error).strip().split("\n")[0] or "it is empty"


def state_dict(value: Any, name: str, path: Path) -> dict[str, Tensor]:
    """``value``, if it is a state dict: names of tensors. Raises ``ValueError`` listing what is not."""
    require(isinstance(value, Mapping), f"{path}: {name}", type(value).__name__, "a state dict")
    strange = [f"{key}: {type(item).__name__}" for key, item in value.items() if not isinstance(item, Tensor)]
    if strange:
        raise ValueError(f"{path}: {name}: entries that are no tensors: {', '.join(strange[:10])}")
    return dict(value)


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: lists for tuples, text for what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


def open_checkpoint(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """The parts of a released file; a bare state dict counts as its ``model``."""
    bare = "model" not in content
    args = content.get("args")
    return Checkpoint(
        path=path,
        model=dict(content if bare else content["model"]),
        model_ema=None if content.get("model_ema") is None else state_dict(content["model_ema"], "model_ema", path),
        epoch=None if bare else content.get("epoch"),
        args=dict(vars(args)) if isinstance(args, argparse.Namespace) else {},
        ignored=[] if bare else sorted((content.keys() - KNOWN) | (content.keys() & {"optimizer", "scaler"})),
    )


def identity(file: Path) -> dict[str, str]:
    """Which file something was converted from."""
    return {"file": file.name, "hash": short_hash(file)}
