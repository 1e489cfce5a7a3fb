"""What a command is pointed at, looked for before the large libraries are loaded: a wrong path is answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from lit_transdiff.config import expanded, require, shipped

PATHS = (  # arguments and options in which ~ and $NAME are replaced
    *("source", "dest", "folder", "file", "run", "pipeline", "run_folder", "checkpoint", "output", "shards"),
    *("autoencoder", "recipe", "weights", "vae", "inception", "reference", "experiments"),
)


def expand_paths(args: argparse.Namespace) -> None:
    """Replace ``~`` and ``$NAME`` where the shell has not, as after ``--output=``; find what comes with the program."""
    for name, value in vars(args).items():
        if name in PATHS and isinstance(value, str):
            path = expanded(value, name.replace("_", "-"))
            setattr(args, name, path if name in ("dest", "output", "folder") else shipped(path))


def check_files(files: Mapping[str, Path]) -> None:
    """Refuse files that do not exist, all at once; the keys are their names in the message."""
    missing = [f"{name}: {path}" for name, path in files.items() if not path.is_file()]
    require(not missing, "files", "; ".join(missing), "files that exist")


def names_given(given: str | None) -> list[str] | Path | None:
    """Names between commas, or the file that holds them; what looks like a path is one."""
    if given is None:
        return None
    is_path = "," not in given and ("/" in given or given.endswith(".txt"))
    path = Path(expanded(given, "--class-names") if is_path else given)
    if is_path:
        check_files({"--class-names": path})
    return path if path.is_file() else given.split(",")


def check_pack_source(source: Path) -> None:
    """Refuse what is to be packed and does not exist."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; allowed: an image folder, a folder of IDX files, a list file.")


def check_source(source: Path) -> None:
    """Refuse what is to be converted and does not exist."""
    require(source.exists(), "source", str(source), "a file or folder that exists")


def check_pipe(source: str, permitted: bool) -> None:
    """Refuse data that a command prints, unless the user permits it: recipes are passed on, and none may run commands."""
    allowed = "a folder or a URL of http(s)://; this runs a command, which --allow-pipe on the command line alone permits"
    require(permitted or not source.startswith("pipe:"), "data.train", source, allowed)


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


def checkpoints_folder(run_folder: str | Path) -> Path:
    """Where a run's checkpoints lie. Raises ``FileNotFoundError`` when there are none."""
    folder = Path(run_folder) / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{run_folder} holds no complete checkpoint.")
    return folder


def local_path(where: str | Path) -> Path | None:
    """The path that ``where`` names; nothing for ``entity/project`` at W&B. Raises ``FileNotFoundError`` when it is neither."""
    path = Path(where).expanduser()
    if path.exists():
        return path
    if str(where).count("/") == 1 and not str(where).startswith((".", "/")) and not path.parent.exists():
        return None
    raise FileNotFoundError(f"{where} is no folder, and no project at W&B (entity/project).")
