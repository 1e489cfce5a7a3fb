"""Extractors: refused files, and images rounded as in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_transdiff.evaluation.backbones import dino_network, resampled
from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.features import EXTRACTORS, load_extractor
from lit_transdiff.models.classifier import load_classifier
from tests.helpers.judge import random_images

IMAGENET_STD = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]


@pytest.mark.numeric
def test_the_classifier_gives_its_own_features_and_logits(files: Path, extractor: FeatureExtractor) -> None:
    pixels = torch.randint(256, (6, 1, 16, 16), dtype=torch.uint8)
    images = pixels.float() / 255 * 2 - 1
    network = load_classifier(files / "judge.safetensors")
    found = extractor(images)
    assert torch.allclose(found.features, network.features(images), atol=1e-5)
    assert torch.allclose(found.logits, network(images), atol=1e-5)
    assert found.features.shape == (6, extractor.num_features) and found.logits.shape == (
        6,
        extractor.num_classes,
    )


@pytest.mark.numeric
def test_images_are_rounded_to_bytes_first(extractor: FeatureExtractor) -> None:
    images = random_images(4)
    rounded = torch.from_numpy(np.round(np.clip((images.numpy() + 1) / 2 * 255, 0, 255))) / 127.5 - 1
    assert torch.equal(extractor(images).features, extractor(rounded).features)
    assert torch.equal(extractor(images.clamp(0.9, 3)).features, extractor(images.clamp(0.9, 1)).features)


def test_training_mode_cannot_be_entered(extractor: FeatureExtractor) -> None:
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


@pytest.mark.parametrize("name", EXTRACTORS)
def test_weights_are_required(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation.extractor_weights: got None"):
        load_extractor(name, None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_extractor(name, tmp_path / "nothing.pth")


def test_wrong_files_are_refused(tmp_path: Path, inception_file: Path) -> None:
    """Each message says what is expected, and where the library that defines the layout publishes it."""
    with pytest.raises(ValueError, match=r"Did you mean 'inception'\?"):
        load_extractor("inceptoin", "x")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    state = torch.load(inception_file, weights_only=True)
    torch.save(
        {k: v for k, v in state.items() if k != "Mixed_6d.branch1x1.conv.weight"}, tmp_path / "incomplete.pth"
    )
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "of_torchvision.pth")
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d.*"):
            load_extractor("inception", file)
        with pytest.raises(ValueError, match=r"vit_large_patch14_dinov2.*dinov2_vitl14_pretrain"):
            load_extractor("dinov2", file)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    torch.save({"cls_token": Boom()}, tmp_path / "boom.pth")
    for name in ("inception", "dinov2"):
        with pytest.raises(ValueError, match="is not the file of weights"):
            load_extractor(name, tmp_path / "boom.pth")


def test_inception_is_the_network_that_torch_fidelity_makes_of_the_file(
    inception: FeatureExtractor, inception_file: Path
) -> None:
    grey = random_images(2)
    found = inception(grey)
    assert found.features.shape == (2, inception.num_features) == (2, 2048) and found.logits.shape == (
        2,
        1008,
    )
    assert found.spatial is None
    assert torch.equal(found.features, inception(grey.expand(-1, 3, -1, -1)).features)
    original = FeatureExtractorInceptionV3("same", ["2048", "logits_unbiased"], str(inception_file))
    pixels = ((grey + 1) / 2 * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert all(
        torch.equal(a, b) for a, b in zip(original(pixels), (found.features, found.logits), strict=True)
    )


def test_spatial_features_are_the_first_channels_of_mixed_6_in_the_order_of_tensorflow(
    inception: FeatureExtractor,
) -> None:
    """Against the branch computed by hand of what reaches the block; height, width, channel is TensorFlow's
    order.
    """
    inputs: list[torch.Tensor] = []
    block = inception.network.Mixed_6d
    with block.register_forward_pre_hook(lambda module, given: inputs.append(given[0].clone())):
        found = inception(random_images(2), spatial=True)
    branch, norm = block.branch1x1, block.branch1x1.bn
    (x,) = inputs
    assert x.shape == (2, 768, 17, 17)
    y = torch.einsum("oi,bihw->bohw", branch.conv.weight[:, :, 0, 0], x)
    scale = norm.weight / (norm.running_var + 0.001).sqrt()
    y = torch.relu((y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None])
    assert found.spatial.shape == (2, inception.num_spatial) == (2, 2023)
    for height, width, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (3, 11, 5)]:
        place = (height * 17 + width) * 7 + channel
        assert torch.allclose(found.spatial[:, place], y[:, channel, height, width], rtol=1e-4, atol=1e-6)
    assert found.spatial.std() > 0
    assert torch.equal(found.features, inception(random_images(2)).features)


def tiny_dino(width: int = 128, patch: int = 14, grid: int = 5) -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=patch * grid,
        patch_size=patch,
        embed_dim=width,
        depth=2,
        num_heads=width // 64,
        init_values=0.5,
        num_classes=0,
    )
    return network.eval()


@pytest.mark.numeric
@pytest.mark.parametrize("layout", ["released", "timm"])
def test_dinov2_is_timms_network_on_resized_and_normalised_images(tmp_path: Path, layout: str) -> None:
    """A tiny one on its own grid of 16 x 16, where the position embedding is unchanged."""
    network = tiny_dino(grid=16)
    file = tmp_path / ("weights.pth" if layout == "released" else "weights.safetensors")
    if layout == "released":
        torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 128)}, file)
    else:
        save_file(network.state_dict(), file)
    extractor = load_extractor("dinov2", file)
    pixels = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    found = extractor(pixels.float() / 127.5 - 1)
    resized = F.interpolate(pixels.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    tokens = network.forward_features(
        (resized - torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]) / IMAGENET_STD
    )
    assert extractor.num_features == 128 and found.logits is None and not extractor.gives_logits
    assert torch.allclose(found.features, tokens[:, 0], atol=1e-5)
    with pytest.raises(ValueError, match="inception, for spatial features"):
        extractor(pixels.float() / 127.5 - 1, spatial=True)


@pytest.mark.numeric
def test_the_position_embedding_is_resampled_as_the_released_code_does() -> None:
    """The class token's stays; of planes and ramps the middle is what they are at the released scale, not at
    16 / 37.
    """
    grid = 37
    ramp = torch.arange(grid).float()
    plane = torch.stack(
        [torch.ones(grid, grid), ramp[:, None].expand(grid, grid), ramp[None].expand(grid, grid)], dim=-1
    )
    position = torch.cat([torch.full((1, 1, 3), 7.0), plane.reshape(1, -1, 3)], dim=1)
    found = resampled(position, 16)
    assert torch.equal(found[:, 0], position[:, 0]) and found.shape == (1, 257, 3)
    inner = found[0, 1:].reshape(16, 16, 3)[2:-2, 2:-2]
    # Output pixel i lies at (i + 1/2) / scale - 1/2; torch's cubic kernel bends a ramp by up to 0.05.
    at, at_plain_scale = ((torch.arange(2, 14) + 0.5) / scale - 0.5 for scale in (16.1 / 37, 16 / 37))
    assert torch.allclose(inner[..., 0], torch.ones(12, 12), atol=1e-5)
    assert torch.allclose(inner[..., 1], at[:, None].expand(12, 12), atol=0.06)
    assert (
        torch.allclose(inner[..., 2], at[None].expand(12, 12), atol=0.06)
        and at_plain_scale[-1] - at[-1] > 0.18
    )
    assert torch.equal(resampled(position, 37), position)


def test_the_tables_network_of_dinov2_has_the_shapes_of_the_released_file() -> None:
    """ViT-L/14 as timm registers it, on meta: the keys and shapes that a file must have."""
    with torch.device("meta"):
        state = timm.create_model("vit_large_patch14_dinov2", num_classes=0).state_dict()
        network = dino_network(dict(state), 224)
    assert {k: v.shape for k, v in network.state_dict().items() if k != "pos_embed"} == {
        k: v.shape for k, v in state.items() if k != "pos_embed"
    }
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 1024) and network.pos_embed.shape == (1, 257, 1024)
