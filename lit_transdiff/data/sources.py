"""Where images come from before they are shards: an image folder, IDX files, or a list file."""

from __future__ import annotations

import csv
import gzip
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from lit_transdiff.config import require, unknown
from lit_transdiff.data.scan import IMAGE_MEMBERS

IDX_IMAGES, IDX_LABELS = 2051, 2049  # magic numbers
MAX_KEY_BYTES = 80  # a plain tar header holds 100 with the extension


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, not yet read: ``read(i)`` gives the path of a file, or the pixels [H, W] uint8 of an IDX row."""

    labels: np.ndarray  # [N] int64
    keys: list[str]  # one a sample, all different, no dots
    origins: list[str]  # what to call a sample in messages
    class_names: tuple[str, ...]
    num_bytes: int
    read: Callable[[int], Path | np.ndarray]


def open_source(source: str | Path, split: Optional[str] = None, class_names: Optional[Sequence[str]] = None) -> ImageSource:
    """Find out what ``source`` is: a list file, a folder of IDX files (``split``: "train" or "t10k"), or class folders."""
    source = Path(source)
    if source.is_file():
        found = list_source(source, class_names)
    elif not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist; allowed: an image folder, a folder of IDX files, a list file.")
    elif any(source.glob("*-idx3-ubyte*")):
        return idx_source(source, split, class_names)
    else:
        found = folder_source(source, class_names)
    require(split is None, "split", split, "nothing: only IDX files have splits")
    return found


def folder_source(folder: Path, class_names: Optional[Sequence[str]]) -> ImageSource:
    """``folder/class/image.jpg``: classes are the sorted folder names, as in ImageNet."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    require(len(classes) > 0, str(folder), "a folder without class folders", "folder/class/image.jpg, or IDX files")
    names = checked_names(class_names, [path.name for path in classes])
    paths, labels, keys = [], [], []
    for label, directory in enumerate(classes):
        images = [path for path in sorted(directory.iterdir()) if path.suffix.lower().lstrip(".") in IMAGE_MEMBERS]
        require(len(images) > 0, str(directory), "no images", f"files ending in .{', .'.join(IMAGE_MEMBERS)}")
        for path in images:
            stem = path.stem if path.stem.startswith(directory.name) else f"{directory.name}_{path.stem}"
            paths.append(path)
            labels.append(label)
            keys.append(stem)
    return file_source(paths, labels, keys, names)


def list_source(path: Path, class_names: Optional[Sequence[str]]) -> ImageSource:
    """Lines ``path<tab>label`` or ``path,label``; relative to the list file; labels are numbers, or names (then sorted)."""
    text = path.read_text()
    delimiter = "\t" if "\t" in text else ","
    rows = [(number, row) for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1) if row]
    for number, row in rows:
        require(len(row) == 2, f"{path}: line {number}", delimiter.join(row), "path and label, with a tab or a comma between")
    require(len(rows) > 0, str(path), "an empty list", "lines of path and label")
    given = [row[1].strip() for _, row in rows]
    if all(label.isdecimal() for label in given):
        labels = [int(label) for label in given]
        found = [str(c) for c in range(max(labels) + 1)]
    else:
        found = sorted(set(given))
        labels = [found.index(label) for label in given]
    names = checked_names(class_names, found)
    paths = [path.parent / row[0].strip() for _, row in rows]
    for (number, _), image in zip(rows, paths, strict=True):
        require(image.is_file(), f"{path}: line {number}", str(image), "a file that exists")
    return file_source(paths, labels, [f"{i:08d}" for i in range(len(paths))], names)


def file_source(paths: list[Path], labels: list[int], keys: list[str], class_names: tuple[str, ...]) -> ImageSource:
    return ImageSource(
        labels=np.array(labels, np.int64),
        keys=distinct_keys(keys),
        origins=[str(path) for path in paths],
        class_names=class_names,
        num_bytes=sum(path.stat().st_size for path in paths),
        read=paths.__getitem__,
    )


def idx_source(folder: Path, split: Optional[str], class_names: Optional[Sequence[str]]) -> ImageSource:
    """``<split>-images-idx3-ubyte[.gz]`` and ``<split>-labels-idx1-ubyte[.gz]``, the format of MNIST and its kin."""
    splits = {path.name.split("-")[0]: path for path in sorted(folder.glob("*-images-idx3-ubyte*"))}
    if split is None:
        raise ValueError(f"split: got None; {folder} holds {', '.join(splits)}: say which one.")
    if split not in splits:
        raise unknown("split", split, splits)
    images = read_idx(splits[split], IDX_IMAGES)  # N H W
    label_path = Path(str(splits[split]).replace("-images-idx3-", "-labels-idx1-"))
    labels = read_idx(label_path, IDX_LABELS).astype(np.int64)
    require(len(labels) == len(images), f"{label_path}: labels", len(labels), f"{len(images)}, as many as images")
    names = checked_names(class_names, [str(c) for c in range(int(labels.max()) + 1)])
    keys = [f"{i:06d}" for i in range(len(images))]
    origins = [f"{splits[split].name}[{i}]" for i in range(len(images))]
    return ImageSource(labels, keys, origins, names, images.nbytes, images.__getitem__)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    require(len(data) >= 8, str(path), f"{len(data)} bytes", "an IDX file")
    found, dimensions = struct.unpack(">i", data[:4])[0], data[3]
    require(found == magic, f"{path}: magic number", found, str(magic))
    shape = struct.unpack(f">{dimensions}i", data[4 : 4 + 4 * dimensions])
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    require(values.size == int(np.prod(shape)), f"{path}: bytes of data", values.size, f"{int(np.prod(shape))} for shape {shape}")
    return values.reshape(shape)


def checked_names(given: Optional[Sequence[str]], found: list[str]) -> tuple[str, ...]:
    """The names to use for the classes that were found, in label order."""
    names = tuple(found if given is None else given)
    require(len(names) == len(found), "class_names", len(names), f"{len(found)} names, one for each class")
    require(len(set(names)) == len(names), "class_names", names, "names that differ")
    return names


def distinct_keys(stems: list[str]) -> list[str]:
    """Keys without dots, slashes or spaces; those that are taken get ``-2``, ``-3``, ..., those too long for a tar a number."""
    keys: dict[str, None] = {}  # an ordered set
    for i, stem in enumerate(stems):
        base = key = re.sub(r"[./\s]", "_", stem) if len(stem.encode()) <= MAX_KEY_BYTES else f"{i:08d}"
        copies = 1
        while key in keys:
            copies += 1
            key = f"{base}-{copies}"
        keys[key] = None
    return list(keys)
