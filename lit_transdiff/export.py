"""The plain form of a trained model: ``model.safetensors`` (averaged weights), ``config.yaml`` and ``export.json``.

Every command that uses a trained model reads this form; a run folder stands for the ``export`` folder in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.files import short_hash
from lit_transdiff.loading import load_run, save_yaml


@dataclass(frozen=True)
class Export:
    """A trained model as it lies on disk: its run, its weights and where they come from (step, images seen, versions)."""

    folder: Path
    run: RunConfig
    state: dict[str, Tensor]
    info: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file, 16 hexadecimal digits."""
        return short_hash(self.folder / "model.safetensors")


def export_folder(path: str | Path) -> Path:
    """The export folder that ``path`` (a run folder or an export folder) stands for.

    Raises ``FileNotFoundError`` naming the trained runs nearby when there is none.
    """
    path = Path(path)
    for candidate in (path, path / "export"):
        if (candidate / "model.safetensors").is_file():
            return candidate
    root = path if path.is_dir() else path.parent
    nearby = sorted(str(p.parent.parent) for p in root.glob("*/export/model.safetensors")) if root.is_dir() else []
    hint = f" Trained runs there: {', '.join(nearby)}." if nearby else ""
    raise FileNotFoundError(f"{path} holds no trained model (no export/model.safetensors).{hint}")


def read_export(path: str | Path) -> Export:
    """Read a trained model from a run folder or an export folder."""
    folder = export_folder(path)
    info = json.loads((folder / "export.json").read_text())
    return Export(folder, load_run(folder / "config.yaml"), load_file(folder / "model.safetensors"), info)


def write_export(folder: Path, run: RunConfig, info: Mapping[str, Any], write_weights: Callable[[Path], None]) -> None:
    """Write a trained model under a temporary name, then put it in place of what was there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(partial)
    save_yaml(run, partial / "config.yaml")
    (partial / "export.json").write_text(json.dumps(dict(info), indent=2))
    before = folder.with_name(folder.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)
    os.replace(partial, folder)
    shutil.rmtree(before, ignore_errors=True)
