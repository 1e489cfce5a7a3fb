"""What is made once from a data set: latents of one autoencoder are not taken for those of another."""

import json
import shutil
from pathlib import Path

import pytest
from lightning.fabric import Fabric

from lit_transdiff.config import AutoencoderConfig, DataConfig
from lit_transdiff.data.index import read_index
from lit_transdiff.data.pack import pack
from lit_transdiff.draw import save_image
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.prepare import cache, images_of, statistics
from lit_transdiff.trainer import build
from tests.small import FASHION, ROOT, small_run

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
    pack(folder / "images", folder / "shards", samples_per_shard=16, progress=False)
    return folder / "shards"


def test_a_cache_is_made_once_and_refused_for_another_autoencoder(few: Path, tmp_path: Path, fabric: Fabric):
    shipped = AutoencoderConfig(path=str(FASHION / "autoencoder"))
    index = cache(few, tmp_path / "latents", autoencoder=shipped, data=DATA, fabric=fabric, flips=True)
    assert len(index) == 40 and index.latents is not None and index.latents.shape == (8, 8, 8) and index.latents.flips == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    cache(few, tmp_path / "latents", autoencoder=shipped, data=DATA, fabric=fabric, flips=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}

    other = tmp_path / "other"
    shutil.copytree(FASHION / "autoencoder", other)
    settings = json.loads((other / "config.json").read_text())
    settings["latents_std"][0] *= 2
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"made with other settings \(autoencoder was '[0-9a-f]+', now '[0-9a-f]+'\)"):
        cache(few, tmp_path / "latents", autoencoder=AutoencoderConfig(path=str(other)), data=DATA, fabric=fabric, flips=True)
    geometry = {"latent_channels": 4, "latent_size": 8, "patch_size": 2, "num_classes": 2}
    run = small_run(
        tmp_path,
        data={"train": str(tmp_path / "latents"), "evaluation": None},
        autoencoder={"kind": "kl", "path": str(other)},
        model=geometry,
    )
    with pytest.raises(ValueError, match="made with another autoencoder"):
        build(run)


def test_images_are_read_once_each_and_statistics_say_what_they_are_of(few: Path, tmp_path: Path):
    assert sum(len(batch) for batch in images_of(few, DATA, 7)) == len(read_index(few)) == 40
    extractor = load_extractor("classifier", ROOT / "data/fashion/classifier.safetensors")
    found = statistics(few, tmp_path / "reference.npz", data=DATA, extractor=extractor, batch_size=7)
    assert found.num_images == 40 and found.about["extractor"] == "classifier" and found.about["source"] == str(few)
