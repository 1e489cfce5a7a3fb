"""Autoencoders: the interface, the one place of the normalisation, and the shipped weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_transdiff.config import AutoencoderTraining
from lit_transdiff.models.autoencoder import (
    AUTOENCODERS,
    IdentityAutoencoder,
    KLAutoencoder,
    check_latents,
    kl_divergence,
    load_autoencoder,
    posterior,
)
from lit_transdiff.stages.autoencoder import psnr
from tests.helpers.datamodule import evaluation_batch
from tests.helpers.reference import assert_near, load

FASHION = Path(__file__).parents[2] / "data/fashion"
PSNR_FLOOR = 32.0  # dB; the card says what was measured
TRAINING = AutoencoderTraining(block_channels=[8, 8, 8], norm_groups=4, latent_channels=3)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved autoencoder with random weights, 3 latent channels, downsampling 4."""
    torch.manual_seed(1)
    autoencoder = KLAutoencoder.new(TRAINING, image_channels=1, image_size=16)
    autoencoder.set_normalisation(torch.tensor([0.5, -1.0, 0.0]), torch.tensor([2.0, 0.5, 1.0]))
    path = tmp_path_factory.mktemp("autoencoder")
    autoencoder.save(path)
    return path


def edited(folder: Path, target: Path, **fields: object) -> Path:
    """A copy of the autoencoder with fields of its config.json replaced."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


@pytest.mark.numeric
def test_posterior_is_the_reference() -> None:
    fixture = load("vae_posterior_clamp")
    mean, logvar = posterior(fixture["in/moments"])
    ours = {
        "mean": mean,
        "logvar": logvar,
        "std": torch.exp(0.5 * logvar),
        "kl": kl_divergence(fixture["in/moments"]),
    }
    for name, value in ours.items():
        assert_near("vae_posterior_clamp", name, value, fixture[f"out/{name}"])


@pytest.mark.numeric
def test_sample_is_clamped_and_normalised(folder: Path) -> None:
    autoencoder = load_autoencoder("kl", folder, 1)
    mean, logvar, noise = torch.randn(2, 3, 4, 4), 40 * torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    shift, scale = torch.tensor([0.5, -1.0, 0.0]).view(3, 1, 1), torch.tensor([2.0, 0.5, 1.0]).view(3, 1, 1)
    moments = torch.cat([mean, logvar], dim=1)
    drawn = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise - shift) / scale
    torch.testing.assert_close(autoencoder.sample(moments, noise), drawn)
    torch.testing.assert_close(autoencoder.sample(moments), (mean - shift) / scale)


@pytest.mark.numeric
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_every_kind_keeps_leading_dimensions(kind: str, folder: Path) -> None:
    autoencoder = load_autoencoder(
        kind, folder if AUTOENCODERS[kind].has_folder else None, image_channels=1
    ).double()
    images = torch.rand(2, 3, 1, 16, 16) * 2 - 1
    moments = autoencoder.encode(images)
    latents = autoencoder.sample(moments, torch.randn(autoencoder.sample(moments).shape))
    side = 16 // autoencoder.downsampling
    assert latents.shape == (2, 3, autoencoder.latent_channels, side, side)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(autoencoder.encode(images[1, 2]), moments[1, 2])
    torch.testing.assert_close(autoencoder.decode(latents[1, 2]), decoded[1, 2])


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_every_kind_stays_frozen(kind: str, folder: Path) -> None:
    autoencoder = load_autoencoder(kind, folder if AUTOENCODERS[kind].has_folder else None, image_channels=1)
    torch.nn.Sequential(autoencoder).train()
    assert not any(module.training for module in autoencoder.modules())
    assert not any(p.requires_grad for p in autoencoder.parameters())


def test_identity_gives_the_images_back() -> None:
    images = torch.rand(2, 4, 3, 8, 8) * 2 - 1
    autoencoder = IdentityAutoencoder(3)
    latents = autoencoder.sample(autoencoder.encode(images), torch.randn(images.shape))
    assert torch.equal(autoencoder.decode(latents), images)
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (3, 1)


@pytest.mark.numeric
@pytest.mark.usefixtures("float64")
def test_scale_changes_latents_but_not_images(folder: Path, tmp_path: Path) -> None:
    plain = load_autoencoder(
        "kl", edited(folder, tmp_path / "plain", latents_mean=[0.0] * 3, latents_std=[1.0] * 3), 1
    ).double()
    normalised = load_autoencoder("kl", folder, 1).double()
    moments = plain.encode(torch.rand(2, 1, 16, 16) * 2 - 1)
    assert not torch.allclose(plain.sample(moments), normalised.sample(moments))
    torch.testing.assert_close(
        plain.decode(plain.sample(moments)), normalised.decode(normalised.sample(moments))
    )


def test_scalar_scale_equals_a_constant_vector(folder: Path, tmp_path: Path) -> None:
    scalar = edited(
        folder,
        tmp_path / "scalar",
        latents_mean=None,
        latents_std=None,
        scaling_factor=0.25,
        shift_factor=0.5,
    )
    vector = edited(folder, tmp_path / "vector", latents_mean=[0.5] * 3, latents_std=[4.0] * 3)
    moments = torch.randn(2, 6, 4, 4)
    ours, theirs = load_autoencoder("kl", scalar, 1), load_autoencoder("kl", vector, 1)
    torch.testing.assert_close(ours.sample(moments), theirs.sample(moments))
    torch.testing.assert_close(ours.sample(moments), (moments[:, :3] - 0.5) * 0.25)


@pytest.mark.parametrize(
    "fields",
    [
        {"latents_mean": [0.0, 0.0]},
        {"latents_std": None},
        {"latents_std": [1.0, 0.0, 1.0]},
        {"latents_std": [1.0, "1", 1.0]},
        {"latents_mean": [0.0, float("nan"), 0.0]},
        {"latents_mean": None, "latents_std": None, "scaling_factor": 0.0},
        {"latents_mean": None, "latents_std": None, "scaling_factor": None},
        {"latents_mean": None, "latents_std": None, "shift_factor": float("inf")},
        {"latent_channels": None},
        {"in_channels": 3},
    ],
)
def test_malformed_configuration_is_refused(fields: dict[str, object], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: {list(fields)[-1]}: got "):
        load_autoencoder("kl", edited(folder, tmp_path / "edited", **fields), 1)


def test_missing_folder_and_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"autoencoder\.path"):
        load_autoencoder("kl", tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match=r"autoencoder\.kind.*Did you mean 'identity'"):
        load_autoencoder("identitty", None, 1)
    broken = edited(folder, tmp_path / "broken")
    weights = load_file(broken / WEIGHTS)
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("quant_conv")},
        broken / WEIGHTS,
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"missing_keys.*quant_conv"):
        load_autoencoder("kl", broken, 1)


def test_fingerprint_covers_weights_and_scale(folder: Path, tmp_path: Path) -> None:
    first = load_autoencoder("kl", folder, 1)
    scaled = edited(folder, tmp_path / "scaled", latents_std=[2.0, 0.5, 1.001])
    reweighted = edited(folder, tmp_path / "reweighted")
    weights = load_file(reweighted / WEIGHTS)
    weights["decoder.conv_out.bias"] += 1e-3
    save_file(weights, reweighted / WEIGHTS, metadata={"format": "pt"})
    prints = [load_autoencoder("kl", path, 1).fingerprint for path in (folder, scaled, reweighted)]
    assert prints[0] == first.fingerprint
    assert len(set(prints)) == 3
    assert IdentityAutoencoder(1).fingerprint != IdentityAutoencoder(3).fingerprint


def test_half_precision_file_loads_as_float32(folder: Path, tmp_path: Path) -> None:
    full = KLAutoencoder.load(folder, 1)
    full.save(tmp_path, dtype=torch.float16)
    assert {v.dtype for v in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    half = KLAutoencoder.load(tmp_path, 1)
    assert {v.dtype for v in half.state_dict().values()} == {torch.float32}
    assert torch.equal(half.latents_std, full.latents_std)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    torch.testing.assert_close(half.encode(images), full.encode(images), atol=2e-2, rtol=2e-2)


def test_check_latents_refuses_a_wrong_scale() -> None:
    check_latents(torch.randn(8, 4, 8, 8))
    for latents in (torch.randn(8, 4, 8, 8) * 0.18, torch.randn(8, 4, 8, 8) * 5, torch.randn(8, 4, 8, 8) + 2):
        with pytest.raises(ValueError, match="wrong scale"):
            check_latents(latents)


def test_shipped_autoencoder_reconstructs_bundled_images() -> None:
    autoencoder = load_autoencoder("kl", FASHION / "autoencoder", image_channels=1)
    images = evaluation_batch(500).values[:, 0]
    moments = autoencoder.encode(images)
    latents = autoencoder.sample(moments, torch.randn_like(autoencoder.sample(moments)))
    check_latents(latents)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    assert mean.abs().max() < 0.1 and (std - 1).abs().max() < 0.1
    assert psnr(autoencoder.decode(autoencoder.sample(moments)), images) > PSNR_FLOOR
