"""Groups of R different images of one class: what a multi-reference run trains on. R = 1 passes through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lit_transdiff.config import require
from lit_transdiff.data.index import ShardIndex


def group_references(labels: np.ndarray, order: np.ndarray, num_references: int) -> tuple[np.ndarray, int]:
    """Groups [n, R] int64 of samples of one class, and how many samples are left over.

    ``labels`` [N] of all samples, ``order`` [M] the samples in the order of an epoch. Along ``order`` each R samples of a
    class form a group, and groups follow each other by their last member; so neighbours in ``order`` (that lie in the
    same shards) stay together, no sample is used twice, and n = sum over classes of floor(count / R) in every epoch.
    """
    order = order.astype(np.int64)
    if num_references == 1:
        return order[:, None], 0
    by_class = np.argsort(labels[order], kind="stable")  # places in order, class by class
    counts = np.bincount(labels[order])
    first = np.repeat(np.cumsum(counts) - counts, counts)  # where the class of each place begins
    rank = np.arange(len(order)) - first
    whole = np.repeat(counts - counts % num_references, counts)
    places = by_class[rank < whole].reshape(-1, num_references)
    groups = order[places[np.argsort(places[:, -1])]]
    return groups, len(order) - groups.size


def check_class_sizes(index: ShardIndex, num_references: int) -> None:
    """Every class that has samples has at least R of them; else the class would silently never be trained on."""
    for c in np.flatnonzero((index.class_counts > 0) & (index.class_counts < num_references)):
        raise ValueError(
            f"model.num_references: got {num_references}, but class {index.class_names[c]!r} of {index.folder} has only "
            f"{index.class_counts[c]} images; allowed: at most the size of the smallest class."
        )


def read_groups(path: str | Path, index: ShardIndex, num_references: int) -> np.ndarray:
    """Groups [n, R] int64 from JSON lines, each a list of R sample keys of one class.

    Raises ``ValueError`` naming the line for an unknown key, another number of keys, an image that is there twice in a
    group, or two classes.
    """
    sample_of = {key.decode(): sample for sample, key in enumerate(index.key)}
    groups = []
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        where = f"{path}: line {number}"
        try:
            keys = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), where, keys, "a list of sample keys")
        require(len(keys) == num_references, f"{where}: number of keys", len(keys), f"model.num_references={num_references}")
        for key in keys:
            require(key in sample_of, f"{where}: key", key, f"keys of {index.folder}")
        require(len(set(keys)) == len(keys), where, keys, "different images")
        group = [sample_of[key] for key in keys]
        classes = sorted({index.class_names[index.label[sample]] for sample in group})
        require(len(classes) == 1, f"{where}: classes", classes, "one class")
        groups.append(group)
    require(len(groups) > 0, str(path), "no groups", "at least one line")
    return np.array(groups, np.int64)
