"""Where images come from before they are shards: an image folder or a list file (see ``idx`` for IDX files)."""

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

MAX_KEY_BYTES = 80  # a plain tar header holds 100 with the extension
UNFIT = re.compile(r"[./\s]")  # for a key: webdataset cuts names at the dot
CLASS_NAME = re.compile(r"(?![+-]?\d+(\.\d*)?$).+")  # as a label: not -1, 1.0, or digits of another script
HEADER_HINT = "; remove this line, if it is a header"
LISTING_THREADS = 16  # a network disk answers many questions at once
ClassNames = Optional[Union[Sequence[str], Path]]  # in label order, or a file of them


@dataclass(frozen=True)
class ImageSource:
    """Labelled images, not yet read: ``read(i)`` gives the path of a file, or the pixels [H, W] uint8 of an IDX row."""

    labels: np.ndarray  # [N] int64
    keys: list[str]  # one a sample, all different, no dots
    origins: list[str]  # what to call a sample in messages
    sizes: np.ndarray  # [N] int64, bytes
    class_names: tuple[str, ...]
    found: tuple[str, ...]  # the classes as the source calls them
    read: Callable[[int], Path | np.ndarray]
    broken: list[tuple[str, str]] = field(default_factory=list)  # images that cannot be read: what they are called, and why
    passed_over: Counter[str] = field(default_factory=Counter)  # what lies among the images and is none, by kind

    @property
    def identity(self) -> str:
        """A hash of the names, labels and sizes of all samples, whatever folder they lie in."""
        names = (origin.rpartition("/")[2] for origin in self.origins)
        rows = zip(self.keys, names, self.labels.tolist(), self.sizes.tolist(), strict=True)
        return sha256_of_lines(f"{key} {name} {label} {size}" for key, name, label, size in rows)[:16]


def folder_source(folder: Path, class_names: ClassNames) -> ImageSource:
    """``folder/class/image.jpg``: classes are the sorted folder names, as in ImageNet; as numbers where all of them are."""
    with os.scandir(folder) as entries:
        entries_found = [(entry.name, entry.is_dir(), source_kind(entry)) for entry in entries]
    found = [entry for entry in entries_found if not entry[0].startswith(".")]
    classes = sorted(name for name, is_folder, _ in found if is_folder)
    if are_numbers(classes):
        classes.sort(key=int)
    require(len(classes) > 0, str(folder), "a folder without class folders", "folder/class/image.jpg, or IDX files")
    for name in classes:
        require(readable_name(name) == name, f"{folder}: class folder", readable_name(name), "a name in UTF-8")
    names = checked_names(class_names, classes)
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        listed = list(threads.map(images_in, [f"{folder}/{name}" for name in classes]))
    if not any(of.images for of in listed):
        refuse_empty(f"{folder}/{classes[0]}", listed[0])
    origins = [f"{folder}/{name}/{image}" for name, of in zip(classes, listed, strict=True) for image, _ in of.images]
    keys = [key_of(name, image) for name, of in zip(classes, listed, strict=True) for image, _ in of.images]
    sizes = [size for of in listed for _, size in of.images]
    labels = np.repeat(np.arange(len(classes)), [len(of.images) for of in listed])
    passed_over = Counter(kind for _, is_folder, kind in found if not is_folder)
    passed_over["hidden folders"] = sum(is_folder for name, is_folder, _ in entries_found if name.startswith("."))
    for of in listed:
        passed_over.update(of.passed_over)
    broken = [link for of in listed for link in of.broken]
    return replace(file_source(origins, sizes, labels, keys, names, classes), broken=broken, passed_over=+passed_over)


class Listing(NamedTuple):
    """What lies in a class folder."""

    images: list[tuple[str, int]]  # file name, bytes; by name
    broken: list[tuple[str, str]]  # path of an image that cannot be read, such as a link to nothing, and why
    passed_over: Counter[str]  # kinds of everything else


def images_in(directory: str) -> Listing:
    """The images in a folder, told by their extension."""
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
                broken.append((entry.path, "a link to nothing" if entry.is_symlink() else "not a file"))
    return Listing(sorted(images), sorted(broken), passed_over)


def refuse_empty(directory: str, listing: Listing) -> None:
    """Raise ``ValueError`` for class folders without any image, of which this is the first."""
    passed_over = listing.passed_over
    found = f"no images, but {listed_kinds(passed_over)}" if passed_over else "no images"
    deeper = f"; or pack {directory} itself, if its folders are the classes" if passed_over["folders"] else ""
    require(False, directory, found, f"files ending in .{', .'.join(IMAGE_MEMBERS)}{deeper}")


def readable_name(name: str) -> str:
    """The name of a file for people, which need not be UTF-8 on a disk."""
    return os.fsencode(name).decode(errors="backslashreplace")


def source_kind(entry: os.DirEntry[str]) -> str:
    """``folders``, or the extension of a file."""
    return "folders" if entry.is_dir() else os.path.splitext(readable_name(entry.name))[1].lower() or "files without an extension"


