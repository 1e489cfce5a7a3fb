"""Reading the files of the released training code without running code from them."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.base.files import check_zip, short_hash
from lit_transdiff.config import require
from lit_transdiff.config.checks import listed

CHECKPOINT = "checkpoint-last.pth"
# The errors of torch and zipfile for a damaged file; a UnicodeDecodeError is a ValueError.
OF_FILES = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError)
DAMAGE = (*OF_FILES, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)
log = logging.getLogger(__name__)
PARALLEL, COMPILED = "module.", "_orig_mod"  # added to names by DistributedDataParallel and torch.compile
KNOWN = {"model", "model_ema", "optimizer", "scaler", "epoch", "args"}  # entries of the training code
AVERAGES = ("model_ema", "ema")  # names of the averaged weights; the latter beside "opt" (SiT, DiT, ACDiT)
SAVE_TENSORS = "Where it was made, save its tensors alone: torch.save({'model': model.state_dict()}, FILE)"


@dataclass(frozen=True)
class ReleasedFile:
    """The content of a released file: its state dicts and the other entries."""

    path: Path
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None
    epoch: int | None
    args: dict[str, Any]
    ignored: list[str]  # entries that are not converted
    average: str = AVERAGES[0]  # the name of model_ema in the file


def released_file(source: Path) -> Path:
    """The checkpoint file in a released folder; any other source is returned unchanged."""
    if (source / CHECKPOINT).is_file():
        return source / CHECKPOINT
    numbered = sorted(file.name for file in source.glob("checkpoint-*.pth")) if source.is_dir() else []
    allowed = f"the file itself, as the folder has no {CHECKPOINT}: {', '.join(numbered)}"
    require(not numbered, "source", str(source), allowed)
    return source


def read_torch_file(path: Path) -> dict[str, Any]:
    """Load the dictionary in a ``torch.save`` file without running code from it.

    Allowed are tensors, plain values and argparse's Namespace. Raises ``ValueError`` that names the file and,
    if it is damaged, the member with the wrong checksum, because torch does not verify checksums.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        raise ValueError(
            f"{path}: not a checkpoint that can be read without running code from it: {why(error)}"
        ) from error
    require(isinstance(content, dict), str(path), type(content).__name__, "a dictionary of state dicts")
    return content


def why(error: Exception) -> str:
    """The reason for which torch refused a file, without its advice to run the code anyway."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    unread = re.search(r"WeightsUnpickler error: (.+)", str(error))
    if refused:
        return f"it asks for {refused[1]}. {SAVE_TENSORS}"
    if unread is None and "Weights only load failed" in str(error):  # the rest is advice to load it unsafely
        return f"it holds more than tensors and plain values. {SAVE_TENSORS}"
    return (unread[1] if unread else str(error)).strip().split("\n")[0] or "it is empty"


def state_dict(value: Any, name: str, path: Path) -> dict[str, Tensor]:
    """``value``, if it is a state dict (names to tensors). Raises ``ValueError`` with the wrong entries."""
    require(isinstance(value, Mapping), f"{path}: {name}", type(value).__name__, "a state dict")
    strange = [f"{key}: {type(item).__name__}" for key, item in value.items() if not isinstance(item, Tensor)]
    if strange:
        raise ValueError(f"{path}: {name}: entries that are not tensors: {listed(strange)}")
    return unwrapped(value, name, path)


def unwrapped(state: Mapping[Any, Tensor], name: str, path: Path) -> dict[str, Tensor]:
    """``state`` with the additions of training wrappers removed from its names, which is logged."""
    names = {str(key): ".".join(part for part in str(key).split(".") if part != COMPILED) for key in state}
    while names and all(short.startswith(PARALLEL) for short in names.values()):
        names = {key: short.removeprefix(PARALLEL) for key, short in names.items()}
    first = next((key for key, short in names.items() if key != short), None)
    allowed = f"names that differ without {COMPILED}"
    require(len(set(names.values())) == len(names), f"{path}: {name}", first, allowed)
    if first is not None:
        log.info("%s: %s: prefixes of wrappers are removed: %s is %s, ...", path, name, first, names[first])
    return {names[str(key)]: value for key, value in state.items()}


def check_tensors(state: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Raise ``ValueError`` with the tensors that are not dense, finite and of a floating-point dtype."""
    strange = [f"{key}: {wrong}" for key, value in state.items() if (wrong := no_weight(value))]
    if strange:
        raise ValueError(f"{path}: {name}: entries that are not weights: {listed(strange)}")


def no_weight(value: Tensor) -> str | None:
    """The reason why a tensor cannot be a weight, or None if it can."""
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.")
    if not value.is_floating_point():
        return str(value.dtype).removeprefix("torch.")
    wide = value.float() if value.dtype.itemsize < 2 else value  # torch has no isfinite for float8
    return None if bool(torch.isfinite(wide).all()) else "NaN or Inf"


def json_safe(value: Any) -> Any:
    """Convert ``value`` for JSON: lists for tuples, text for types that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


def released_parts(path: Path, content: Mapping[str, Any]) -> ReleasedFile:
    """The parts of a released file; a bare state dict counts as its ``model``.

    Raises ``ValueError`` with the entries that are not weights, and for an epoch that is not an integer.
    """
    bare = "model" not in content
    args = None if bare else arguments(content.get("args"))
    average = next((name for name in AVERAGES if content.get(name) is not None), AVERAGES[0])
    converted = {"model", average, "epoch"} | ({"args"} if args is not None else set())
    states = {"model": state_dict(content if bare else content["model"], "model", path)}
    if not bare and content.get(average) is not None:
        states[average] = state_dict(content[average], average, path)
    for name, state in states.items():
        check_tensors(state, name, path)
    return ReleasedFile(
        path=path,
        model=states["model"],
        model_ema=states.get(average),
        epoch=None if bare else whole_number(content.get("epoch"), f"{path}: epoch"),
        args=args or {},
        ignored=[] if bare else sorted(content.keys() - converted),
        average=average,
    )


def arguments(value: Any) -> dict[str, Any] | None:
    """The training arguments by name, or None if ``value`` is neither a namespace nor a dictionary."""
    if value is None:
        return {}
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return dict(value) if isinstance(value, Mapping) else None


def whole_number(value: Any, where: str) -> int | None:
    """An integer from a number or a tensor; None stays None."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    whole = number is None or isinstance(number, int) or (isinstance(number, float) and number.is_integer())
    require(whole, where, value, "a whole number")
    return None if number is None else int(number)


def identity(file: Path) -> dict[str, str]:
    """The record that identifies the source file of a conversion."""
    return {"file": file.name, "hash": short_hash(file)}
