"""One bit of a file turns, on a disk or in a copy: it is noticed by the file's name where it is read, or
changes no number.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_transdiff.base.files import crc32_of_files, crc32_once, damage_once, read_json, sealed
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.checkpoints.format import complete_checkpoints, warn_once
from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.findings import Findings, write_findings
from lit_transdiff.data.index import LatentInfo, index_shards, read_index
from lit_transdiff.data.order import Rows
from lit_transdiff.data.pack import pack
from lit_transdiff.data.shards import ShardWriter
from lit_transdiff.evaluation.results import write_result
from lit_transdiff.evaluation.statistics import Statistics, load_statistics, save_statistics
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.models.classifier import load_classifier
from lit_transdiff.study.folders import read_folder
from lit_transdiff.training.trainer import train
from tests.helpers.small import FASHION, small_run

LATENTS = LatentInfo((4, 4, 4), 2, "none", 8)


def digest(*things: Any) -> str:
    """Equal for equal numbers."""
    found = hashlib.sha256()
    for thing in things:
        thing = thing.numpy() if isinstance(thing, torch.Tensor) else thing
        found.update(thing.tobytes() if isinstance(thing, np.ndarray) else repr(thing).encode())
    return found.hexdigest()


def write_run(folder: Path) -> None:
    run = small_run(folder, training={"max_steps": 4, "checkpoint_every": 2}, checkpoint={"keep_last": 2})
    train(run, lambda text: None)
    (run.folder / "evaluations").mkdir()
    write_result(
        run.folder / "evaluations" / "small-0.json", {"fid": 1.25}, {"run": "small"}, Image.new("L", (8, 8))
    )


def read_trained(folder: Path) -> str:
    export = read_export(folder / "small")
    info = [export.info[name] for name in ("step", "images_seen", "weights", "autoencoder", "class_names")]
    return digest(export.run, info, *export.state.values())


def read_checkpoints(folder: Path) -> str:
    found = max(
        complete_checkpoints(folder / "small" / "checkpoints"), key=lambda checkpoint: checkpoint.step
    )
    if (name := found.damaged_file()) is not None:
        raise ValueError(f"{found.folder / name} is damaged")
    return digest(found.step, found.shapes, *found.index().weights(None).values())


def read_records(folder: Path) -> str:
    run = read_folder(folder / "small")
    scores = [(evaluation.scores, evaluation.manifest) for evaluation in run.evaluations]
    history = run.history()
    return digest(run.config, run.state, scores, run.summary, list(history), history.to_numpy())


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / "source" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(
            folder / "source" / "ab"[i % 2] / f"{i}.png"
        )
    pack(folder / "source", folder / "images", progress=False)
    shutil.rmtree(folder / "source")


def write_latents(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    with ShardWriter(folder / "images" / "0.tar") as writer:
        for i in range(12):
            writer.write(str(i), i % 2, "bin", rng.standard_normal((2, 4, 4, 4)).astype(np.float16).tobytes())
    index_shards(folder / "images", ["a", "b"], latents=LATENTS, progress=False)


def read_samples(folder: Path) -> str:
    index = read_index(folder / "images")
    dataset = PlannedDataset(index, DataConfig(image_size=8, image_channels=1), training=True)
    samples = np.arange(len(index))
    passes = [
        dataset[Rows(samples, samples * 0 + epoch, samples[:, None])]
        for epoch in range(5 if index.latents else 1)
    ]
    return digest(
        index.class_names,
        *(tensor for batch in passes for tensor in vars(batch).values() if tensor is not None),
    )


def write_autoencoder(folder: Path) -> None:
    shutil.copytree(FASHION / "autoencoder", folder / "autoencoder")


def read_autoencoder(folder: Path) -> str:
    return load_autoencoder("kl", folder / "autoencoder", 1).fingerprint


def write_classifier(folder: Path) -> None:
    for name in ("classifier.safetensors", "checksums.json"):
        shutil.copy(FASHION / name, folder / name)


def read_classifier(folder: Path) -> str:
    return digest(*load_classifier(folder / "classifier.safetensors").state_dict().values())


def write_statistics(folder: Path) -> None:
    features = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    about = {"extractor": "classifier", "fingerprint": "f"}
    made = Statistics(features.mean(0), np.cov(features.T), num_images=20, features=features, about=about)
    save_statistics(made, folder / "reference.npz")


def read_statistics(folder: Path) -> str:
    found = load_statistics(folder / "reference.npz")
    return digest(found.mu, found.sigma, found.features, found.num_images, sorted(found.about.items()))


@dataclass(frozen=True)
class Kind:
    """How files of a kind are written to a folder and read again, and at how many places of each a bit is
    turned.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], str]
    places: int
    files: tuple[str, ...]


KINDS = {
    "export": Kind(write_run, read_trained, 25, ("small/export/*",)),
    "checkpoint": Kind(write_run, read_checkpoints, 10, ("small/checkpoints/step-00000004/*",)),
    "records": Kind(
        write_run,
        read_records,
        25,
        ("small/config.yaml", "small/environment.json", "small/evaluations/*.json"),
    ),
    "metrics": Kind(write_run, read_records, 120, ("small/metrics.csv",)),
    "images": Kind(write_images, read_samples, 40, ("images/*",)),
    "latents": Kind(write_latents, read_samples, 60, ("images/*",)),
    "autoencoder": Kind(write_autoencoder, read_autoencoder, 3, ("autoencoder/*",)),
    "classifier": Kind(write_classifier, read_classifier, 20, ("*",)),
    "statistics": Kind(write_statistics, read_statistics, 150, ("*.npz",)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Callable[[Path], None]], Path]]:
    """The folder in which a writer has written; each writes once."""
    made: dict[Callable[[Path], None], Path] = {}

    def folder_of(write: Callable[[Path], None]) -> Path:
        if write not in made:
            made[write] = tmp_path_factory.mktemp("flipped")
            write(made[write])
        return made[write]

    yield folder_of


