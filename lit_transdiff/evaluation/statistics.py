"""Statistics of real images as a reference for generated ones, in ``.npz`` files.

Shapes: N images, D features, S spatial features. A file may contain:

- ``mu`` [D], ``sigma`` [D, D]: the features' mean and covariance (the public layout);
- ``mu_s`` [S], ``sigma_s`` [S, S]: those of Inception's spatial features (the ADM evaluator's layout);
- ``arr_0`` [N, H, W, 3], uint8: the images themselves (the ADM evaluator's layout). Their features and
  statistics are computed once if the file lacks them, and stored in a file beside it;
- in our files also ``num_images``, ``features`` [n, D] float32 of n sampled images, their ``labels`` [n] and
  ``places`` [n] in the source, and ``about`` (JSON).
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.base.arrays import read_arrays, zip_of_arrays
from lit_transdiff.base.files import Damaged, check_zip, json_of, short_hash, whole
from lit_transdiff.base.hub import local
from lit_transdiff.config import require
from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.images import image_batches, images_shape
from lit_transdiff.evaluation.moments import Gaussian, Moments, Reservoir, check_covariance, check_gaussian
from lit_transdiff.evaluation.neighbours import Manifold

NAMES = ("mu", "sigma", "mu_s", "sigma_s", "num_images", "features", "labels", "places", "about")


@dataclass(frozen=True)
class Statistics:
    """Mean, covariance (over N - 1) and a sample of the features of real images."""

    mu: np.ndarray  # [D] float64; [0] if the file has only images
    sigma: np.ndarray  # [D, D] float64
    num_images: int | None = None  # None in the public layout
    features: np.ndarray | None = None  # [n, D] float32, in the order read
    about: dict[str, Any] = field(default_factory=dict)  # extractor, fingerprint, source, settings
    path: str | None = None
    hash: str | None = None  # hash of the file
    spatial: Gaussian | None = None  # statistics of the spatial features
    images: int = 0  # number of images in the file
    labels: np.ndarray | None = None  # [n] classes of the features' images
    places: np.ndarray | None = None  # [n] places of these images in the source

    def __post_init__(self) -> None:
        check_gaussian(self.mu, self.sigma, ("mu", "sigma"))
        if self.spatial is not None:
            check_gaussian(*self.spatial, ("mu_s", "sigma_s"))
        size, shape = self.mu.size, None if self.features is None else self.features.shape
        allowed = f"[n, D] with D = {size}"
        require(shape is None or (len(shape) == 2 and shape[1] == size), "features", shape, allowed)
        if self.features is not None:
            require(len(self.features) >= 2, "features", shape, "at least 2 rows")
            require(bool(np.isfinite(self.features).all()), "features", "NaN or Inf", "finite numbers")
            for name in ("labels", "places"):
                of = self.features[:, 0].astype(int) if getattr(self, name) is None else getattr(self, name)
                ok = of.shape == (len(self.features),) and of.dtype.kind in "iu"
                require(ok, name, f"{of.dtype} of shape {of.shape}", "one integer per row of features")
        require(self.images != 1, "arr_0", "1 image", "at least 2")

    @cached_property
    def manifolds(self) -> dict[torch.device, Manifold]:
        """The features with balls around them by device, once they are used."""
        return {}

    @property
    def gaussian(self) -> Gaussian:
        return Gaussian(self.mu, self.sigma)

    @property
    def has_features(self) -> bool:
        """Whether features are stored, or can be computed from the file's images."""
        return self.num_features > 0

    @property
    def num_features(self) -> int:
        """The rows of features that are stored, or can be computed from the file's images."""
        return self.images if self.features is None else len(self.features)

    @property
    def has_spatial(self) -> bool:
        """Whether spatial statistics are stored, or can be computed from the file's images."""
        return self.spatial is not None or self.images > 0


