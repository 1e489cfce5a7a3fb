"""Sources of images for packing: an image folder or a list file (IDX files: see ``idx``)."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np

from lit_transdiff.base.files import sha256_of_lines
from lit_transdiff.config import are_numbers, require
from lit_transdiff.data.scan import IMAGE_MEMBERS, LABEL, LABELS, require_class_0

MAX_KEY_BYTES = 80  # a plain tar header has 100 with the extension
UNFIT = re.compile(r"[./\s]")  # in a key: webdataset splits names at the dot
CLASS_NAME = re.compile(r"(?![+-]?\d+(\.\d*)?$).+")  # as a label: not -1, 1.0, or digits of another script
HEADER_HINT = "; remove this line, if it is a header"
LISTING_THREADS = 16  # network disks answer many requests at once
ClassNames = Optional[Union[Sequence[str], Path]]  # names in label order, or a file of names


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, read on demand: ``read(i)`` gives a file's path, or the pixels [H, W] uint8 of IDX."""

    labels: np.ndarray  # [N] int64
    keys: list[str]  # one per sample, unique, without dots
    origins: list[str]  # names of samples in messages
    sizes: np.ndarray  # [N] int64, bytes
    class_names: tuple[str, ...]
    source_names: tuple[str, ...]  # the class names in the source
    read: Callable[[int], Path | np.ndarray]
    broken: list[tuple[str, str]] = field(default_factory=list)  # unreadable images: name, reason
    passed_over: Counter[str] = field(default_factory=Counter)  # other files among the images, by kind

    @property
    def identity(self) -> str:
        """A hash of the names, labels and sizes of all samples, independent of the folder."""
        names = (origin.rpartition("/")[2] for origin in self.origins)
        rows = zip(self.keys, names, self.labels.tolist(), self.sizes.tolist(), strict=True)
        return sha256_of_lines(f"{key} {name} {label} {size}" for key, name, label, size in rows)[:16]


def folder_source(folder: Path, class_names: ClassNames) -> ImageSource:
    """``folder/class/image.jpg``: classes are folder names, sorted as numbers if all are, else as text."""
    with os.scandir(folder) as entries:
        entries_found = [(entry.name, entry.is_dir(), source_kind(entry)) for entry in entries]
    visible = [entry for entry in entries_found if not entry[0].startswith(".")]
    classes = sorted(name for name, is_folder, _ in visible if is_folder)
    if are_numbers(classes):
        classes.sort(key=int)
    allowed = "folder/class/image.jpg, or IDX files"
    require(len(classes) > 0, str(folder), "a folder without class folders", allowed)
    for name in classes:
        allowed = "a name in UTF-8"
        require(readable_name(name) == name, f"{folder}: class folder", readable_name(name), allowed)
    names = checked_names(class_names, classes)
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        listed = list(threads.map(images_in, [f"{folder}/{name}" for name in classes]))
    if not any(of.images for of in listed):
        refuse_empty(f"{folder}/{classes[0]}", listed[0])
    found = [(name, *image) for name, of in zip(classes, listed, strict=True) for image in of.images]
    origins = [f"{folder}/{name}/{image}" for name, image, _ in found]
    keys = [key_of(name, image) for name, image, _ in found]
    sizes = [size for *_, size in found]
    labels = np.repeat(np.arange(len(classes)), [len(of.images) for of in listed])
    passed_over = Counter(kind for _, is_folder, kind in visible if not is_folder)
    hidden = [is_folder for name, is_folder, _ in entries_found if name.startswith(".")]
    passed_over["hidden folders"] = sum(hidden)
    for of in listed:
        passed_over.update(of.passed_over)
    broken = [link for of in listed for link in of.broken]
    images = file_source(origins, sizes, labels, keys, names, classes)
    return replace(images, broken=broken, passed_over=+passed_over)


class Listing(NamedTuple):
    """The content of a class folder."""

    images: list[tuple[str, int]]  # file name, bytes; by name
    broken: list[tuple[str, str]]  # unreadable images, such as dangling links: path, reason
    passed_over: Counter[str]  # kinds of everything else


def images_in(directory: str) -> Listing:
    """The images in a folder, identified by their extension."""
    images, broken, passed_over = [], [], Counter[str]()
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.rpartition(".")[2].lower() not in IMAGE_MEMBERS or entry.is_dir():
                passed_over[source_kind(entry)] += 1
            elif readable_name(entry.name) != entry.name:
                broken.append((readable_name(entry.path), "a name that is not UTF-8"))
            elif entry.is_file():
                images.append((entry.name, entry.stat().st_size))
            else:
                broken.append((entry.path, "a dangling link" if entry.is_symlink() else "not a file"))
    return Listing(sorted(images), sorted(broken), passed_over)


def refuse_empty(directory: str, listing: Listing) -> None:
    """Raise ``ValueError`` for class folders without any images; ``directory`` is the first."""
    passed_over = listing.passed_over
    content = f"no images, but {listed_kinds(passed_over)}" if passed_over else "no images"
    deeper = f"; or pack {directory} itself, if its folders are the classes" if passed_over["folders"] else ""
    require(False, directory, content, f"files ending in .{', .'.join(IMAGE_MEMBERS)}{deeper}")


def readable_name(name: str) -> str:
    """The printable name of a file, which need not be UTF-8 on disk."""
    return os.fsencode(name).decode(errors="backslashreplace")