def listed_kinds(kinds: Counter[str]) -> str:
    """Kinds and their numbers, for messages."""
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


def key_of(class_folder: str, file_name: str) -> str:
    """The key of an image before doubles are told apart: its stem, which begins with the name of its class folder."""
    stem = file_name.rpartition(".")[0]
    return plain_key(stem if stem.startswith(class_folder) else f"{class_folder}_{stem}")


def plain_key(stem: str) -> str:
    return UNFIT.sub("_", stem)


def list_source(path: Path, class_names: ClassNames) -> ImageSource:
    """Lines ``path<tab>label`` or ``path,label``; relative to the list file; labels are numbers, or names (then sorted).

    Raises ``ValueError`` naming the line for a missing file, an empty label, and a number among names or the reverse.
    """
    lines = list(text_lines(path))
    delimiter = "\t" if any("\t" in line for line in lines) else ","
    rows = [(f"{path}: line {number}", row) for number, row in enumerate(csv.reader(lines, delimiter=delimiter), 1) if row]
    for where, row in rows:
        require(len(row) == 2, where, delimiter.join(row), "path and label, with a tab or a comma between")
    require(len(rows) > 0, str(path), "an empty list", "lines of path and label")
    found, labels = number_labels([(where, row[1].strip()) for where, row in rows])
    if class_names is None and are_numbers(found):
        require_class_0(str(path), labels)
    names = checked_names(class_names, found)
    origins = [str(path.parent / row[0].strip()) for _, row in rows]
    for (where, _), origin in zip(rows, origins, strict=True):
        header = HEADER_HINT * (where == rows[0][0])
        require(os.path.isfile(origin), where, origin, f"a file that exists{header}")
    sizes = [os.path.getsize(origin) for origin in origins]
    return file_source(origins, sizes, np.array(labels), [f"{i:08d}" for i in range(len(rows))], names, found)


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends. Raises ``ValueError`` naming the line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number}: not UTF-8: {error.reason} at byte {error.start}.") from error


def number_labels(given: Sequence[tuple[str, str]]) -> tuple[list[str], list[int]]:
    """The classes of (where, label) and the class number of each: the label itself, or its place among the sorted names."""
    numeric = any(LABEL.fullmatch(label) for _, label in given)
    allowed = f"{LABELS}, as on other lines" if numeric else f"{LABELS}, or the name of a class"
    for place, (where, label) in enumerate(given):
        require(
            (LABEL if numeric else CLASS_NAME).fullmatch(label) is not None,
            f"{where}: label",
            label,
            allowed + HEADER_HINT * (place == 0),
        )
    if numeric:
        labels = [int(label) for _, label in given]
        return [str(c) for c in range(max(labels) + 1)], labels
    found = sorted({label for _, label in given})
    number_of = {name: c for c, name in enumerate(found)}
    return found, [number_of[label] for _, label in given]


def file_source(
    origins: list[str], sizes: list[int], labels: np.ndarray, keys: list[str], class_names: tuple[str, ...], found: list[str]
) -> ImageSource:
    """Images that are files of their own."""
    return ImageSource(
        labels=labels.astype(np.int64),
        keys=distinct_keys(keys),
        origins=origins,
        sizes=np.array(sizes, np.int64),
        class_names=class_names,
        found=tuple(found),
        read=lambda i: Path(origins[i]),
    )


def checked_names(given: ClassNames, found: list[str]) -> tuple[str, ...]:
    """The names to use for the classes that were found, in label order."""
    if isinstance(given, Path):
        given = names_from(given, found)
    names = tuple(found if given is None else given)
    require(len(names) == len(found), "class_names", len(names), f"{len(found)} names, one for each class")
    require(len(set(names)) == len(names), "class_names", names, "names that differ")
    return names


def names_from(path: Path, found: list[str]) -> list[str]:
    """The names in a file: one a line in label order, or ``class name`` lines when all classes begin a line.

    Of the latter kind is ImageNet's list of synsets, where two birds and machines share a name: such names get their
    class in brackets.
    """
    lines = [line.strip() for line in text_lines(path) if line.strip()]
    parts = [line.split(maxsplit=1) for line in lines]
    named = {part[0]: part[1] for part in parts if len(part) == 2}
    if not all(name in named for name in found):
        return lines
    count = Counter(named[name] for name in found)
    return [named[name] if count[named[name]] == 1 else f"{named[name]} ({name})" for name in found]


def distinct_keys(keys: list[str]) -> list[str]:
    """Keys that are taken get ``-2``, ``-3``, ..., those too long for a tar a number."""
    found: dict[str, None] = {}  # an ordered set
    for i, wanted in enumerate(keys):
        base = key = wanted if len(wanted.encode()) <= MAX_KEY_BYTES else f"{i:08d}"
        copies = 1
        while key in found:
            copies += 1
            key = f"{base}-{copies}"
        found[key] = None
    return list(found)
