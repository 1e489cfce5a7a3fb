"""A small convolutional classifier: the judge of small-image runs (class accuracy, and features for the distances).

Shapes: B batch, C image channels, H W pixels. Images are in [-1, 1].
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_transdiff.base.files import check_file
from lit_transdiff.config import require
from lit_transdiff.config.targets import save_tensors

FEATURES = 64
WIDTHS = (24, 48, 96)  # channels of the levels; each ends by halving the size
METADATA_KEY = "classifier"  # the metadata key of the weights file that holds num_classes, image_size, image_channels


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU())


class SmallClassifier(nn.Module):
    """Convolutions at three sizes, the spatial mean, 64 features, one logit a class."""

    def __init__(self, num_classes: int, image_size: int, image_channels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.image_size = image_size
        self.image_channels = image_channels
        levels: list[nn.Module] = []
        width = image_channels
        for wider in WIDTHS:
            levels += [conv_block(width, wider), nn.MaxPool2d(2)]
            width = wider
        self.trunk = nn.Sequential(*levels, conv_block(width, width))
        self.neck = nn.Linear(width, FEATURES)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> features [B, 64], not negative."""
        expected = (self.image_channels, self.image_size, self.image_size)
        require(tuple(images.shape[1:]) == expected, "images", tuple(images.shape), f"[B, C, H, W] with (C, H, W) = {expected}")
        return torch.relu(self.neck(self.trunk(images).mean(dim=(2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.head(self.dropout(self.features(images)))


def save_classifier(classifier: SmallClassifier, path: str | Path) -> None:
    """Write weights and, in the file's header, what is needed to rebuild the classifier."""
    shape = {name: getattr(classifier, name) for name in ("num_classes", "image_size", "image_channels")}
    weights = {name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()}
    save_tensors(weights, Path(path), metadata={METADATA_KEY: json.dumps(shape)})


def load_classifier(path: str | Path) -> SmallClassifier:
    """The classifier of a file, in evaluation mode and without gradients.

    Raises ``FileNotFoundError`` without the file and ``ValueError`` naming it when it is damaged or not a classifier's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"classifier weights: {path} does not exist.")
    check_file(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(METADATA_KEY)
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if header is None:
        raise ValueError(f"{path}: header: got no {METADATA_KEY!r} entry; allowed: a file written by save_classifier.")
    try:
        classifier = SmallClassifier(**json.loads(header))
        classifier.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights do not fit the header {header}: {error}") from error
    return classifier.requires_grad_(False).eval()
