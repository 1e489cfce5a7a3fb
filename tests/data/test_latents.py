from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_transdiff.config import DataConfig
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.index import read_index
from lit_transdiff.data.latents import finish_latent_index, write_latent_shards

PIXELS = DataConfig(image_size=8, image_channels=1)


def encode(images):
    """[B, 1, 8, 8] -> [B, 4, 4, 4], not symmetric under flips."""
    return torch.nn.functional.pixel_unshuffle(images, 2)


def cache(shards, dest, flips=True, encode_fn=encode, world=2):
    for rank in range(world):
        info = write_latent_shards(
            shards,
            dest,
            encode_fn,
            fingerprint="abc",
            flips=flips,
            batch_size=3,
            data=PIXELS,
            rank=rank,
            world=world,
            progress=False,
        )
    return finish_latent_index(shards, dest, info, progress=False)


def module_for(folder, fingerprint="abc", **data):
    return DataModule(
        DataConfig(train=str(folder), evaluation=str(folder), image_size=8, image_channels=1, **data),
        num_references=1,
        num_classes=5,
        global_batch_size=16,
        max_steps=8,
        seed=0,
        autoencoder_fingerprint=fingerprint,
    )


def test_cached_latents_are_those_of_the_images(shards, tmp_path):
    index = cache(shards, tmp_path / "latents")
    source = read_index(shards)
    assert np.array_equal(index.key, source.key) and np.array_equal(index.label, source.label)
    assert index.kind == "latents" and index.class_names == source.class_names
    assert read_index(tmp_path / "latents").latents == index.latents
    assert index.latents.shape == (4, 4, 4) and index.latents.flips == 2
    images, latents = module_for(shards, None), module_for(tmp_path / "latents")
    for a, b in zip(images.train_dataloader(), latents.train_dataloader(), strict=True):
        assert torch.equal(a.samples, b.samples) and torch.equal(a.labels, b.labels)
        assert torch.allclose(encode(a.values[:, 0]), b.values[:, 0], atol=1e-3)  # the same flips, too
    for a, b in zip(images.val_dataloader(), latents.val_dataloader(), strict=True):
        assert torch.allclose(encode(a.values[:, 0]), b.values[:, 0], atol=1e-3)


def test_fingerprint_and_flips_are_checked(shards, tmp_path):
    cache(shards, tmp_path / "latents", flips=False)
    for fingerprint in ("other", None):
        with pytest.raises(ValueError, match="made with another autoencoder"):
            module_for(tmp_path / "latents", fingerprint).setup()
    with pytest.raises(ValueError, match=r"data\.horizontal_flip: .* cached without flips"):
        module_for(tmp_path / "latents").train_dataloader()
    with pytest.raises(ValueError, match=r"data\.crop: got 'random'"):
        module_for(tmp_path / "latents", horizontal_flip=False, crop="random").train_dataloader()
    module = module_for(tmp_path / "latents", horizontal_flip=False)
    module.data = replace(module.data, image_size=16)
    with pytest.raises(ValueError, match=r"data\.image_size: got 16; allowed: 8, of the latents"):
        module.setup()
    values = [batch.values for batch in module_for(tmp_path / "latents", horizontal_flip=False).train_dataloader()]
    assert values[0].shape == (16, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="an index'; allowed: a new folder"):
        cache(shards, tmp_path / "latents")


def test_values_that_float16_cannot_hold_are_refused(shards, tmp_path):
    name = read_index(shards).name_of(0)
    with pytest.raises(ValueError, match=f"{name}: moments up to"):
        cache(shards, tmp_path / "a", encode_fn=lambda images: encode(images) * 1e6)
    with pytest.raises(ValueError, match=f"{name}: moments up to nan"):
        cache(shards, tmp_path / "b", encode_fn=lambda images: encode(images) * float("nan"))
    assert not list((tmp_path / "a").glob("*.tar*"))


def test_missing_latent_shards_are_named(shards, tmp_path):
    options = dict(fingerprint="abc", flips=True, batch_size=64, data=PIXELS, progress=False)
    info = write_latent_shards(shards, tmp_path / "a", encode, rank=0, world=2, **options)
    with pytest.raises(ValueError, match=r"5 of 10 latent shards are missing: train-000001\.tar"):
        finish_latent_index(shards, tmp_path / "a", info)
