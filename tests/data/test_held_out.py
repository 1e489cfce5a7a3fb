"""Held-out data beside training data: the same classes, and enough images of each to validate on."""

import numpy as np
import pytest
from PIL import Image

from lit_transdiff.config import DataConfig, require_classes
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.pack import pack


def shards_of(folder, **images):
    """Shards of classes with so many images each."""
    rng = np.random.default_rng(0)
    for name, count in images.items():
        (folder / "in" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / "in" / name / f"{i}.png")
    pack(folder / "in", folder / "shards", progress=False)
    return folder / "shards"


def module_of(train, evaluation, num_references=1, **options):
    data = DataConfig(train=str(train), evaluation=str(evaluation), image_size=8, image_channels=1)
    sizes = dict(num_classes=3, global_batch_size=4, max_steps=2, seed=0)
    return DataModule(data, num_references=num_references, **sizes, **options)


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    return shards_of(tmp_path_factory.mktemp("animals"), ant=5, bee=5, cat=5)


WORDS, NUMBERS = ["ant", "bee", "cat"], ["0", "1", "2"]


@pytest.mark.parametrize("found", [WORDS, NUMBERS, ["1", "2", "3"], []])
def test_the_same_classes_and_mere_numbers_are_taken(found):
    require_classes("data.evaluation", found, WORDS, "data.train")
    require_classes("data.evaluation", WORDS, found, "data.train")


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (["bee", "cat", "dog"], WORDS, "got class 0 'bee'; allowed: 'ant', which is class 0 of data.train"),
        (
            ["ant", "cat", "bee"],
            WORDS,
            "got class 1 'cat', the same classes in another order; allowed: 'bee'",
        ),
        (["Ant", "bee", "cat"], WORDS, "got class 0 'Ant'; allowed: 'ant'"),
        (["0", "1", "10"], NUMBERS, "got class 2 '10'; allowed: '2'"),
        (
            ["ant", "bee"],
            WORDS,
            "got 2 classes, without 'cat'; allowed: the 3 of data.train; an empty folder keeps",
        ),
        ([*WORDS, "dog"], WORDS, "got 4 classes, with 'dog'; allowed: the 3"),
        (["0", "1"], WORDS, "got 2 classes, with '0', '1', without 'ant', 'bee', 'cat'; allowed: the 3"),
    ],
)
def test_other_classes_are_refused_by_name(found, expected, message):
    with pytest.raises(ValueError, match=f"^data.evaluation: {message}"):
        require_classes("data.evaluation", found, expected, "data.train")


def test_held_out_classes_are_those_of_training(animals, tmp_path):
    same, other = (
        shards_of(tmp_path / "1", ant=2, bee=1, cat=2),
        shards_of(tmp_path / "2", bee=2, cat=2, dog=2),
    )
    module_of(animals, same).setup()
    with pytest.raises(ValueError, match=r"data\.evaluation: .*2/shards: got class 0 'bee'; allowed: 'ant'"):
        module_of(animals, other).setup()
    module_of(animals, other, uses_labels=False).setup()  # an autoencoder
    with pytest.raises(ValueError, match=r"data\.evaluation: .* got 2 classes, without 'cat'"):
        module_of(animals, shards_of(tmp_path / "3", ant=2, bee=2)).setup()


def test_classes_with_too_few_held_out_images_are_left_out(animals, tmp_path, caplog):
    held_out = shards_of(tmp_path, ant=6, bee=2, cat=3)
    module = module_of(animals, held_out, num_references=3)
    labels = [label for batch in module.val_dataloader() for label in batch.labels.tolist()]
    assert sorted(labels) == [0, 0, 2]
    assert "1 classes with fewer than 3 images are left out of validation: 'bee'" in caplog.text


def test_too_few_images_are_refused_at_once(animals, tmp_path):
    held_out = shards_of(tmp_path, ant=2, bee=2, cat=1)
    with pytest.raises(
        ValueError, match=r"data\.evaluation: no class of .* more than 2 images.* model\.num_references=4"
    ):
        module_of(animals, held_out, num_references=4).setup()
    module_of(animals, held_out, num_references=4, num_validation_samples=0).setup()
    with pytest.raises(
        ValueError, match=r"model\.num_references: got 6, but class 'ant' of .* has only 5 images"
    ):
        module_of(animals, animals, num_references=6).setup()
