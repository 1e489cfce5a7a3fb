"""Feature extractors: the networks whose features and logits the scores are computed from.

Shapes: B images, C channels, H W pixels, D features, K classes, S spatial features. Images are in [-1, 1].
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from lit_transdiff.base.files import check_file, check_zip, short_hash
from lit_transdiff.checkpoints.version import read_versioned
from lit_transdiff.config import require, unknown
from lit_transdiff.data.pixels import from_bytes, to_bytes
from lit_transdiff.models.classifier import Classifier, Judge, SmallClassifier, load_classifier

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
        self.num_classes = num_classes  # of the data set, if the logits are over its classes

    @abstractmethod
    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        """Features of ``pixels`` [B, C, H, W], uint8; with ``spatial`` also the spatial features."""

    @torch.no_grad()
    def forward(self, images: Tensor, spatial: bool = False) -> Features:
        require(
            not spatial or self.num_spatial is not None,
            "evaluation.extractor",
            self.name,
            "inception, for spatial features",
        )
        with torch.autocast(images.device.type, enabled=False):
            return self.extract(to_bytes(images), spatial)

    def train(self, mode: bool = True) -> FeatureExtractor:
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU for an extractor without weights."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))


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


class DinoFeatures(FeatureExtractor):
    """DINOv2: the class token after the last norm, for FD-DINOv2 (arXiv 2306.04675), which uses ViT-L/14.

    Images are resized to 224 pixels (bicubic, antialiased) and normalised as for ImageNet. The network size
    follows from the weights. The position embedding is resampled to 16 x 16 with the offset of the released
    code, unlike timm's default.
    """

    weights_file = (
        "DINOv2 ViT-L/14 as .pth in the released layout or .safetensors in timm's "
        "(vit_large_patch14_dinov2.lvd142m), "
        f"published as {getattr(get_pretrained_cfg('vit_large_patch14_dinov2.lvd142m'), 'url', '')}"
    )
    gives_logits = False
    image_size = 224
    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path) -> None:
        needed = {
            "cls_token",
            "pos_embed",
            "patch_embed.proj.weight",
            "blocks.0.mlp.fc1.weight",
            "blocks.0.ls1.gamma",
        }
        state = read_extractor_weights(path, self.weights_file, needed)
        try:
            network = dino_network(
                {key: value for key, value in state.items() if key != "mask_token"}, self.image_size
            )
        except RuntimeError as error:
            raise wrong_file(path, self.weights_file, error) from error
        super().__init__("dinov2", network, short_hash(Path(path)), network.embed_dim, num_classes=None)
        for name, value in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        size = (self.image_size, self.image_size)
        images = F.interpolate(colour(pixels).float(), size=size, mode="bicubic", antialias=True) / 255
        return Features(self.network((images - self.mean) / self.std))


def dino_network(state: StateDict, image_size: int) -> VisionTransformer:
    """timm's vision transformer with the weights of ``state``. Raises ``RuntimeError`` for wrong keys.

    All released sizes have a head dimension of 64.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    network = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_heads=width // 64,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        init_values=1e-5,
        num_classes=0,
        global_pool="token",
    )
    network.load_state_dict({**state, "pos_embed": resampled(state["pos_embed"], image_size // patch)})
    return network


def resampled(position: Tensor, size: int) -> Tensor:
    """Resample the position embedding [1, 1 + M M, D] bicubically, by the released scale (size + 0.1) / M."""
    old = math.isqrt(position.shape[1] - 1)
    if old == size:
        return position
    grid = rearrange(position[:, 1:].float(), "1 (h w) d -> 1 d h w", h=old)
    grid = F.interpolate(grid, scale_factor=(size + 0.1) / old, mode="bicubic")
    return torch.cat([position[:, :1].float(), rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


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


def published_hash(path: Path) -> str:
    """The fingerprint of InceptionV3's file, checked against the SHA-256 digits in its published name."""
    published, found = Path(URL_INCEPTION_V3), short_hash(path)
    begins = published.stem.rpartition("-")[2]
    if path.name == published.name and not found.startswith(begins):
        raise ValueError(
            f"evaluation.extractor_weights: {path} is damaged: its SHA-256 is {found}..., published was "
            f"{begins}..."
        )
    return found


def wrong_file(path: str | Path, expected: str, why: object) -> ValueError:
    """The error for a weights file that is not of the expected network."""
    unsafe = "Weights only load failed" in str(why)  # the rest advises to run code from the file
    reason = "it holds more than tensors" if unsafe else " ".join(str(why).split())[:300]
    return ValueError(
        f"evaluation.extractor_weights: {path} is not the file of weights ({reason}); expected {expected}."
    )


EXTRACTORS: dict[str, type[ClassifierFeatures] | type[InceptionFeatures] | type[DinoFeatures]] = {
    "classifier": ClassifierFeatures,
    "judge": JudgeFeatures,
    "inception": InceptionFeatures,
    "dinov2": DinoFeatures,
}


def check_extractor_weights(name: str, weights: str | Path | None) -> None:
    """Raise ``ValueError`` for an unknown extractor, and for one without the path of its weights."""
    check_name(name)
    allowed = f"for extractor {name!r} the path of {EXTRACTORS[name].weights_file}"
    require(bool(weights), "evaluation.extractor_weights", weights, allowed)


def check_name(name: str) -> None:
    """Raise ``ValueError`` for an unknown extractor."""
    if name not in EXTRACTORS:
        raise unknown("evaluation.extractor", name, EXTRACTORS)


def load_extractor(
    name: str, weights: str | Path | None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Load the extractor ``name`` with the weights of a file to ``device``, without any download.

    Raises ``ValueError`` for an unknown name and a missing or wrong file argument, and ``FileNotFoundError``
    if the file does not exist.
    """
    check_extractor_weights(name, weights)
    if not Path(str(weights)).is_file():
        expected = EXTRACTORS[name].weights_file
        raise FileNotFoundError(
            f"evaluation.extractor_weights: {weights} does not exist; expected {expected}."
        )
    return EXTRACTORS[name](str(weights)).to(device)