def forget() -> None:
    """Clear caches, as in another process."""
    for remembered in (crc32_once, damage_once, warn_once):
        remembered.cache_clear()


def flipped(content: bytes, places: int) -> Iterator[tuple[int, bytes]]:
    """The content with one bit turned, at ``places`` that are spread over it."""
    for place in np.unique(np.linspace(0, len(content) - 1, places).astype(int)).tolist():
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 7)
        yield place, bytes(changed)


@pytest.mark.parametrize("name", KINDS)
def test_a_turned_bit_is_noticed_or_changes_nothing(
    name: str, folders: Callable[[Callable[[Path], None]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    kind = KINDS[name]
    folder = folders(kind.write)
    sound, noticed = kind.read(folder), 0
    for file in sorted(file for pattern in kind.files for file in folder.glob(pattern) if file.is_file()):
        content = file.read_bytes()
        for place, changed in flipped(content, kind.places):
            file.write_bytes(changed)
            forget()
            caplog.clear()
            try:
                same, said = kind.read(folder) == sound, caplog.text
            except ValueError as error:
                same, said = False, str(error)
            finally:
                file.write_bytes(content)
            named = file.name in said or ("index" in file.name and "the index is damaged" in said)
            assert same or named, f"{file}, byte {place}: {said or 'not a word'}"
            noticed += not same or bool(said)
    forget()
    assert kind.read(folder) == sound and noticed > kind.places // 2


def test_a_damaged_sample_is_named_with_its_place_and_what_to_do(
    folders: Callable[[Callable[[Path], None]], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for write in (write_images, write_latents):
        shutil.copytree(folders(write) / "images", tmp_path / write.__name__)
        index = read_index(tmp_path / write.__name__)
        shard = index.folder / index.shards[0].name
        content = bytearray(shard.read_bytes())
        content[int(index.offset[3]) + 40] ^= 4
        shard.write_bytes(content)
        rows = Rows(np.array([0]), np.array([0]), np.array([[3]]))
        said = (
            f"{index.name_of(3)}: the sample at byte {index.offset[3]} of the shard is damaged.*verify "
            f"{index.folder}"
        )
        settings = {"image_size": 8, "image_channels": 1, "horizontal_flip": False}
        for training in (True, False):
            with pytest.raises(ValueError, match=said):
                PlannedDataset(index, DataConfig(**settings), training=training)[rows]
        skipping = PlannedDataset(index, DataConfig(**settings, on_bad_sample="skip"))  # never without a word
        assert (
            skipping[rows].samples.tolist() != [[3]]
            and f"bad sample {index.name_of(3)}: the sample at byte" in caplog.text
        )


def test_what_pack_found_is_not_told_otherwise(tmp_path: Path) -> None:
    write_findings(tmp_path, Findings(oddities={"oriented": 3}), [["a/1.png", "b/2.png"]])
    file = tmp_path / "findings.json"
    sound, content = read_json(file), file.read_bytes()
    assert sound == {"oddities": {"oriented": 3}, "in two classes": [["a/1.png", "b/2.png"]]}
    for place, changed in flipped(content, len(content)):
        file.write_bytes(changed)
        try:
            assert {name: read_json(file)[name] for name in sound} == sound, place
        except ValueError as error:
            assert "findings.json is damaged" in str(error)


def test_sealed_content_of_all_types_is_read_as_it_was(tmp_path: Path) -> None:
    content = {"a": (1, 2), 3: float("nan"), "c": {"d": 1e-7, "e": None}, "f": "é"}
    (tmp_path / "file.json").write_bytes(sealed(content))
    assert json.dumps(read_json(tmp_path / "file.json")) == json.dumps(content)


def test_what_holds_no_checksum_is_read(tmp_path: Path) -> None:
    """Files of earlier versions, and of others."""
    shutil.copytree(FASHION / "autoencoder", tmp_path / "autoencoder")
    (tmp_path / "autoencoder" / "checksums.json").unlink()
    load_autoencoder("kl", tmp_path / "autoencoder", 1)
    shutil.copytree(FASHION / "evaluation", tmp_path / "shards")
    with np.load(tmp_path / "shards" / "index.npz") as stored:
        earlier = {name: stored[name] for name in ("offset", "size", "label", "key")}
        assert stored["checksum"].shape == (2000, 1)
    np.savez(tmp_path / "shards" / "index.npz", **earlier)
    assert read_index(tmp_path / "shards").checksum is None


def test_shipped_weights_are_those_of_their_checksums() -> None:
    for folder in (FASHION, FASHION / "autoencoder"):
        known = json.loads((folder / "checksums.json").read_text())["crc32"]
        found = crc32_of_files(folder)
        assert {name: found[name] for name in known} == known
        assert {file.name for file in folder.glob("*.safetensors")} <= known.keys()
