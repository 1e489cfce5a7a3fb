"""Two small classifiers of different architectures for scoring runs on small images.

A network that trains, guides or aligns a model never scores it: ``Judge`` is used only for scoring.

Shapes: B batch, C image channels, H W pixels. Images are in [-1, 1].
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lit_transdiff.base.files import check_file, json_of
from lit_transdiff.config import require
from lit_transdiff.config.targets import save_tensors

FEATURES = 64
WIDTHS = (24, 48, 96)  # channels of the levels of convolutions; each ends with half the size


class Classifier(nn.Module, ABC):
    """Images -> features -> one logit per class."""

    kind: ClassVar[str]  # the metadata key of the weights file with num_classes, image_size, image_channels
    num_features: ClassVar[int]
    dropout: nn.Module
    head: nn.Linear

    def __init__(self, num_classes: int, image_size: int, image_channels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.image_size = image_size
        self.image_channels = image_channels

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> features [B, F]."""

    def features(self, images: Tensor) -> Tensor:
        """The features of images, whose size is checked."""
        expected = (self.image_channels, self.image_size, self.image_size)
        allowed = f"[B, C, H, W] with (C, H, W) = {expected}"
        require(tuple(images.shape[1:]) == expected, "images", tuple(images.shape), allowed)
        return self.embed(images)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.head(self.dropout(self.features(images)))


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class SmallClassifier(Classifier):
    """Convolutions at three resolutions, spatial mean, 64 features."""

    kind = "classifier"
    num_features = FEATURES

    def __init__(self, num_classes: int, image_size: int, image_channels: int) -> None:
        super().__init__(num_classes, image_size, image_channels)
        levels: list[nn.Module] = []
        width = image_channels
        for wider in WIDTHS:
            levels += [conv_block(width, wider), nn.MaxPool2d(2)]
            width = wider
        self.trunk = nn.Sequential(*levels, conv_block(width, width))
        self.neck = nn.Linear(width, FEATURES)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Non-negative features [B, 64]."""
        return torch.relu(self.neck(self.trunk(images).mean(dim=(2, 3))))


class Judge(Classifier):
    """A vision transformer on tokens of 8 x 8 pixels from convolutions (arXiv 2106.14881), mean-pooled."""

    kind = "judge"
    num_features = WIDTHS[-1]

    def __init__(self, num_classes: int, image_size: int, image_channels: int) -> None:
        super().__init__(num_classes, image_size, image_channels)
        require(image_size % 8 == 0, "data.image_size", image_size, "a multiple of 8 in stage judge")
        layers: list[nn.Module] = []
        for narrow, wide in pairwise((image_channels, *WIDTHS)):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.trunk = VisionTransformer(
            img_size=image_size // 8,
            patch_size=1,
            in_chans=self.num_features,
            embed_dim=self.num_features,
            depth=4,
            num_heads=3,
            mlp_ratio=2,
            class_token=False,
            global_pool="avg",
            num_classes=0,
            drop_path_rate=0.05,
        )
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.num_features, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Features [B, 96], normalised over each image's 96."""
        return self.trunk(self.stem(images))


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Write weights and, in the file's header, what is needed to rebuild the classifier."""
    shape = {name: getattr(classifier, name) for name in ("num_classes", "image_size", "image_channels")}
    weights = {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()}
    save_tensors(weights, Path(path), metadata={classifier.kind: json.dumps(shape)})


def load_classifier(path: str | Path, network: type[Classifier] = SmallClassifier) -> Classifier:
    """The ``network`` of a file, in evaluation mode and without gradients.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for a damaged or another network's file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"classifier weights: {path} does not exist.")
    check_file(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(network.kind)
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if header is None:
        allowed = f"a file that a run of stage {network.kind} exports"
        raise ValueError(f"{path}: header: got no {network.kind!r} entry; allowed: {allowed}.")
    try:
        classifier = network(**json_of(header))
        classifier.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights do not fit the header {header}: {error}") from error
    return classifier.requires_grad_(False).eval()