def reference_statistics(
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    extractor: FeatureExtractor,
    *,
    max_features: int = 10_000,
    source: str = "",
    settings: dict[str, Any] | None = None,
) -> Statistics:
    """Statistics of images [B, C, H, W] in [-1, 1], in float64; with Inception also the spatial ones.

    Features of a uniform sample of ``max_features`` images (0: none) are included for metrics that need them,
    with their labels and places if the batches are images with labels [B].
    """
    with_spatial = extractor.num_spatial is not None
    require(max_features != 1, "max_features", max_features, "0 or at least 2")
    moments, spatial, kept = Moments(), Moments(), Reservoir(max_features, seed=0)
    labels: list[Tensor] = []
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        labels += [] if isinstance(batch, Tensor) else [batch[1]]
        found = extractor(images.to(extractor.device), spatial=with_spatial)
        moments.add(found.features)
        if found.spatial is not None:
            spatial.add(found.spatial)
        kept.add(found.features.cpu().numpy())
    require(moments.count >= 2, "reference images", moments.count, "at least 2")
    about = {
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "source": source,
        "settings": {"max_features": max_features, "seed": 0, **(settings or {})},
    }
    return Statistics(
        *moments.gaussian(),
        num_images=moments.count,
        features=kept.stacked() if max_features else None,
        about=about,
        spatial=spatial.gaussian() if with_spatial else None,
        labels=torch.cat(labels).numpy()[kept.places()] if labels else None,
        places=kept.places() if labels else None,
    )


def check_statistics_file(path: str | Path) -> None:
    """Refuse a path that is not writable, or that would replace a file other than our own statistics."""
    path = Path(path)
    require(path.suffix == ".npz", "statistics file", str(path), "a name that ends in .npz")
    if os.path.lexists(path):
        ours = zipfile.is_zipfile(path) and {"mu.npy", "sigma.npy", "about.npy"} <= set(
            zipfile.ZipFile(path).namelist()
        )
        allowed = "a name that is free, or of statistics that this program wrote"
        require(ours, "statistics file", str(path), allowed)


