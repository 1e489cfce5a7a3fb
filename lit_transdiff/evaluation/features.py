"""The networks whose features and logits the scores are computed from.

Shapes: B images, C channels, H W pixels, D features, K classes. Images are in [-1, 1].
"""

from __future__ import annotations

import io
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_transdiff.config import require, unknown
from lit_transdiff.files import short_hash
from lit_transdiff.models.classifier import load_classifier
from lit_transdiff.pictures import to_bytes

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth (also published as pt_inception-2015-12-05-6726825d.pth)"


class Features(NamedTuple):
    """What an extractor says of a batch."""

    features: Tensor  # [B, D] float32
    logits: Tensor | None  # [B, K] float32


class FeatureExtractor(nn.Module, ABC):
    """Images [B, C, H, W] -> features and logits, without gradients and always in evaluation mode.

    Images are first rounded to the 8 bits that a file would hold, so that generated images and the files that
    a reference was made of are seen alike.
    """

    def __init__(self, name: str, network: nn.Module, fingerprint: str, num_features: int, num_classes: int | None) -> None:
        super().__init__()
        self.name = name
        self.network = network.requires_grad_(False).eval()
        self.fingerprint = fingerprint  # of the weights file
        self.num_features = num_features
        self.num_classes = num_classes  # of the data set, when the logits name its classes; else nothing

    @abstractmethod
    def extract(self, pixels: Tensor) -> Features:
        """Features of ``pixels`` [B, C, H, W], uint8."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with torch.autocast(images.device.type, enabled=False):
            return self.extract(to_bytes(images))

    def train(self, mode: bool = True) -> FeatureExtractor:
        return super().train(False)


class ClassifierFeatures(FeatureExtractor):
    """The small classifier of small-image runs: its last hidden layer, and logits over the data set's own classes."""

    weights_file = "a classifier of the data set's classes, written by save_classifier"

    def __init__(self, path: str | Path) -> None:
        network = load_classifier(path)
        super().__init__("classifier", network, short_hash(Path(path)), network.head.in_features, network.num_classes)

    def extract(self, pixels: Tensor) -> Features:
        images = pixels.float() / 127.5 - 1
        features = self.network.features(images)  # type: ignore[operator]
        return Features(features, self.network.head(features))  # type: ignore[operator]


class InceptionFeatures(FeatureExtractor):
    """InceptionV3 as FID uses it: 2048 pooled features and the 1008 logits without bias of the TensorFlow graph.

    Images are resized to 299 pixels as TensorFlow 1 does, without antialiasing. Its classes are not in the order
    of ImageNet's folders, so they name no class of a data set.
    """

    weights_file = f"{INCEPTION_FILE}, of torch-fidelity's releases"

    def __init__(self, path: str | Path) -> None:
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", layers, safe_copy(path))
        super().__init__("inception", network, short_hash(Path(path)), num_features=2048, num_classes=None)

    def extract(self, pixels: Tensor) -> Features:
        if pixels.shape[1] == 1:
            pixels = repeat(pixels, "b 1 h w -> b c h w", c=3)
        return Features(*self.network(pixels))


def safe_copy(path: str | Path) -> io.BytesIO:
    """A weights file, read with ``weights_only``, written again to memory (torch-fidelity itself unpickles anything)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"evaluation.extractor_weights: {path} is not a file of weights ({error}); expected {INCEPTION_FILE}."
        ) from error
    is_inception = isinstance(state, dict) and {"Conv2d_1a_3x3.conv.weight", "fc.weight"} <= set(state)
    require(is_inception, "evaluation.extractor_weights", str(path), f"a state dict in the layout of {INCEPTION_FILE}")
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    return copy


EXTRACTORS: dict[str, type[ClassifierFeatures] | type[InceptionFeatures]] = {
    "classifier": ClassifierFeatures,
    "inception": InceptionFeatures,
}


def load_extractor(name: str, weights: str | Path | None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor ``name`` with the weights of a file, on ``device``.

    Raises ``ValueError`` for an unknown name or without a file, ``FileNotFoundError`` when the file does not exist.
    """
    if name not in EXTRACTORS:
        raise unknown("evaluation.extractor", name, EXTRACTORS)
    expected = EXTRACTORS[name].weights_file
    require(bool(weights), "evaluation.extractor_weights", weights, f"for extractor {name!r} the path of {expected}")
    if not Path(str(weights)).is_file():
        raise FileNotFoundError(f"evaluation.extractor_weights: {weights} does not exist; expected {expected}.")
    return EXTRACTORS[name](str(weights)).to(device)
