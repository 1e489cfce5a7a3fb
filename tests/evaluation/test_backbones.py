"""The backbones of FDr6 and CMMD: the sizes that their definitions give, and small ones with random weights.

The published weights are not here, so no published value is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_transdiff.evaluation.backbones import TimmFeatures
from lit_transdiff.evaluation.features import EXTRACTORS, FDR6

# name: input size, its normalization, tokens (or channels of the grid), features
SIZES: dict[str, tuple[int, tuple[float, float], tuple[int, ...], int]] = {
    "dinov2_fdr": (256, (0.485, 0.229), (362, 1024), 1024),
    "convnext": (224, (0.485, 0.229), (1024, 7, 7), 1024),
    "mae": (224, (0.485, 0.229), (197, 1024), 1024),
    "siglip": (224, (0.5, 0.5), (196, 1152), 1152),
    "clip": (256, (0.48145466, 0.26862954), (362, 1024), 1024),
    "clip_336": (336, (0.48145466, 0.26862954), (577, 1024), 768),
}
TINY: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def unborn(cls: type[TimmFeatures], network: nn.Module) -> TimmFeatures:
    """An extractor around a network without a file."""
    extractor = cls.__new__(cls)
    nn.Module.__init__(extractor)
    extractor.network = network.eval()
    return extractor


@pytest.mark.parametrize("name", SIZES)
def test_tokens_and_features_have_the_sizes_of_the_definition(name: str) -> None:
    """On torch's device without numbers, so that it costs nothing."""
    size, (mean, std), tokens, features = SIZES[name]
    cls = EXTRACTORS[name]
    with torch.device("meta"):
        extractor = unborn(cls, cls.network_of(None))
        images = torch.zeros(2, 3, size, size)
        assert extractor.network.forward_features(images).shape == (2, *tokens)  # type: ignore[operator]
        assert extractor.pooled(images).shape == (2, features) == (2, extractor.size_of(extractor.network))
    assert cls.image_size == size and cls.table_name == name
    assert [value[0] for value in cls.normalization] == pytest.approx([mean, std])


def test_the_extractors_of_fdr6_are_in_the_table() -> None:
    assert len(FDR6) == 6 and set(FDR6) <= set(EXTRACTORS)


def tiny(name: str) -> type[TimmFeatures]:
    """The extractor's class with a small network."""
    cls = EXTRACTORS[name]
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)} if name == "convnext" else TINY
    return type(cls.__name__, (cls,), {"options": {**cls.options, **small}})


def random_file(cls: type[TimmFeatures], path: Path) -> nn.Module:
    """A network with random weights, also saved as a file of weights."""
    torch.manual_seed(0)
    network = cls.network_of(None).eval()
    for parameter in network.parameters():  # timm starts some at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file(network.state_dict(), path)
    return network


@pytest.mark.numeric
@pytest.mark.parametrize("name", SIZES)
def test_features_of_random_weights_from_a_file(name: str, tmp_path: Path) -> None:
    cls = tiny(name)
    network = random_file(cls, tmp_path / "weights.safetensors")
    extractor = cls(tmp_path / "weights.safetensors")
    pixels = torch.randint(256, (2, 1, 40, 40), dtype=torch.uint8)
    found = extractor(pixels.float() / 127.5 - 1).features
    assert found.shape == (2, extractor.num_features)
    with torch.no_grad():
        assert torch.allclose(found, expected(name, network, pixels), atol=1e-5)


def expected(name: str, network: nn.Module, pixels: Tensor) -> Tensor:
    """The definition of each feature, written out."""
    size, (mean, std), _, _ = SIZES[name]
    x = F.interpolate(
        pixels.repeat(1, 3, 1, 1) / 255, (size, size), mode="bicubic", align_corners=False, antialias=True
    )
    x = (x * 255).round().clamp(0, 255) / 255 if name == "clip_336" else x
    rows = EXTRACTORS[name].normalization
    mean_, std_ = (torch.tensor(row).view(1, 3, 1, 1) for row in rows)
    assert float(mean_[0, 0, 0, 0]) == pytest.approx(mean) and float(std_[0, 0, 0, 0]) == pytest.approx(std)
    tokens = network.forward_features((x - mean_) / std_)  # type: ignore[operator]
    if name == "convnext":
        return tokens.flatten(2).mean(dim=2)
    if name == "siglip":
        return network.attn_pool(tokens)  # type: ignore[operator]
    if name == "clip_336":
        return network.head(tokens[:, 0])  # type: ignore[operator]
    return tokens[:, 0]


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    for name in ("mae", "convnext", "siglip"):
        with pytest.raises(ValueError, match="is not the file of weights"):
            tiny(name)(tmp_path / "other.safetensors")
