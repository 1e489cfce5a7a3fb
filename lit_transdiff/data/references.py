"""Groups of R different images of one class, for multi-reference training. R = 1 passes through."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from lit_transdiff.base.files import json_of
from lit_transdiff.config import require
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.sources import key_of, text_lines

log = logging.getLogger(__name__)
LINES_AT_A_TIME = 10_000  # lines of a file of groups


def num_groups(class_counts: np.ndarray, num_references: int) -> int:
    """The number of groups per epoch: for each class the minimum that uses all of its images."""
    return int((-(-class_counts // num_references)).sum())


def group_references(
    labels: np.ndarray, order: np.ndarray, num_references: int, fill_up: bool = True
) -> tuple[np.ndarray, int]:
    """Groups [n, R] int64 of different samples of one class, and the number of unused samples.

    ``labels`` [N] of all samples, ``order`` [M] the samples in the order of an epoch. Each R successive
    samples of a class in ``order`` form a group, and groups are ordered by their last member; so neighbours
    in ``order`` (which lie in the same shards) stay together. With ``fill_up`` every sample is used: the last
    group of a class is its last R samples, some of which are then in two groups, and n is the sum over
    classes of ceil(count / R). Without it no sample is used twice. Every class must have at least R samples.
    """
    order = order.astype(np.int64)
    if num_references == 1:
        return order[:, None], 0
    classes = labels[order]
    counts = np.bincount(classes)
    if len(counts) <= 2**16:
        classes = classes.astype(np.uint16)  # numpy sorts this type in linear time
    by_class = np.argsort(classes, kind="stable")  # places in order, class by class
    groups_of = (counts + num_references - 1) // num_references if fill_up else counts // num_references
    of_class = np.repeat(np.arange(len(counts)), groups_of)  # n
    # the number of each group in its class
    number = np.arange(len(of_class)) - np.repeat(np.cumsum(groups_of) - groups_of, groups_of)
    in_class = np.minimum(number * num_references, counts[of_class] - num_references)
    first = in_class + (np.cumsum(counts) - counts)[of_class]
    places = by_class[first[:, None] + np.arange(num_references)]  # n R
    groups = order[places[np.argsort(places[:, -1])]]
    return groups, 0 if fill_up else len(order) - groups.size


def check_class_sizes(index: ShardIndex, num_references: int) -> None:
    """Refuse classes with fewer than R samples, which would silently never be used."""
    for c in np.flatnonzero((index.class_counts > 0) & (index.class_counts < num_references)):
        raise ValueError(
            f"model.num_references: got {num_references}, but class {index.class_names[c]!r} of "
            f"{index.folder} has only {index.class_counts[c]} images; allowed: at most the size of the "
            "smallest class, or leave that class out."
        )


def without_small_classes(index: ShardIndex, num_references: int) -> np.ndarray:
    """[num_classes] bool: the classes with at least R images. Raises ``ValueError`` if there are none."""
    large = index.class_counts >= num_references
    most = int(index.class_counts.max())
    if not large.any():
        raise ValueError(
            f"data.evaluation: no class of {index.folder} has more than {most} images, and validation takes "
            f"groups of model.num_references={num_references}; allowed: more held-out images of a class, at "
            f"most {most} references, or training.num_validation_samples=0, which validates nothing."
        )
    return large


class GroupLine(NamedTuple):
    """A line of a file of groups."""

    number: int
    keys: list[bytes]  # R
    folder: Optional[str]  # the class folder, if the line names files


def read_groups(path: str | Path, index: ShardIndex, num_references: int) -> np.ndarray:
    """Groups [n, R] int64 from JSON lines.

    A line is a list of R sample keys of one class, or ``{"cate": class folder, "files": [file names]}`` as in
    the index file of the released TransDiff: the first R files are used, under the keys given by ``pack``.
    Raises ``ValueError`` with the line for an unknown key, another number of keys, a repeated image in a
    group, two classes, and an ambiguous file name.
    """
    by_key = np.argsort(index.key, kind="stable")
    ordered_keys = index.key[by_key]

    def find(keys: np.ndarray) -> np.ndarray:
        """The sample of each key; an arbitrary one for unknown keys."""
        return by_key[np.minimum(np.searchsorted(ordered_keys, keys), len(ordered_keys) - 1)].astype(np.int64)

    groups = [np.empty((0, num_references), np.int64)]
    lines = group_lines(path, num_references)
    while chunk := list(islice(lines, LINES_AT_A_TIME)):
        keys = np.array([line.keys for line in chunk], np.bytes_)  # n R
        samples, doubles = find(keys), np.char.add(keys, b"-2")
        check_groups(path, chunk, keys, samples, index)
        check_named_files(path, chunk, keys, samples, index.key[find(doubles)] == doubles, index)
        groups.append(samples)
    joined = np.concatenate(groups)
    require(len(joined) > 0, str(path), "no groups", "at least one line")
    text = "%s: %d groups of %d; %d of %d images are in them"
    log.info(text, path, *joined.shape, len(np.unique(joined)), len(index))
    return joined


def group_lines(path: str | Path, num_references: int) -> Iterator[GroupLine]:
    """The non-empty lines with their R keys."""
    for number, text in enumerate(text_lines(path), 1):
        if not text.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json_of(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        keys, folder = group_keys(value, where, num_references)
        allowed = f"model.num_references={num_references}"
        require(len(keys) == num_references, f"{where}: number of keys", len(keys), allowed)
        yield GroupLine(number, [key.encode("utf-8", "surrogatepass") for key in keys], folder)


def group_keys(value: Any, where: str, num_references: int) -> tuple[list[str], Optional[str]]:
    """The keys of a line, and its class folder if any."""
    files: Any = value.get("files") if isinstance(value, dict) else value
    allowed = "a list of sample keys or file names"
    require(isinstance(files, list) and all(isinstance(f, str) for f in files), where, value, allowed)
    if not isinstance(value, dict):
        return files, None
    folder: Any = value.get("cate")
    require(isinstance(folder, str), f"{where}: cate", folder, "the name of a class folder")
    return [key_of(folder, file) for file in files[:num_references]], folder


def check_groups(
    path: str | Path, lines: Sequence[GroupLine], keys: np.ndarray, samples: np.ndarray, index: ShardIndex
) -> None:
    """Check that ``samples`` [n, R] have the ``keys`` [n, R] and are different images of one class."""
    for row, column in zip(*np.nonzero(index.key[samples] != keys), strict=True):
        key = keys[row, column].decode(errors="replace")
        require(False, f"{path}: line {lines[row].number}: key", key, f"keys of {index.folder}")
    ordered = np.sort(samples, axis=1)
    for row in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)).tolist():
        allowed = "different images"
        require(False, f"{path}: line {lines[row].number}", [key.decode() for key in keys[row]], allowed)
    labels = index.label[samples]
    for row in np.flatnonzero((labels != labels[:, :1]).any(axis=1)).tolist():
        classes = sorted({index.class_names[label] for label in labels[row]})
        require(False, f"{path}: line {lines[row].number}: classes", classes, "one class")


def check_named_files(
    path: str | Path,
    lines: Sequence[GroupLine],
    keys: np.ndarray,
    samples: np.ndarray,
    doubled: np.ndarray,
    index: ShardIndex,
) -> None:
    """Check lines with file names: each name is unique and of the class of the line's folder, if that exists.

    ``pack`` gives files with equal stems keys that end in -2, -3, ...; ``doubled`` [n, R] marks keys with
    such a second one.
    """
    # Class names may be mere numbers, which are not compared with folders.
    numbers = {name: c for c, name in enumerate(index.class_names) if not name.isdecimal()}
    for line, line_keys, line_samples, double in zip(lines, keys, samples, doubled, strict=True):
        if line.folder is None:
            continue
        for key in line_keys[double]:
            where = f"{path}: line {line.number}: file with the key"
            other = f"{index.folder} also has {key.decode()}-2"
            allowed = f"a key of one image ({other}); write such a line as a list of keys"
            require(False, where, key.decode(), allowed)
        label = int(index.label[line_samples[0]])
        right = numbers.get(line.folder, label) == label
        allowed = f"{index.class_names[label]}, the class of its files"
        require(right, f"{path}: line {line.number}: cate", line.folder, allowed)
