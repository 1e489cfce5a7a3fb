"""Checks of a command's paths before large libraries are imported, so that errors appear at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from lit_transdiff.base.hub import hub_place, is_on_hub, local, pinned
from lit_transdiff.base.remote import is_remote
from lit_transdiff.config import expanded, require, shipped
from lit_transdiff.config.checks import BUNDLED, roots

# Arguments and options in which ~ and $NAME are replaced, and those of them that are written to.
PATHS = (
    "source dest folder file run pipeline run_folder checkpoint output shards "
    "autoencoder recipe weights vae inception reference experiments"
).split()
MADE_HERE = ("dest", "output", "folder")
# Where the export lies in a run folder, and in a repository of the Hub; and the files that it may have.
OF_RUN = ("", "export/", "run/export/")
OF_EXPORT = ("model.safetensors", "config.yaml", "export.json", "autoencoder/*")


def expand_paths(args: argparse.Namespace) -> None:
    """Expand ``~`` and shipped paths in ``--option=PATH``, and refuse URLs where files are written."""
    for name, value in vars(args).items():
        if name in PATHS and isinstance(value, str):
            path = expanded(value, name.replace("_", "-"))
            elsewhere = is_on_hub(path) if name == "folder" else is_remote(path)
            require(name not in MADE_HERE or not elsewhere, name, path, "a path of this machine")
            setattr(args, name, path if name in MADE_HERE else shipped(path))


def check_files(files: Mapping[str, Path]) -> None:
    """Refuse missing files, listing all of them; the keys are their names in the message."""
    missing = [f"{name}: {path}" for name, path in files.items() if not path.is_file()]
    require(not missing, "files", "; ".join(missing), "files that exist")


def parse_names(text: str | None) -> list[str] | Path | None:
    """Comma-separated names, or the path of a file with names, if it looks like a path."""
    if text is None:
        return None
    is_path = "," not in text and ("/" in text or text.endswith(".txt"))
    path = Path(expanded(text, "--class-names") if is_path else text)
    if is_path:
        check_files({"--class-names": path})
    return path if path.is_file() else text.split(",")


def check_pack_source(source: Path) -> None:
    """Refuse a missing source of ``pack``."""
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; allowed: an image folder, a folder of IDX files, a list file."
        )


def check_source(source: Path) -> None:
    """Refuse a missing source of ``convert``."""
    require(source.exists(), "source", str(source), "a file or folder that exists")


def check_pipe(source: str, permitted: bool) -> None:
    """Refuse ``pipe:`` data unless permitted, because a recipe from others must not run commands."""
    allowed = (
        "a folder or a URL of http(s)://; this runs a command, which only the option --allow-pipe permits"
    )
    require(permitted or not source.startswith("pipe:"), "data.train", source, allowed)


def export_folder(path: str | Path) -> Path:
    """The export folder of ``path``, a run folder or an export folder, also on the Hub.

    Raises ``FileNotFoundError`` with the trained runs nearby if there is none.
    """
    asked, path = path, local(path, [f"{folder}{name}" for folder in OF_RUN for name in OF_EXPORT])
    for candidate in (path / folder for folder in OF_RUN):
        if (candidate / "model.safetensors").is_file():
            return candidate
    root = path if path.is_dir() else path.parent
    nearby = (
        sorted(str(p.parent.parent) for p in root.glob("*/export/model.safetensors")) if root.is_dir() else []
    )
    hint = f" Trained runs there: {', '.join(nearby)}." if nearby else ""
    raise FileNotFoundError(f"{asked} holds no trained model (no export/model.safetensors).{hint}")


def uploaded_folder(path: str | Path) -> Path:
    """The export folder of ``path``, a run folder or an export folder of any stage on this machine."""
    for candidate in (Path(path) / folder for folder in OF_RUN):
        if (candidate / "export.json").is_file():
            return candidate
    return export_folder(path)


def trained_place(checkpoint: str) -> str:
    """The place of a trained model, on the Hub with its commit. ``FileNotFoundError`` if there is none."""
    place = pinned(checkpoint)
    export_folder(place)
    return place


def results_folder(checkpoint: str | Path) -> Path:
    """The folder for results of a trained model: its own, or for shipped models and the Hub one in runs."""
    if is_on_hub(checkpoint):
        return Path("runs", "hub", *hub_place(str(checkpoint)).repo.split("/"))
    path = Path(checkpoint)
    bundled = any(path.resolve().is_relative_to((root / BUNDLED).resolve()) for root in roots())
    return Path("runs", "bundled", path.name) if bundled else path


def checkpoints_folder(run_folder: str | Path) -> Path:
    """The folder of a run's checkpoints. Raises ``FileNotFoundError`` if there is none."""
    folder = Path(run_folder) / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{run_folder} holds no complete checkpoint.")
    return folder


def local_path(where: str | Path) -> Path | None:
    """The path ``where``, or None for ``entity/project`` at W&B. Raises ``FileNotFoundError`` for neither."""
    path = Path(where).expanduser()
    if path.exists():
        return path
    if str(where).count("/") == 1 and not str(where).startswith((".", "/")) and not path.parent.exists():
        return None
    raise FileNotFoundError(f"{where} is no folder, and no project at W&B (entity/project).")
