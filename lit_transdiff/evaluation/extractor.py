"""The interface of feature extractors, and the reading of their weights.

Shapes: B images, C channels, H W pixels, D features, K classes, S spatial features. Images are in [-1, 1].
"""

from __future__ import annotations

import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_transdiff.base.files import check_file, check_zip
from lit_transdiff.config import require
from lit_transdiff.data.pixels import to_bytes

StateDict = dict[str, Tensor]


class Features(NamedTuple):
    """The outputs of an extractor for a batch."""

    features: Tensor  # [B, D] float32
    logits: Tensor | None = None  # [B, K] float32
    spatial: Tensor | None = None  # [B, S] float32, on request


class FeatureExtractor(nn.Module, ABC):
    """Images [B, C, H, W] -> features, logits and spatial features, without gradients, in evaluation mode.

    Images are first rounded to 8 bits, so that generated images are treated like the files of a reference.
    """

    weights_file = ""  # a description of the weights file and its source
    num_spatial: int | None = None  # size of the spatial features; None without them
    gives_logits = True
    class_names: Sequence[str] = ()  # the data set's class names, if known

    def __init__(
        self, name: str, network: nn.Module, fingerprint: str, num_features: int, num_classes: int | None
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network.requires_grad_(False).eval()
        self.fingerprint = fingerprint  # hash of the weights file
        self.num_features = num_features
        self.num_classes = num_classes  # classes of the data set, if the logits are over them

    @abstractmethod
    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        """Features of ``pixels`` [B, C, H, W], uint8; with ``spatial`` also the spatial features."""

    @torch.no_grad()
    def forward(self, images: Tensor, spatial: bool = False) -> Features:
        allowed = "inception, for spatial features"
        require(not spatial or self.num_spatial is not None, "evaluation.extractor", self.name, allowed)
        with torch.autocast(images.device.type, enabled=False):
            return self.extract(to_bytes(images), spatial)

    def train(self, mode: bool = True) -> FeatureExtractor:
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU for an extractor without weights."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))


def colour(pixels: Tensor) -> Tensor:
    """Repeat the channel of grey images three times."""
    return repeat(pixels, "b 1 h w -> b c h w", c=3) if pixels.shape[1] == 1 else pixels


def read_extractor_weights(path: str | Path, expected: str, needed: set[str]) -> StateDict:
    """Read a state dict (.safetensors, or others with ``weights_only``) and check its keys ``needed``."""
    check_file(Path(path))
    if zipfile.is_zipfile(path):
        check_zip(Path(path))
    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, SafetensorError) as error:
        raise wrong_file(path, expected, error) from error
    lacks = sorted(needed - set(state)) if isinstance(state, dict) else ["a state dict"]
    if lacks:
        raise wrong_file(path, expected, f"it lacks {', '.join(lacks[:3])}")
    return state


def wrong_file(path: str | Path, expected: str, why: object) -> ValueError:
    """The error for a weights file that is not of the expected network."""
    unsafe = "Weights only load failed" in str(why)  # the rest advises to run code from the file
    reason = "it holds more than tensors" if unsafe else " ".join(str(why).split())[:300]
    return ValueError(
        f"evaluation.extractor_weights: {path} is not the file of weights ({reason}); expected {expected}."
    )
