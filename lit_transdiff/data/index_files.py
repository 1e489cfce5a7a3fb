"""The two files of an index, ``index.json`` and ``index.npz``: their paths, and
whether they may be replaced.
"""

from __future__ import annotations

from pathlib import Path

from lit_transdiff.config.targets import check_replaces, check_replaces_json

FORMAT = "lit_transdiff shards"


def index_files(path: str | Path) -> tuple[Path, Path]:
    """The two files of the index of a folder (or of an ``index.json``).

    Raises ``FileNotFoundError`` if they are missing.
    """
    path = Path(path)
    folder = path.parent if path.name == "index.json" else path
    header_path, sidecar_path = folder / "index.json", folder / "index.npz"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist. Make shards from images with: lit-transdiff pack SRC {folder}; "
            f"latents from shards with: lit-transdiff cache RUN.yaml SHARDS {folder} (lit-transdiff run does "
            "it by itself)"
        )
    if not header_path.is_file() or not sidecar_path.is_file():
        missing = header_path.name if not header_path.is_file() else sidecar_path.name
        raise FileNotFoundError(
            f"{folder} has no {missing}. Index shards that are there with: lit-transdiff index {folder}; "
            f"make shards from images with: lit-transdiff pack SRC {folder}"
        )
    return header_path, sidecar_path


def check_free(folder: Path) -> None:
    """Refuse to overwrite files of other programs with the names of the index files."""
    header, sidecar = folder / "index.json", folder / "index.npz"
    check_replaces_json(header, "format", FORMAT)
    if not header.exists():  # otherwise the two belong together
        check_replaces(sidecar, ["header.npy", "offset.npy"], "an index")
