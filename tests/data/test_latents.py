from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_transdiff.base.files import format_bytes
from lit_transdiff.config import DataConfig
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.index import read_index
from lit_transdiff.data.latents import LatentCache, latent_info
from lit_transdiff.data.order import TrainPlan
from lit_transdiff.data.pack import pack

PIXELS = DataConfig(image_size=8, image_channels=1)
CPU = torch.device("cpu")


def encode(images):
    """[B, 1, 8, 8] -> [B, 4, 4, 4], not symmetric under flips."""
    return torch.nn.functional.pixel_unshuffle(images, 2)


def begun(shards, dest, flips=True, fingerprint="abc", data=PIXELS):
    info = latent_info(encode, data, fingerprint=fingerprint, flips=flips, device=CPU)
    work = LatentCache(shards, dest, info, data)
    work.begin(lambda text: None)
    return work


def cache(shards, dest, flips=True, encode_fn=encode, world=2):
    work = begun(shards, dest, flips)
    for rank in range(world):
        work.write(encode_fn, batch_size=3, device=CPU, rank=rank, world=world, progress=False)
    return work.finish()


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
        # the same flips, too
        assert torch.allclose(encode(a.values[:, 0]), b.values[:, 0].float(), atol=1e-3)
    for a, b in zip(images.val_dataloader(), latents.val_dataloader(), strict=True):
        assert torch.allclose(encode(a.values[:, 0]), b.values[:, 0].float(), atol=1e-3)


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
    values = [
        batch.values for batch in module_for(tmp_path / "latents", horizontal_flip=False).train_dataloader()
    ]
    assert values[0].shape == (16, 1, 4, 4, 4)


def test_values_that_float16_cannot_hold_are_refused(shards, tmp_path):
    name = read_index(shards).name_of(0)
    with pytest.raises(ValueError, match=f"{name}: moments up to"):
        cache(shards, tmp_path / "a", encode_fn=lambda images: encode(images) * 1e6)
    with pytest.raises(ValueError, match=f"{name}: moments up to nan"):
        cache(shards, tmp_path / "b", encode_fn=lambda images: encode(images) * float("nan"))
    assert not list((tmp_path / "a").glob("*.tar*"))


def test_missing_latent_shards_are_named(shards, tmp_path):
    work = begun(shards, tmp_path / "a")
    work.write(encode, batch_size=64, device=CPU, rank=0, world=2, progress=False)
    with pytest.raises(ValueError, match=r"5 of 10 shards are missing: train-000001\.tar"):
        work.finish()


class Died(RuntimeError):
    """An exception in place of anything that ends a process."""


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_cache_that_was_stopped_goes_on_with_any_number_of_ranks(shards, tmp_path, world):
    whole = cache(shards, tmp_path / "whole", world=1)
    calls = []

    def dying(images):
        calls.append(len(images))
        if len(calls) == 20:
            raise Died
        return encode(images)

    with pytest.raises(Died):
        begun(shards, tmp_path / "part").write(
            dying, batch_size=3, device=CPU, rank=1, world=2, progress=False
        )
    (tmp_path / "part" / "train-000000.tar.partial-1").write_bytes(b"of a process that was killed")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.tar")}
    assert len(before) == 3  # of 6 batches each
    assert cache(shards, tmp_path / "part", world=world).shards == whole.shards
    assert (
        before.items()
        <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.tar")}.items()
    )
    names = sorted(path.name for path in (tmp_path / "part").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_of_something_else_is_refused(shards, image_folder, tmp_path, finished):
    if finished:
        cache(shards, tmp_path / "a")
    else:
        begun(shards, tmp_path / "a")
    begun(shards, tmp_path / "a")  # the same again is no error
    pack(image_folder, tmp_path / "other", seed=1, progress=False)
    for changes, message in [
        (dict(fingerprint="xyz"), "autoencoder was 'abc', now 'xyz'"),
        (dict(flips=False), "flips was 2, now 1"),
        (dict(data=replace(PIXELS, crop="none")), "crop was 'center', now 'none'"),
        (dict(data=replace(PIXELS, image_size=16)), "image_size was 8, now 16"),
        (dict(shards=tmp_path / "other"), "source was"),
    ]:
        with pytest.raises(ValueError, match=message):
            begun(**(dict(shards=shards, dest=tmp_path / "a") | changes))
    with pytest.raises(ValueError, match=r"data\.crop: got 'random-square'"):
        begun(shards, tmp_path / "b", data=replace(PIXELS, crop="random-square"))
    with pytest.raises(ValueError, match=r"already holds index\.json .* but no caching\.json"):
        begun(shards, shards)


def test_the_size_is_said_and_must_fit_before_anything_is_written(shards, tmp_path, monkeypatch):
    info = latent_info(encode, PIXELS, fingerprint="abc", flips=True, device=CPU)
    said = []
    LatentCache(shards, tmp_path / "a", info, PIXELS).begin(said.append)
    cache(shards, tmp_path / "a")
    total = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.tar"))
    assert (
        "65 x 2 latents of shape (4, 4, 4) in float16 -> 10 shards" in said[0]
        and f", {format_bytes(total)};" in said[0]
    )
    monkeypatch.setattr("lit_transdiff.base.files.free_bytes", lambda folder: total - 1)
    with pytest.raises(ValueError, match=f"{format_bytes(total)} are to be written, but only"):
        LatentCache(shards, tmp_path / "b", info, PIXELS).begin(said.append)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("num_references", [1, 3])
def test_latents_read_at_once_are_those_read_one_by_one(shards, tmp_path, num_references):
    index = cache(shards, tmp_path / "latents")
    rows = TrainPlan(index, 0, num_references=num_references).rows(10, 90)
    for training in (True, False):
        dataset = PlannedDataset(index, PIXELS, seed=3, training=training)
        batch, (samples, values) = dataset[rows], dataset.read_one_by_one(rows)
        assert batch.values.dtype == torch.float16 and np.array_equal(batch.samples, samples)
        assert torch.equal(batch.values.flatten(0, 1), values)
    shard = tmp_path / "latents" / index.shards[3].name
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"train-000003\.tar/.*: the shard is truncated"):
        PlannedDataset(index, PIXELS)[rows]
    skipping = PlannedDataset(index, replace(PIXELS, on_bad_sample="skip"))
    assert skipping[rows].values.shape == (80, num_references, 4, 4, 4) and skipping.num_skipped > 0
