"""Vision backbones of timm as extractors: those of FD-DINOv2, of FDr6 and of CMMD.

Shapes: B images, C channels, H W pixels, D features.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lit_transdiff.base.files import short_hash
from lit_transdiff.evaluation.extractor import (
    FeatureExtractor,
    Features,
    StateDict,
    colour,
    read_extractor_weights,
    wrong_file,
)

HALVES = (0.5, 0.5, 0.5)


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


class TimmFeatures(FeatureExtractor):
    """A backbone of timm as FDr6 uses it: bicubic, antialiased resizing, then the features of one pooling."""

    table_name = ""  # the name in EXTRACTORS
    model = ""  # timm's name, with that of the weights
    image_size = 224
    options: ClassVar[dict[str, Any]] = {"num_classes": 0, "dynamic_img_size": True, "dynamic_img_pad": True}
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    gives_logits = False
    mean: Tensor
    std: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.weights_file = f"the weights {cls.model} of timm (.safetensors or .bin), as published on its hub"

    def __init__(self, path: str | Path) -> None:
        state = read_extractor_weights(path, self.weights_file, set())
        try:
            network = self.network_of(state)
        except (RuntimeError, KeyError, AttributeError) as error:  # timm's conversions assume some keys
            raise wrong_file(path, self.weights_file, error) from error
        super().__init__(
            self.table_name, network, short_hash(Path(path)), self.size_of(network), num_classes=None
        )
        for name, value in zip(("mean", "std"), self.normalization, strict=True):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    @classmethod
    def network_of(cls, state: StateDict | None) -> nn.Module:
        """The network, with the weights of a file in timm's or the published layout, or random ones."""
        if state is None:
            return timm.create_model(cls.model, **cls.options)
        source = {"state_dict": state, "url": "", "hf_hub_id": None, "file": None}
        return timm.create_model(cls.model, pretrained=True, pretrained_cfg_overlay=source, **cls.options)

    def size_of(self, network: nn.Module) -> int:
        return int(network.num_features)  # type: ignore[arg-type]

    def resized(self, pixels: Tensor) -> Tensor:
        """Pixels as numbers from 0 to 1, resized if they have another size."""
        images, size = pixels.float() / 255, (self.image_size, self.image_size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)

    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        return Features(self.pooled((self.resized(colour(pixels)) - self.mean) / self.std))

    def pooled(self, images: Tensor) -> Tensor:
        """The class token after the last norm."""
        return self.network.forward_features(images)[:, 0]  # type: ignore[operator]


class Dinov2FdrFeatures(TimmFeatures):
    """DINOv2 of FDr6: 256 pixels, padded to 266, unlike FD-DINOv2's 224."""

    table_name, model, image_size = "dinov2_fdr", "vit_large_patch14_dinov2.lvd142m", 256


class MaeFeatures(TimmFeatures):
    """A masked autoencoder's encoder."""

    table_name, model = "mae", "vit_large_patch16_224.mae"


class ClipFeatures(TimmFeatures):
    """CLIP's image encoder before its projection: 256 pixels, padded to 266."""

    table_name, model, image_size = "clip", "vit_large_patch14_clip_224.openai", 256
    normalization = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


class SiglipFeatures(TimmFeatures):
    """SigLIP 2 with its attention pooling, at 224 pixels."""

    table_name, model = "siglip", "vit_so400m_patch16_siglip_256.v2_webli"
    normalization = HALVES, HALVES

    def pooled(self, images: Tensor) -> Tensor:
        """The attention pool of all tokens."""
        return self.network.attn_pool(self.network.forward_features(images))  # type: ignore[operator]


class ConvnextFeatures(TimmFeatures):
    """ConvNeXt V2: the mean over the grid before the head's norm."""

    table_name, model = "convnext", "convnextv2_base.fcmae_ft_in22k_in1k"
    options: ClassVar[dict[str, Any]] = {"num_classes": 0}

    def pooled(self, images: Tensor) -> Tensor:
        """The mean over the grid."""
        return self.network.forward_features(images).mean(dim=(2, 3))  # type: ignore[operator]


class Clip336Features(TimmFeatures):
    """CLIP's image embedding after its projection, at 336 pixels: the features of CMMD.

    Resized images are rounded to bytes, as by Pillow.
    """

    table_name, model, image_size = "clip_336", "vit_large_patch14_clip_336.openai", 336
    options: ClassVar[dict[str, Any]] = {}
    normalization = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def size_of(self, network: nn.Module) -> int:
        return int(network.num_classes)  # type: ignore[arg-type]

    def resized(self, pixels: Tensor) -> Tensor:
        """Pixels in steps of 1/255 from 0 to 1."""
        return super().resized(pixels).mul(255).round().clamp(0, 255) / 255

    def pooled(self, images: Tensor) -> Tensor:
        """The projected class token."""
        return self.network(images)
