"""Small shards made once: 5 classes of 13 grey 8 x 8 images, 10 shards of at most 7."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_transdiff.data.pack import Cut, pack

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
PER_CLASS = 13


def write_image_folder(folder: Path, size: int = 8) -> Path:
    """``folder/class/number.png``; every image has its own pixels."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images") / "small")


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    pack(image_folder, folder, cut=Cut(samples_per_shard=7), progress=False)
    return folder