def source_kind(entry: os.DirEntry[str]) -> str:
    """``folders``, or the extension of a file."""
    if entry.is_dir():
        return "folders"
    return os.path.splitext(readable_name(entry.name))[1].lower() or "files without an extension"


def listed_kinds(kinds: Counter[str]) -> str:
    """Kinds and their counts, for messages."""
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


def key_of(class_folder: str, file_name: str) -> str:
    """The key of an image before ``distinct_keys``: its stem, prefixed by its class folder."""
    stem = file_name.rpartition(".")[0]
    return UNFIT.sub("_", stem if stem.startswith(class_folder) else f"{class_folder}_{stem}")


def list_source(path: Path, class_names: ClassNames) -> ImageSource:
    """Lines ``path<tab>label`` or ``path,label``, relative to the file; labels are numbers, or names.

    Raises ``ValueError`` with the line for a missing file, an empty label, and mixed numbers and names.
    """
    lines = list(text_lines(path))
    delimiter = "\t" if any("\t" in line for line in lines) else ","
    numbered = enumerate(csv.reader(lines, delimiter=delimiter), 1)
    rows = [(f"{path}: line {number}", row) for number, row in numbered if row]
    for where, row in rows:
        require(len(row) == 2, where, delimiter.join(row), "path and label, with a tab or a comma between")
    require(len(rows) > 0, str(path), "an empty list", "lines of path and label")
    classes, labels = number_labels([(where, row[1].strip()) for where, row in rows])
    if class_names is None and are_numbers(classes):
        require_class_0(str(path), labels)
    names = checked_names(class_names, classes)
    origins = [str(path.parent / row[0].strip()) for _, row in rows]
    for (where, _), origin in zip(rows, origins, strict=True):
        header = HEADER_HINT * (where == rows[0][0])
        require(os.path.isfile(origin), where, origin, f"a file that exists{header}")
    sizes = [os.path.getsize(origin) for origin in origins]
    keys = [f"{i:08d}" for i in range(len(rows))]
    return file_source(origins, sizes, np.array(labels), keys, names, classes)


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file without line ends. Raises ``ValueError`` for a line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                allowed = "allowed: text in UTF-8. Unpack an archive first, and name its folder."
                raise ValueError(
                    f"{path}: line {number}: not UTF-8: {error.reason} at byte {error.start}; {allowed}"
                ) from error


def number_labels(rows: Sequence[tuple[str, str]]) -> tuple[list[str], list[int]]:
    """The class names of (where, label) rows, and the class number of each row."""
    numeric = any(LABEL.fullmatch(label) for _, label in rows)
    allowed = f"{LABELS}, as on other lines" if numeric else f"{LABELS}, or the name of a class"
    for place, (where, label) in enumerate(rows):
        fits = (LABEL if numeric else CLASS_NAME).fullmatch(label) is not None
        require(fits, f"{where}: label", label, allowed + HEADER_HINT * (place == 0))
    if numeric:
        labels = [int(label) for _, label in rows]
        return [str(c) for c in range(max(labels) + 1)], labels
    classes = sorted({label for _, label in rows})
    number_of = {name: c for c, name in enumerate(classes)}
    return classes, [number_of[label] for _, label in rows]


def file_source(
    origins: list[str],
    sizes: list[int],
    labels: np.ndarray,
    keys: list[str],
    class_names: tuple[str, ...],
    source_names: list[str],
) -> ImageSource:
    """A source of image files."""
    return ImageSource(
        labels=labels.astype(np.int64),
        keys=distinct_keys(keys),
        origins=origins,
        sizes=np.array(sizes, np.int64),
        class_names=class_names,
        source_names=tuple(source_names),
        read=lambda i: Path(origins[i]),
    )


def checked_names(class_names: ClassNames, source_names: list[str]) -> tuple[str, ...]:
    """The class names in label order: ``class_names``, by default those of the source."""
    if isinstance(class_names, Path):
        class_names = names_from(class_names, source_names)
    names = tuple(source_names if class_names is None else class_names)
    allowed = f"{len(source_names)} names, one for each class"
    require(len(names) == len(source_names), "class_names", len(names), allowed)
    require(len(set(names)) == len(names), "class_names", names, "names that differ")
    return names


def names_from(path: Path, source_names: list[str]) -> list[str]:
    """The names in a file: one per line in label order, or ``class name`` lines if all classes begin a line.

    ImageNet's list of synsets is of the latter kind. Ambiguous names, such as its two cranes, get their class
    in brackets.
    """
    lines = [line.strip() for line in text_lines(path) if line.strip()]
    parts = [line.split(maxsplit=1) for line in lines]
    named = {part[0]: part[1] for part in parts if len(part) == 2}
    if not all(name in named for name in source_names):
        return lines
    count = Counter(named[name] for name in source_names)
    return [named[name] if count[named[name]] == 1 else f"{named[name]} ({name})" for name in source_names]


def distinct_keys(keys: list[str]) -> list[str]:
    """Make keys unique by suffixes ``-2``, ``-3``, ...; keys that are too long for a tar become numbers."""
    unique: dict[str, None] = {}  # an ordered set
    for i, stem in enumerate(keys):
        base = key = stem if len(stem.encode()) <= MAX_KEY_BYTES else f"{i:08d}"
        copies = 1
        while key in unique:
            copies += 1
            key = f"{base}-{copies}"
        unique[key] = None
    return list(unique)
