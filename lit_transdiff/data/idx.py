"""IDX files, the format of MNIST: ``<split>-images-idx3-ubyte[.gz]`` and ``-labels-idx1-ubyte[.gz]``."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Optional

import numpy as np

from lit_transdiff.config import require, require_known
from lit_transdiff.data.sources import ClassNames, ImageSource, checked_names

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # magic numbers: bytes, with 3 dimensions and 1
GZIP_RATIO = 1032  # maximal expansion of gzip


def idx_source(folder: Path, split: Optional[str], class_names: ClassNames) -> ImageSource:
    """The images and labels of ``split`` (``train`` or ``t10k``); class names are numbers by default."""
    splits = {path.name.split("-")[0]: path for path in sorted(folder.glob("*-images-idx3-ubyte*"))}
    if split is None:
        raise ValueError(f"split: got None; {folder} holds {', '.join(splits)}: say which one.")
    require_known("split", split, splits)
    images = read_idx(splits[split], IMAGES_MAGIC)  # N H W
    label_path = Path(str(splits[split]).replace("-images-idx3-", "-labels-idx1-"))
    labels = read_idx(label_path, LABELS_MAGIC).astype(np.int64)
    allowed = f"{len(images)}, as many as images"
    require(len(labels) == len(images), f"{label_path}: labels", len(labels), allowed)
    numbers = [str(c) for c in range(int(labels.max()) + 1)]
    names = checked_names(class_names, numbers)
    keys = [f"{i:06d}" for i in range(len(images))]
    origins = [f"{splits[split].name}[{i}]" for i in range(len(images))]
    sizes = np.full(len(images), images[0].nbytes)
    return ImageSource(labels, keys, origins, sizes, names, tuple(numbers), images.__getitem__)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not.

    At most one byte more than announced in the header is unpacked.

    Raises ``ValueError`` with the file for another magic number, no items, and fewer or more bytes than
    announced.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            magic_number = int.from_bytes(head, "big") if len(head) == 4 else f"{len(head)} bytes"
            require(magic_number == magic, f"{path}: magic number", magic_number, f"{magic}, of an IDX file")
            lengths = file.read(4 * head[3])
            allowed = f"{4 + 4 * head[3]}: the file is cut"
            require(len(lengths) == 4 * head[3], f"{path}: header", f"{4 + len(lengths)} bytes", allowed)
            shape = struct.unpack(f">{head[3]}I", lengths)
            size = prod(shape)
            require(size > 0, f"{path}: shape", shape, "at least one item")
            most = os.path.getsize(path) * (GZIP_RATIO if path.suffix == ".gz" else 1)
            allowed = f"{size:,} for shape {shape}: the file is cut"
            require(size <= most, f"{path}: bytes of data", f"at most {most:,}", allowed)
            data = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    length = f"{len(data):,}" if len(data) <= size else f"more than {size:,}"
    require(len(data) == size, f"{path}: bytes of data", length, f"{size:,} for shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)
