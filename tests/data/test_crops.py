"""Crops, to the byte: ADM's centre crop and the random crop of the TransDiff reference, written here another
way.
"""

import io
import random

import numpy as np
import pytest
from PIL import Image

from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import SampleDecoder
from lit_transdiff.data.decode import crop_to_square, drawing_from
from lit_transdiff.data.encode import Encoding, encode_sample
from lit_transdiff.data.index import read_index
from lit_transdiff.data.order import generator

SIZES = [
    (64, 64),
    (65, 64),
    (63, 64),
    (500, 375),
    (375, 500),
    (333, 251),
    (129, 128),
    (127, 300),
    (40, 20),
    (900, 31),
    (31, 1),
]


def picture(width, height, mode="RGB"):
    """Noise over a slope, so that every resampling leaves its mark."""
    rng = np.random.default_rng(width * 1000 + height)
    slope = np.linspace(0, 150, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((slope + rng.integers(0, 100, (height, width, 3))).astype(np.uint8)).convert(mode)


def adm_centre_crop(image, size):
    """ADM's crop.

    Halve by boxes (rounding down) while the short side is at least twice the size; resize bicubically so that
    the short side is the size; crop the centre, rounding its position down.
    """
    width, height = image.size
    halvings = max(k for k in range(20) if k == 0 or min(width, height) // 2 ** (k - 1) >= 2 * size)
    for k in range(1, halvings + 1):
        image = image.resize((width // 2**k, height // 2**k), Image.Resampling.BOX)
    factor = size / min(image.size)
    pixels = np.asarray(
        image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    )
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [8, 31, 32, 64])
@pytest.mark.parametrize("shape", SIZES)
def test_the_centre_crop_is_that_of_adm(shape, size):
    image = picture(*shape)
    assert np.array_equal(np.asarray(crop_to_square(image, size, "center")), adm_centre_crop(image, size))


@pytest.mark.parametrize("shape", SIZES)
def test_the_random_square_is_that_of_the_reference(shape):
    """The same offsets (x first) from python's generator, the largest square, Pillow's default filter."""
    image = picture(*shape)
    for seed in range(5):
        rng = random.Random(seed)
        side = min(shape)
        x, y = rng.randint(0, shape[0] - side), rng.randint(0, shape[1] - side)
        expected = Image.fromarray(np.asarray(image)[y : y + side, x : x + side]).resize((24, 24))
        found = crop_to_square(image, 24, "random-square", random.Random(seed).randint)
        assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "LA", "RGBA", "1"])
def test_images_are_made_rgb_before_they_are_resized(shards, mode):
    """As the reference does it; a palette, for one, cannot be interpolated."""
    image = picture(50, 40, mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    stored = Image.open(buffer).convert("RGB")
    expected = adm_centre_crop(stored, 16)
    for crop in ("center", "random-square"):  # of which evaluation takes the centre, too
        decoder = SampleDecoder(
            read_index(shards), DataConfig(image_size=16, crop=crop), seed=0, training=False
        )
        found = ((decoder(buffer.getvalue(), 0, 0) + 1) * 127.5).round().numpy().transpose(1, 2, 0)
        assert np.array_equal(found, expected)


def test_a_file_that_is_packed_again_holds_the_centre_crop(tmp_path):
    picture(90, 50).save(tmp_path / "x.png")
    extension, data, _ = encode_sample(tmp_path / "x.png", Encoding(image_size=16))
    assert extension == "png" and np.array_equal(
        np.asarray(Image.open(io.BytesIO(data))), adm_centre_crop(picture(90, 50), 16)
    )


def test_training_draws_another_square_each_epoch(shards):
    buffer = io.BytesIO()
    picture(60, 20).save(buffer, "PNG")
    settings = DataConfig(image_size=20, crop="random-square", horizontal_flip=False)
    decoder = SampleDecoder(read_index(shards), settings, seed=1, training=True)
    seen = [decoder(buffer.getvalue(), 7, epoch) for epoch in range(20)]
    for epoch, values in enumerate(seen):
        left = drawing_from(generator(1, epoch, 7))(0, 40)
        expected = np.asarray(picture(60, 20))[:, left : left + 20]
        assert np.array_equal(((values + 1) * 127.5).round().numpy().transpose(1, 2, 0), expected)
    assert len({values.numpy().tobytes() for values in seen}) > 10


def test_random_and_none():
    image = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8), (10, 1)))  # 30 wide, 10 high
    assert np.array_equal(np.array(crop_to_square(image, 10, "center")), np.array(image)[:, 10:20])
    with pytest.raises(ValueError, match=r"data\.crop: got 'none' for an image of 30 x 10"):
        crop_to_square(image, 10, "none")
    cuts = {crop_to_square(image, 10, "random", random.Random(i).randint).tobytes() for i in range(20)}
    assert len(cuts) > 10
    for size in (3, 7, 10, 24):
        assert crop_to_square(image, size, "center").size == (size, size)
        assert crop_to_square(image, size, "random", random.Random(size).randint).size == (size, size)
