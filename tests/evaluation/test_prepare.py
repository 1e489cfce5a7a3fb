"""Preparation of a data set: latents of one autoencoder are not mistaken for those of another."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from lit_transdiff.cli.pipeline import prepare_reference
from lit_transdiff.config import AutoencoderConfig, DataConfig
from lit_transdiff.data.index import read_index
from lit_transdiff.data.pack import Cut, pack
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.prepare import cache, check_statistics, images_of, statistics
from lit_transdiff.evaluation.statistics import save_statistics
from lit_transdiff.models.classifier import SmallClassifier, save_classifier
from lit_transdiff.sampling.draw import save_image
from lit_transdiff.training.build import build
from tests.helpers.judge import BATCHES
from tests.helpers.small import FASHION, ROOT, small_run, twice

DATA = DataConfig(image_size=32, image_channels=1)


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of forty bundled images, written out and packed again."""
    folder = tmp_path_factory.mktemp("few")
    for i, image in enumerate(next(iter(images_of(FASHION / "evaluation", DATA, 40)))):
        target = folder / "images" / f"class-{i % 2}" / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, target)
    pack(folder / "images", folder / "shards", cut=Cut(samples_per_shard=16), progress=False)
    return folder / "shards"


def test_a_cache_is_made_once_and_refused_for_another_autoencoder(few: Path, tmp_path: Path, fabric: Fabric):
    shipped = AutoencoderConfig(path=str(FASHION / "autoencoder"))
    index = cache(few, tmp_path / "latents", autoencoder=shipped, data=DATA, fabric=fabric, flips=True)
    assert (
        len(index) == 40
        and index.latents is not None
        and index.latents.shape == (8, 8, 8)
        and index.latents.flips == 2
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    cache(few, tmp_path / "latents", autoencoder=shipped, data=DATA, fabric=fabric, flips=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}

    other = tmp_path / "other"
    shutil.copytree(FASHION / "autoencoder", other, ignore=shutil.ignore_patterns("checksums.json"))
    settings = json.loads((other / "config.json").read_text())
    settings["latents_std"][0] *= 2
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"made with other settings \(autoencoder was '[0-9a-f]+', now '[0-9a-f]+'\)"
    ):
        cache(
            few,
            tmp_path / "latents",
            autoencoder=AutoencoderConfig(path=str(other)),
            data=DATA,
            fabric=fabric,
            flips=True,
        )
    geometry = {"latent_channels": 4, "latent_size": 8, "patch_size": 2, "num_classes": 2}
    run = small_run(
        tmp_path,
        data={"train": str(tmp_path / "latents"), "evaluation": None},
        autoencoder={"kind": "kl", "path": str(other)},
        model=geometry,
    )
    with pytest.raises(ValueError, match="made with another autoencoder"):
        build(run)


def test_two_caches_at_once_are_one(few: Path, tmp_path: Path, fabric: Fabric):
    shipped = AutoencoderConfig(path=str(FASHION / "autoencoder"))
    found = twice(
        lambda: cache(few, tmp_path / "both", autoencoder=shipped, data=DATA, fabric=fabric, flips=False)
    )
    assert [len(index) for index in found] == [40, 40] and not (tmp_path / "both" / "finished").exists()


def test_images_are_read_once_each_and_statistics_say_what_they_are_of(few: Path, tmp_path: Path):
    assert sum(len(batch) for batch in images_of(few, DATA, 7)) == len(read_index(few)) == 40
    extractor = load_extractor("classifier", ROOT / "data/fashion/classifier.safetensors")
    found = statistics(few, tmp_path / "reference.npz", data=DATA, extractor=extractor, batch_size=7)
    assert (
        found.num_images == 40
        and found.about["extractor"] == "classifier"
        and found.about["source"] == str(few)
    )


def test_statistics_of_other_classes_than_the_classifiers_are_refused(few: Path, tmp_path: Path):
    save_classifier(SmallClassifier(2, 32, 1), tmp_path / "judge.safetensors")
    (tmp_path / "export.json").write_text(json.dumps({"class_names": ["class-0", "class-2"]}))
    extractor = load_extractor("classifier", tmp_path / "judge.safetensors")
    with pytest.raises(
        ValueError, match=r"shards: got class 1 'class-1'; allowed: 'class-2', .* of the classifier"
    ):
        statistics(few, tmp_path / "reference.npz", data=DATA, extractor=extractor)


def test_statistics_of_something_else_are_refused(few: Path, tmp_path: Path):
    extractor = load_extractor("classifier", ROOT / "data/fashion/classifier.safetensors")
    made = statistics(few, tmp_path / "reference.npz", data=DATA, extractor=extractor)
    check = dict(data=DATA, extractor=extractor)
    assert check_statistics(few, tmp_path / "reference.npz", **check).hash == made.hash
    with pytest.raises(ValueError, match=r"made of other images \(source_hash: .* there, .* wanted\)"):
        check_statistics(FASHION / "evaluation", tmp_path / "reference.npz", **check)
    with pytest.raises(ValueError, match=r"\(crop: '\w+' there, 'random' wanted\)"):
        other = dataclasses.replace(DATA, crop="random")
        check_statistics(few, tmp_path / "reference.npz", data=other, extractor=extractor)
    save_statistics(
        dataclasses.replace(made, about={**made.about, "fingerprint": "other"}), tmp_path / "weights.npz"
    )
    with pytest.raises(ValueError, match="weights of the extractor: got 'other'"):
        check_statistics(few, tmp_path / "weights.npz", **check)
    np.savez(tmp_path / "public.npz", mu=made.mu, sigma=made.sigma)
    with pytest.raises(ValueError, match="extractor: got 'inception'"):
        check_statistics(few, tmp_path / "public.npz", **check)


def test_a_pipeline_refuses_a_reference_of_other_images(few: Path, tmp_path: Path, fabric: Fabric):
    weights = str(ROOT / "data/fashion/classifier.safetensors")
    settings = {
        "extractor": "classifier",
        "extractor_weights": weights,
        "reference": str(tmp_path / "reference.npz"),
    }
    run = small_run(tmp_path, evaluation=settings)
    prepare_reference(str(few), run, fabric)
    before = (tmp_path / "reference.npz").stat().st_mtime_ns
    prepare_reference(str(few), run, fabric)
    assert (tmp_path / "reference.npz").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="made of other images"):
        prepare_reference(str(FASHION / "evaluation"), run, fabric)


def test_statistics_of_an_npz_file_of_images(tmp_path: Path):
    """The same as of the same images in shards, as far as their content goes: here one of colour, by hand."""
    pixels = np.random.default_rng(0).integers(256, size=(9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    torch.manual_seed(0)
    save_classifier(SmallClassifier(3, 8, 3), tmp_path / "judge.safetensors")
    extractor = load_extractor("classifier", tmp_path / "judge.safetensors")
    found = statistics(
        tmp_path / "images.npz", tmp_path / "reference.npz", data=DATA, extractor=extractor, batch_size=4
    )
    features = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).features.double().numpy()
    np.testing.assert_allclose(found.mu, features.mean(0), **BATCHES)
    np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), **BATCHES)
    check_statistics(tmp_path / "images.npz", tmp_path / "reference.npz", data=DATA, extractor=extractor)