def save_statistics(statistics: Statistics, path: str | Path) -> Statistics:
    """Write an ``.npz`` file completely or not at all; return the statistics with their path and hash."""
    path = Path(path)
    check_statistics_file(path)
    arrays = {
        "mu": statistics.mu,
        "sigma": statistics.sigma,
        "about": np.array(json.dumps(statistics.about, sort_keys=True)),
    }
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mu, "sigma_s": statistics.spatial.sigma}
    if statistics.num_images is not None:
        arrays["num_images"] = np.array(statistics.num_images)
    for name in ("features", "labels", "places"):
        if (array := getattr(statistics, name)) is not None:
            arrays[name] = array
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return load_statistics(path)


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file in our layout or a public one; images in it are counted but not read.

    Raises ``FileNotFoundError`` if the file does not exist, and ``ValueError`` that names it if its content
    is not valid, including sigma, whose check takes about a second at 2048 features.
    """
    path = local(path)
    if not path.is_file():
        raise FileNotFoundError(f"evaluation.reference: {path} does not exist.")
    try:
        arrays = read_arrays(path, NAMES)
        check_zip(path)  # includes the members that are not read here, and all names
        with zip_of_arrays(path) as file:
            names = set(file.files)
        both = all(
            {mu, sigma} <= names or not {mu, sigma} & names
            for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s"))
        )
        complete = both and bool({"mu", "arr_0"} & names)
        allowed = "at least mu and sigma, or images as arr_0; mu_s with sigma_s"
        require(complete, "arrays", sorted(names), allowed)
        return statistics_of(arrays, path, images_shape(path)[0] if "arr_0" in names else 0)
    except Damaged as error:  # its message names the file
        raise ValueError(f"evaluation.reference: {error}") from error
    except ValueError as error:
        raise ValueError(f"evaluation.reference: {path}: {error}") from error


def statistics_of(arrays: dict[str, np.ndarray], path: Path, images: int) -> Statistics:
    """The checked statistics in the ``arrays`` of a file."""
    for name in {*NAMES[:4], "features"} & arrays.keys():
        require(arrays[name].dtype.kind in "fiu", name, str(arrays[name].dtype), "real numbers")
    num_images = arrays.get("num_images")
    if num_images is not None:
        fits = num_images.ndim == 0 and num_images.dtype.kind in "iu"
        require(fits, "num_images", num_images.tolist(), "an integer")
    about = json_of(str(arrays["about"])) if "about" in arrays else {}
    require(isinstance(about, dict), "about", about, "a JSON object")
    wide = {name: arrays[name].astype(np.float64) for name in NAMES[:4] if name in arrays}
    require("mu" not in wide or wide["mu"].size > 0, "mu", "no numbers", "[D]")
    found = Statistics(
        mu=wide.get("mu", np.zeros(0)),
        sigma=wide.get("sigma", np.zeros((0, 0))),
        num_images=None if num_images is None else int(num_images),
        **{name: arrays.get(name) for name in ("features", "labels", "places")},
        about=about,
        path=str(path),
        hash=short_hash(path),
        spatial=Gaussian(wide["mu_s"], wide["sigma_s"]) if "mu_s" in wide else None,
        images=images,
    )
    for name in {"sigma", "sigma_s"} & wide.keys():
        check_covariance(wide[name], name)
    return found


def completed(
    statistics: Statistics, extractor: FeatureExtractor, folder: Path, *, features: bool, spatial: bool
) -> Statistics:
    """``statistics`` completed from its images: stored features, spatial statistics or all statistics.

    They are computed once and stored in a file beside the reference, or in ``folder`` if that place is not
    writable. Its name contains the hash of the reference and the fingerprint of the extractor's weights.
    """
    lacking = (
        (features and statistics.features is None)
        or (spatial and statistics.spatial is None)
        or not statistics.mu.size
    )
    if not lacking:
        return statistics
    path = Path(str(statistics.path))
    name = f"{path.stem}-{statistics.hash}-{extractor.name}-{extractor.fingerprint}.npz"
    folder = path.parent if os.access(path.parent, os.W_OK) else folder
    if (folder / name).is_file():
        of_images = load_statistics(folder / name)
    else:
        batches = tqdm(image_batches(path), desc=f"features of {path.name}", unit="batch", leave=False)
        made = reference_statistics(
            batches, extractor, max_features=statistics.images, source=f"arr_0 of {path}"
        )
        of_images = save_statistics(made, folder / name)
    given = statistics if statistics.mu.size else of_images
    return dataclasses.replace(
        statistics,
        mu=given.mu,
        sigma=given.sigma,
        num_images=given.num_images,
        features=of_images.features if statistics.features is None else statistics.features,
        spatial=statistics.spatial or of_images.spatial,
    )


def check_extractor(statistics: Statistics, extractor: FeatureExtractor) -> None:
    """Refuse a reference made with another network than ``extractor``, whose features are not comparable.

    The public layout does not name a network: statistics are assumed to be Inception's, images fit any
    network.
    """
    made_with = statistics.about.get("extractor", "inception" if statistics.mu.size else extractor.name)
    where = f"evaluation.reference {statistics.path}"
    allowed = f"{extractor.name} (evaluation.extractor)"
    require(made_with == extractor.name, f"{where}: extractor", made_with, allowed)
    fingerprint = statistics.about.get("fingerprint", extractor.fingerprint)
    allowed = extractor.fingerprint
    require(fingerprint == extractor.fingerprint, f"{where}: weights of the extractor", fingerprint, allowed)
    size = statistics.mu.size
    allowed = f"{extractor.num_features} of extractor {extractor.name!r}"
    require(size in (0, extractor.num_features), f"{where}: features", size, allowed)
    if statistics.spatial is not None and extractor.num_spatial is not None:
        size, allowed = statistics.spatial.mu.size, f"{extractor.num_spatial} of extractor {extractor.name!r}"
        require(size == extractor.num_spatial, f"{where}: spatial features (mu_s)", size, allowed)
    if statistics.images:
        extractor(next(image_batches(str(statistics.path), 1)).to(extractor.device))


def reference_tensor(statistics: Statistics) -> Tensor:
    """The stored features [n, D] in float64."""
    if statistics.features is None:
        raise ValueError(
            f"evaluation.reference: {statistics.path} has no features; make it with max_features > 0."
        )
    return torch.from_numpy(statistics.features).double()
