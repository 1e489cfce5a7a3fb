"""Images as files and as shards."""

from __future__ import annotations

import io
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from lit_transdiff.data.index import ShardIndex, index_shards

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
PER_CLASS = 13


def write_image_folder(folder: Path, size: int = 8) -> Path:
    """``folder/class/number.png``; every image has its own pixels."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    """A black picture."""
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> None:
    """A tar of (name, bytes), in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def bad_shards(folder: Path, content: bytes) -> ShardIndex:
    """Five samples of class 0 and one of class 1; sample 1 is ``content``."""
    images = [png(), content, png(), png(), png(), png()]
    members = [[(f"{i}.png", image), (f"{i}.cls", b"01"[i // 5 :][:1])] for i, image in enumerate(images)]
    write_tar(folder / "a.tar", *chain(*members))
    return index_shards(folder, progress=False)
