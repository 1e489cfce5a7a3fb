"""An export for others: the files by which diffusers opens it, and all that it needs on another machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_transdiff.base.files import sealed
from lit_transdiff.base.hub import is_on_hub
from lit_transdiff.config import AutoencoderConfig
from lit_transdiff.config.targets import files_in, save_tensors
from lit_transdiff.models.autoencoder import autoencoder_kind

INFO = "export.json"  # describes the folder and marks it as an export
OWN_AUTOENCODER = "autoencoder"  # the folder of the autoencoder in an export that has its own
# diffusers takes the pipeline's class from pipeline.py, and its only component from the folder ``run``.
INDEX = {"_class_name": ["pipeline", "TransDiffPipeline"], "run": ["trained_run", "TrainedRun"]}
OF_DIFFUSERS = {
    "model_index.json": json.dumps(INDEX, indent=2) + "\n",
    "pipeline.py": "from lit_transdiff.sampling.pipeline import TransDiffPipeline  # noqa: F401\n",
    "run/trained_run.py": "from lit_transdiff.sampling.pipeline import TrainedRun  # noqa: F401\n",
}


def write_generator(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of a generator, and the files by which diffusers opens the folder."""
    save_tensors(state, folder / "model.safetensors")
    for name, text in OF_DIFFUSERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def portable(
    folder: Path, names: Iterable[str], info: Mapping[str, Any], autoencoder: AutoencoderConfig
) -> dict[str, Path | bytes]:
    """The files ``names`` of the export in ``folder``, and its autoencoder's, unless that is on the Hub.

    ``info`` is its ``export.json``. These files, in any folder, are an export that needs no other folder.
    """
    files: dict[str, Path | bytes] = {name: text.encode() for name, text in OF_DIFFUSERS.items()}
    files |= {name: folder / name for name in names}
    paths = {}
    if autoencoder.path is not None and not is_on_hub(autoencoder.path):
        paths = {"autoencoder.path": OWN_AUTOENCODER}
        place, patterns = Path(autoencoder.path), autoencoder_kind(autoencoder.kind, autoencoder.path).files
        own = [name for name in files_in(place) if any(fnmatch(name, pattern) for pattern in patterns)]
        files |= {f"{OWN_AUTOENCODER}/{name}": place / name for name in own}
    return files | {INFO: sealed({**info, "paths": paths, "files": sorted({*files, INFO})})}
