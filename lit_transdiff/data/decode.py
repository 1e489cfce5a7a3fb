"""Bytes of a sample -> tensor.

Shapes: images [C, H, W] float32 in [-1, 1]; latents (moments) [2c, h, w] float32.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from lit_transdiff.data.index import LatentInfo

MAX_PIXELS = 64_000_000  # an image above this many pixels is refused before it is decoded
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MIN_RANDOM_CROP = 0.8  # of the short side


def open_image(data: bytes | Path) -> Image.Image:
    """A wholly decoded image in its own mode. Raises ``ValueError`` for anything that is not a sound, moderate image file."""
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=tuple(f for f in FORMATS if f != "MPO"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; allowed: at most {MAX_PIXELS} pixels")
        image.load()
    except READ_ERRORS as error:
        raise ValueError(f"not a readable image: {error}") from error
    if image.mode[0] in "IF":
        raise ValueError(f"image mode {image.mode} (more than 8 bits a channel); allowed: 8 bits")
    return image


def crop_to_square(
    image: Image.Image, size: int, crop: Literal["none", "center", "random"], rng: Optional[np.random.Generator] = None
) -> Image.Image:
    """A ``size`` x ``size`` image: box-halved while twice too large, resized bicubically, then cut out (the crop of ADM).

    ``random`` resizes the short side to between 1 and 1/0.8 of ``size`` and cuts at a random place; ``none`` only resizes
    and raises ``ValueError`` for an image that is not square.
    """
    width, height = image.size
    if crop == "none" and width != height:
        raise ValueError(f"data.crop: got 'none' for an image of {width} x {height}; allowed: 'center' or 'random'")
    short = size
    if crop == "random" and rng is not None:
        short = int(rng.integers(size, math.ceil(size / MIN_RANDOM_CROP) + 1))
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    room = (image.width - size, image.height - size)
    if crop == "random" and rng is not None:
        left, top = (int(rng.integers(0, r + 1)) for r in room)
    else:
        left, top = room[0] // 2, room[1] // 2
    return image.crop((left, top, left + size, top + size))


def image_tensor(image: Image.Image, channels: int) -> Tensor:
    """[C, H, W] float32 in [-1, 1], grey (``channels`` = 1) or RGB (3)."""
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    values = torch.from_numpy(pixels).view(image.height, image.width, channels).to(torch.float32)
    return rearrange(values / 127.5 - 1, "h w c -> c h w")


def decode_latents(data: bytes, info: LatentInfo, flip: bool) -> Tensor:
    """[2c, h, w] float32 moments of the image, or of its mirror image when ``flip`` (the cache must hold it)."""
    if len(data) != info.sample_bytes:
        raise ValueError(f"{len(data)} bytes of latents; allowed: {info.sample_bytes}")
    half = data[len(data) // 2 :] if flip else data[: info.sample_bytes // info.flips]
    return torch.from_numpy(np.frombuffer(half, np.float16).astype(np.float32)).view(info.shape)
