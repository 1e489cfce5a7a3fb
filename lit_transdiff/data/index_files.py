"""The two files of an index, ``index.json`` and ``index.npz``: their places and their replacement."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from lit_transdiff.base.remote import RemoteFolder, is_remote
from lit_transdiff.config.targets import check_replaces, check_replaces_json

FORMAT = "lit_transdiff shards"
Folder = Path | RemoteFolder  # a folder of shards


def index_file(folder: Path) -> Path:
    """The ``index.json`` of a folder. Raises ``FileNotFoundError`` if it or the ``index.npz`` is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist. Make shards from images with: lit-transdiff pack SRC {folder}; "
            f"latents from shards with: lit-transdiff cache RUN.yaml SHARDS {folder} (lit-transdiff run does "
            "it by itself)"
        )
    for name in ("index.json", "index.npz"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}. Index shards that are there with: lit-transdiff index {folder}; "
                f"make shards from images with: lit-transdiff pack SRC {folder}"
            )
    return folder / "index.json"


def shard_folder(place: str | Path) -> Folder:
    """The folder of shards at a path or URL, or that of an ``index.json``."""
    if is_remote(place):
        return RemoteFolder(str(place).rstrip("/").removesuffix("/index.json"))
    return Path(place).parent if Path(place).name == "index.json" else Path(place)


def header_bytes(place: str | Path) -> bytes:
    """The content of the ``index.json`` of a folder or URL.

    Raises ``FileNotFoundError`` without an index, and ``RemoteError`` for a URL that cannot be read.
    """
    folder = shard_folder(place)
    return index_file(folder).read_bytes() if isinstance(folder, Path) else remote_file(folder, "index.json")


def check_index(place: str | Path) -> None:
    """Refuse a place without an index, as ``header_bytes`` does."""
    folder = shard_folder(place)
    if isinstance(folder, Path):
        index_file(folder)
    else:
        header_bytes(place)


def header_hash(place: str | Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an ``index.json``: the same for a copy elsewhere."""
    return hashlib.sha256(header_bytes(place)).hexdigest()[:16]


def sidecar(folder: Folder) -> Path | io.BytesIO:
    """The ``index.npz`` of a folder, for reading."""
    return folder / "index.npz" if isinstance(folder, Path) else io.BytesIO(remote_file(folder, "index.npz"))


def remote_file(folder: RemoteFolder, name: str) -> bytes:
    """A file of an index at a URL."""
    try:
        return folder.read(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no {name}, or does not exist. Index the shards where they are local "
            "(lit-transdiff index FOLDER), and upload index.json and index.npz with them"
        ) from error


def sizes_in(folder: Folder, names: Sequence[str]) -> dict[str, int | None]:
    """The sizes of those files that a folder or URL has; None where a server does not say."""
    if isinstance(folder, RemoteFolder):
        return folder.sizes(names)
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def check_free(folder: Path) -> None:
    """Refuse to overwrite files of other programs with the names of the index files."""
    header, sidecar = folder / "index.json", folder / "index.npz"
    check_replaces_json(header, "format", FORMAT)
    if not header.exists():  # otherwise the two belong together
        check_replaces(sidecar, ["header.npy", "offset.npy"], "an index")
