"""Released files that are damaged, incomplete or odd, and options that do not fit them, are refused with what is wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_transdiff.config import ModelConfig
from lit_transdiff.convert import convert
from tests import plain_autoencoder
from tests.test_convert import SMALL, equal, random_state, write_checkpoint


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted autoencoder of 4 channels with downsampling 16."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.save({"model": plain_autoencoder.make(channels=(32, 32, 32, 32, 32))}, folder / "kl16.ckpt")
    convert(folder / "kl16.ckpt", folder / "autoencoder")
    return folder / "autoencoder"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda v: v * float("nan"), "fake_latent: NaN or Inf"),
        (lambda v: v.to(torch.int8), "fake_latent: int8"),
        (lambda v: v.to(torch.complex64), "fake_latent: complex64"),
        (lambda v: v.to_sparse(), "fake_latent: sparse_coo"),
        (lambda v: (v * float("nan")).to(torch.float8_e5m2), "fake_latent: NaN or Inf"),
    ],
    ids=["nan", "int8", "complex", "sparse", "float8"],
)
@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_tensors_that_are_no_weights_are_listed(wrong: Any, message: str, name: str, tmp_path: Path, autoencoder: Path):
    state = random_state(ModelConfig(**SMALL), 1)
    state["fake_latent"] = wrong(state["fake_latent"])
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), **{name: state})
    with pytest.raises(ValueError, match=f"{file}: {name}: entries that are no weights: {message}$"):
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
    assert not (tmp_path / "ours").exists()


def test_a_damaged_file_is_refused_by_its_checksums(tmp_path: Path, autoencoder: Path):
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
    with zipfile.ZipFile(file) as archive:
        part = archive.getinfo("checkpoint-last/data/3")
    content = bytearray(file.read_bytes())
    content[part.header_offset + 200] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: .*checkpoint-last/data/3 in it differs from its checksum"):
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
    assert not (tmp_path / "ours").exists()


def test_every_damaged_file_is_named(tmp_path: Path):
    """Whatever torch or zipfile raise for it."""
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
    whole, generator = file.read_bytes(), np.random.default_rng(0)
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for original in (whole, (tmp_path / "old.pth").read_bytes()):
        for _ in range(30):
            content = bytearray(original)
            for place in generator.integers(len(content), size=20).tolist():
                content[place] ^= 255
            file.write_bytes(content)
            with pytest.raises(ValueError, match=str(file)):
                convert(file, tmp_path / "ours")


def test_names_that_share_a_tensor_and_an_epoch_that_is_one(tmp_path: Path, autoencoder: Path):
    state = random_state(ModelConfig(**SMALL), 1)
    state["encoder_blocks.0.norm2.weight"] = state["encoder_blocks.0.norm1.weight"]
    changes = {"model": state, "model_ema": state, "epoch": torch.tensor(12)}
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), **changes)
    convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=False)
    assert back["epoch"] == 12 and equal(back["model"], state) and equal(back["model_ema"], state)
    for epoch in (1.5, float("inf"), "last", torch.zeros(2)):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), epoch=epoch)
        with pytest.raises(ValueError, match=r"epoch: got .*; allowed: a whole number"):
            convert(file, tmp_path / "again", autoencoder=autoencoder, num_heads=2)
