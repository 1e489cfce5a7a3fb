"""Feature extractors: the networks whose features and logits the scores are computed from.

Shapes: B images, C channels, H W pixels, D features, K classes, S spatial features. Images are in [-1, 1].
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from lit_transdiff.base.files import short_hash
from lit_transdiff.base.hub import local
from lit_transdiff.checkpoints.version import read_versioned
from lit_transdiff.config import require, require_known
from lit_transdiff.data.pixels import from_bytes
from lit_transdiff.evaluation.backbones import (
    Clip336Features,
    ClipFeatures,
    ConvnextFeatures,
    DinoFeatures,
    Dinov2FdrFeatures,
    MaeFeatures,
    SiglipFeatures,
)
from lit_transdiff.evaluation.extractor import (
    FeatureExtractor,
    Features,
    colour,
    read_extractor_weights,
    wrong_file,
)
from lit_transdiff.models.classifier import Classifier, Judge, SmallClassifier, load_classifier


class ClassifierFeatures(FeatureExtractor):
    """The small classifier of small-image runs: its last hidden layer, and logits over the data's classes."""

    kind: type[Classifier] = SmallClassifier
    weights_file = "a classifier of the data set's classes, which a run of the stage 'classifier' exports"

    def __init__(self, path: str | Path) -> None:
        network = load_classifier(path, self.kind)
        super().__init__(
            self.kind.kind, network, short_hash(Path(path)), network.num_features, network.num_classes
        )
        self.class_names = names_beside(Path(path))

    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        images = from_bytes(pixels)
        features = self.network.features(images)  # type: ignore[operator]
        return Features(features, self.network.head(features))  # type: ignore[operator]


class JudgeFeatures(ClassifierFeatures):
    """The judge: a network of another architecture that is used only for scores, never in training."""

    kind = Judge
    weights_file = "a judge of the data set's classes, which a run of the stage 'judge' exports"


def names_beside(weights: Path) -> list[str]:
    """The class names in the export beside a classifier's weights; empty without an export."""
    file = weights.with_name("export.json")
    info = read_versioned(file) if file.is_file() else {}
    names = info.get("class_names") if isinstance(info, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


class InceptionFeatures(FeatureExtractor):
    """InceptionV3 as in the ADM evaluator.

    The outputs are 2048 pooled features (pool_3), the 1008 logits without bias of the TensorFlow graph, and
    as spatial features the first 7 channels of the 1x1 branch of mixed_6 (17 x 17, ordered height, width,
    channel). Images are resized to 299 pixels as in TensorFlow 1, without antialiasing. The logits do not
    correspond to the classes of a data set, because their order is not that of ImageNet's folders.
    """

    weights_file = f"InceptionV3 in the layout of torch-fidelity, published as {URL_INCEPTION_V3}"
    num_spatial = 17 * 17 * 7

    def __init__(self, path: str | Path) -> None:
        state = read_extractor_weights(
            path,
            self.weights_file,
            {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch1x1.conv.weight", "fc.weight"},
        )
        copy = io.BytesIO()  # torch-fidelity would unpickle any content of a file
        torch.save(state, copy)
        copy.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], copy)
        except RuntimeError as error:
            raise wrong_file(path, self.weights_file, error) from error
        super().__init__(
            "inception", network, published_hash(Path(path)), num_features=2048, num_classes=None
        )

    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        pixels = colour(pixels)
        if not spatial:
            return Features(*self.network(pixels))
        caught: list[Tensor] = []
        branch = self.network.get_submodule("Mixed_6d.branch1x1")  # mixed_6/conv of the TensorFlow graph
        handle = branch.register_forward_hook(lambda module, inputs, output: caught.append(output[:, :7]))
        try:
            features, logits = self.network(pixels)
        finally:
            handle.remove()
        return Features(features, logits, rearrange(caught[0], "b c h w -> b (h w c)").contiguous())


def published_hash(path: Path) -> str:
    """The fingerprint of InceptionV3's file, checked against the SHA-256 digits in its published name."""
    published, found = Path(URL_INCEPTION_V3), short_hash(path)
    begins = published.stem.rpartition("-")[2]
    if path.name == published.name and not found.startswith(begins):
        hashes = f"its SHA-256 is {found}..., published was {begins}..."
        raise ValueError(f"evaluation.extractor_weights: {path} is damaged: {hashes}")
    return found


EXTRACTORS: dict[str, Any] = {  # classes whose argument is the path of the weights
    "classifier": ClassifierFeatures,
    "judge": JudgeFeatures,
    "inception": InceptionFeatures,
    "dinov2": DinoFeatures,
    "dinov2_fdr": Dinov2FdrFeatures,
    "convnext": ConvnextFeatures,
    "mae": MaeFeatures,
    "siglip": SiglipFeatures,
    "clip": ClipFeatures,
    "clip_336": Clip336Features,
}
FDR6 = ("inception", "dinov2_fdr", "convnext", "mae", "siglip", "clip")  # the extractors of FDr6


def check_extractor_weights(name: str, weights: str | Path | None, main: str | None = None) -> None:
    """Raise ``ValueError`` for an unknown extractor, and for one without the path of its weights.

    The setting of the path is another one for extractors other than the ``main`` one.
    """
    check_name(name)
    allowed = f"for extractor {name!r} the path of {EXTRACTORS[name].weights_file}"
    require(bool(weights), weights_setting(name, main), weights, allowed)


def weights_setting(name: str, main: str | None) -> str:
    """The setting with the weights of an extractor, where the ``main`` one is this."""
    return "evaluation.extractor_weights" if main in (None, name) else f"evaluation.weights.{name}"


def check_name(name: str) -> None:
    """Raise ``ValueError`` for an unknown extractor."""
    require_known("evaluation.extractor", name, EXTRACTORS)


def load_extractor(
    name: str, weights: str | Path | None, device: torch.device | str = "cpu", main: str | None = None
) -> FeatureExtractor:
    """Load the extractor ``name`` with the weights of a file to ``device``; only ``hf://`` is downloaded.

    A folder, or a repository there, is that of a classifier's export. ``main`` is the evaluation's main
    extractor, if it has several. Raises ``ValueError`` for an unknown name and a missing or wrong file
    argument, and ``FileNotFoundError`` if the file does not exist.
    """
    check_extractor_weights(name, weights, main)
    path = local(str(weights), [f"{name}.safetensors", "export.json"])
    if path.is_dir():
        path = path / f"{name}.safetensors"
    if not path.is_file():
        expected, setting = EXTRACTORS[name].weights_file, weights_setting(name, main)
        raise FileNotFoundError(f"{setting}: {weights} does not exist; expected {expected}.")
    return EXTRACTORS[name](str(path)).to(device)
