"""Bytes of a sample -> tensor.

Shapes: images [C, H, W] float32 in [-1, 1]; latents (moments) [2c, h, w] float16, as they are stored.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lit_transdiff.data.index import LatentInfo
from lit_transdiff.data.pixels import from_bytes

MAX_PIXELS = 64_000_000  # an image above this many pixels is refused before it is decoded
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MIN_RANDOM_CROP = 0.8  # of the short side
Draw = Callable[[int, int], int]  # a random integer from the first to the second, both included


def open_image(data: bytes | Path) -> Image.Image:
    """A wholly decoded image in its own mode. Raises ``ValueError`` for anything that is not a sound, moderate image file."""
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=tuple(f for f in FORMATS if f != "MPO"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed: at most {MAX_PIXELS} pixels")
        image.load()
    except UnidentifiedImageError:  # whose message is the address of the bytes
        raise ValueError(f"not a readable image: the content is of none of the formats {', '.join(FORMATS)}") from None
    except READ_ERRORS as error:
        raise ValueError(f"not a readable image: {error}") from error
    if image.mode[0] in "IF":
        raise ValueError(f"image mode {image.mode} (more than 8 bits a channel); allowed: 8 bits")
    return image


def drawing_from(rng: np.random.Generator) -> Draw:
    return lambda low, high: int(rng.integers(low, high + 1))


def crop_to_square(
    image: Image.Image, size: int, crop: Literal["none", "center", "random", "random-square"], draw: Optional[Draw] = None
) -> Image.Image:
    """A ``size`` x ``size`` image: box-halved while twice too large, resized bicubically, then cut out (the crop of ADM).

    ``center`` cuts in the middle; ``random`` resizes the short side to between 1 and 1/0.8 of ``size`` and cuts at a random
    place; ``random-square`` cuts the largest square out at a random place and resizes it (the crop of TransDiff's own
    training on images); ``none`` only resizes and raises ``ValueError`` for an image that is not square.
    """
    width, height = image.size
    if crop == "none" and width != height:
        raise ValueError(f"data.crop: got 'none' for an image of {width} x {height}; allowed: 'center' or a random crop")
    if crop == "random-square" and draw is not None:
        side = min(image.size)
        left = draw(0, width - side)  # before the top, as in the reference
        top = draw(0, height - side)
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.BICUBIC)
    short = size
    if crop == "random" and draw is not None:
        short = draw(size, math.ceil(size / MIN_RANDOM_CROP))
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    room = (image.width - size, image.height - size)
    if crop == "random" and draw is not None:
        left, top = (draw(0, r) for r in room)
    else:
        left, top = room[0] // 2, room[1] // 2
    return image.crop((left, top, left + size, top + size))


def image_tensor(image: Image.Image) -> Tensor:
    """[C, H, W] float32 in [-1, 1] of a grey or RGB image."""
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
    return rearrange(from_bytes(pixels), "h w c -> c h w")


def decode_latents(data: bytes, info: LatentInfo, flip: bool) -> Tensor:
    """[2c, h, w] float16 moments of the image, or of its mirror image when ``flip`` (the cache must hold it)."""
    if len(data) != info.sample_bytes:
        raise ValueError(f"{len(data)} bytes of latents; allowed: {info.sample_bytes}")
    half = data[len(data) // 2 :] if flip else data[: info.sample_bytes // info.flips]
    return torch.from_numpy(np.frombuffer(half, np.float16).copy()).view(info.shape)
