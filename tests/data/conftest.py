"""Small shards made once: 5 classes of 13 grey 8 x 8 images, 10 shards of at most 7."""

from pathlib import Path

import pytest

from lit_transdiff.data.pack import Cut, pack
from tests.helpers.shards import write_image_folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images") / "small")


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    pack(image_folder, folder, cut=Cut(samples_per_shard=7), progress=False)
    return folder
