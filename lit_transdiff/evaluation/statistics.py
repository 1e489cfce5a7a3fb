"""Statistics of real images that generated ones are compared with, as ``.npz`` files.

Shapes: N images, D features. A file holds ``mu`` [D] and ``sigma`` [D, D] in float64 (the public layout has only these), and
ours also ``num_images``, ``features`` [n, D] float32 of at most n kept images, and ``about``, a JSON text.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.config import require
from lit_transdiff.evaluation.features import FeatureExtractor
from lit_transdiff.files import short_hash

Array = np.ndarray


@dataclass(frozen=True)
class Statistics:
    """Mean, covariance (over N - 1) and a sample of the features of real images."""

    mu: Array  # [D] float64
    sigma: Array  # [D, D] float64
    num_images: int | None = None  # nothing in the public layout
    features: Array | None = None  # [n, D] float32, in the order read
    about: dict[str, Any] = field(default_factory=dict)  # extractor, fingerprint, source, settings
    path: str | None = None
    hash: str | None = None  # of the file

    def __post_init__(self) -> None:
        size = self.mu.size
        require(self.mu.ndim == 1, "mu", self.mu.shape, "[D]")
        require(self.sigma.shape == (size, size), "sigma", self.sigma.shape, f"[D, D] with D = {size}")
        require(
            bool(np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()), "mu and sigma", "NaN or Inf", "finite numbers"
        )
        shape = None if self.features is None else self.features.shape
        require(shape is None or (len(shape) == 2 and shape[1] == size), "features", shape, f"[n, D] with D = {size}")


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream; which rows is a function of ``seed`` and their number alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen = size, 0
        self.random = np.random.default_rng(seed)
        self.rows: list[tuple[int, Array]] = []  # position in the stream, row

    def add(self, rows: Array) -> None:
        for row in rows:
            slot = self.seen if self.seen < self.size else int(self.random.integers(self.seen + 1))
            if slot < len(self.rows):
                self.rows[slot] = (self.seen, row.copy())  # a copy: a view would keep its whole batch in memory
            elif slot < self.size:
                self.rows.append((self.seen, row.copy()))
            self.seen += 1

    def stacked(self) -> Array:
        return np.stack([row for _, row in sorted(self.rows, key=lambda item: item[0])]).astype(np.float32)


def reference_statistics(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    *,
    max_features: int = 10_000,
    seed: int = 0,
    source: str = "",
    settings: dict[str, Any] | None = None,
) -> Statistics:
    """Statistics of images [B, C, H, W] in [-1, 1]; sums in float64.

    The features of a uniform sample of ``max_features`` images are kept for the metrics that need them (0: none).
    """
    total, outer = np.zeros(extractor.num_features), np.zeros((extractor.num_features, extractor.num_features))
    kept = Reservoir(max_features, seed)
    device = next(extractor.parameters()).device
    count = 0
    for images in batches:
        features = extractor(images.to(device)).features.cpu().numpy()
        wide = features.astype(np.float64)
        total += wide.sum(axis=0)
        outer += wide.T @ wide
        count += len(wide)
        kept.add(features)
    require(count >= 2, "reference images", count, "at least 2")
    mu = total / count
    sigma = (outer - count * np.outer(mu, mu)) / (count - 1)
    about = {
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "source": source,
        "settings": {"max_features": max_features, "seed": seed, **(settings or {})},
    }
    return Statistics(mu, sigma, count, kept.stacked() if max_features else None, about)


def save_statistics(statistics: Statistics, path: str | Path) -> Statistics:
    """Write an ``.npz`` file under a temporary name, then rename it; returns the statistics with their path and hash."""
    path = Path(path)
    require(path.suffix == ".npz", "statistics file", str(path), "a name that ends in .npz")
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "about": np.array(json.dumps(statistics.about, sort_keys=True))}
    if statistics.num_images is not None:
        arrays["num_images"] = np.array(statistics.num_images)
    if statistics.features is not None:
        arrays["features"] = statistics.features
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)
    return load_statistics(path)


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file, ours or one that has only ``mu`` and ``sigma``.

    Raises ``FileNotFoundError`` without the file and ``ValueError`` when it is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"evaluation.reference: {path} does not exist.")
    try:
        file = np.load(path, allow_pickle=False)
        require(isinstance(file, np.lib.npyio.NpzFile), "evaluation.reference", str(path), "an .npz file")
        with file:
            names = set(file.files) & {"mu", "sigma", "num_images", "features", "about"}
            require({"mu", "sigma"} <= names, f"{path}: arrays", sorted(file.files), "at least mu and sigma")
            arrays = {name: file[name] for name in names}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"evaluation.reference: {path} is not an .npz file ({error}).") from error
    return Statistics(
        mu=arrays["mu"].astype(np.float64),
        sigma=arrays["sigma"].astype(np.float64),
        num_images=int(arrays["num_images"]) if "num_images" in arrays else None,
        features=arrays.get("features"),
        about=json.loads(str(arrays["about"])) if "about" in arrays else {},
        path=str(path),
        hash=short_hash(path),
    )


def check_extractor(statistics: Statistics, extractor: FeatureExtractor) -> None:
    """Refuse a reference made with another network than ``extractor``: their features are not comparable.

    The public layout names no network; it is taken to be Inception's.
    """
    made_with = statistics.about.get("extractor", "inception")
    where = f"evaluation.reference {statistics.path}"
    require(made_with == extractor.name, f"{where}: extractor", made_with, f"{extractor.name} (evaluation.extractor)")
    fingerprint = statistics.about.get("fingerprint", extractor.fingerprint)
    require(fingerprint == extractor.fingerprint, f"{where}: weights of the extractor", fingerprint, extractor.fingerprint)
    size = statistics.mu.size
    require(
        size == extractor.num_features, f"{where}: features", size, f"{extractor.num_features} of extractor {extractor.name!r}"
    )


def reference_tensor(statistics: Statistics) -> Tensor:
    """The kept features [n, D] in float64."""
    if statistics.features is None:
        raise ValueError(f"evaluation.reference: {statistics.path} holds no features; make it with max_features above 0.")
    return torch.from_numpy(statistics.features).double()
