"""Decoding the bytes of a sample to a tensor.

Shapes: images [C, H, W] float32 in [-1, 1]; latents (moments) [2c, h, w] float16 as stored.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from lit_transdiff.data.index import LatentInfo
from lit_transdiff.data.pixels import from_bytes

MAX_IMAGE_PIXELS = 64_000_000  # larger images are refused before decoding
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
OF_CODECS = (struct.error, zlib.error, Image.DecompressionBombError)
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, *OF_CODECS)
ORIENTED, TRANSPARENT, ANIMATED = "oriented", "transparent", "animated"  # oddities of a file
DEPTH = re.compile(r"^(?:L|RGB);(2|4|16)B?$")  # bits per channel of a PNG without palette, unless 8 or 1
TURNS = {  # EXIF orientation -> transpose; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_RANDOM_CROP = 0.8  # relative to the short side
# warnings of damaged EXIF do not name the image
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")
RandomInteger = Callable[[int, int], int]  # a random integer from the first to the second, inclusive


class Opened(NamedTuple):
    """A decoded image and its oddities."""

    image: Image.Image  # grey (L) or RGB
    format: str  # a key of FORMATS
    oddities: tuple[str, ...]  # any of ORIENTED, TRANSPARENT, ANIMATED


def open_image(
    data: bytes | Path, exif: Literal["turn", "ignore"] = "turn", background: str = "white"
) -> Opened:
    """Decode an image to grey or RGB: its first frame, upright, with ``background`` under transparent pixels.

    ``exif="ignore"`` ignores the orientation, as ADM does. Raises ``ValueError`` for anything but an intact
    image file of moderate size with 8 bits per channel. Unreadable EXIF data are ignored.
    """
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        image = Image.open(file, formats=[name for name in FORMATS if name != "MPO"])
        if image.width * image.height > MAX_IMAGE_PIXELS:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{size} pixels; allowed: at most {MAX_IMAGE_PIXELS} pixels")
        stored = str(image.tile[0].args) if image.tile else ""
        image.load()
        if image.mode[0] in "IF":
            depth = "more than 8 bits in the one channel"
            raise ValueError(f"mode {image.mode} ({depth}); allowed: 8 bits; convert it beforehand")
        turn = turn_of(image)
        # further MPO frames are previews or stereo views
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        shown, transparent = opaque(image, stored, background)
        if turn is not None and exif == "turn":
            shown = shown.transpose(turn)
    except UnidentifiedImageError:  # its message is a memory address
        problem = f"the content is of none of the formats {', '.join(FORMATS)}"
        raise ValueError(f"not a readable image: {problem}") from None
    except READ_ERRORS as error:
        raise ValueError(f"not a readable image: {error}") from error
    oddities = ((ORIENTED, turn is not None), (TRANSPARENT, transparent), (ANIMATED, frames > 1))
    return Opened(shown, image.format or "", tuple(name for name, there in oddities if there))


def turn_of(image: Image.Image) -> Optional[Image.Transpose]:
    """The transpose that makes an image upright by its EXIF orientation; None if upright or unreadable."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises arbitrary errors for damaged EXIF; the pixels are intact
        return None
    return TURNS.get(orientation) if isinstance(orientation, int) else None


def opaque(image: Image.Image, stored: str, background: str) -> tuple[Image.Image, bool]:
    """An image as grey or RGB with ``background`` under transparent pixels, and whether there were any.

    ``stored`` is the pixel format in the file: a PNG gives its transparent colour in that depth, while Pillow
    assumes 8 bits.
    """
    if not image.has_transparency_data:
        return image if image.mode in ("L", "RGB") else image.convert("RGB"), False
    if (depth := DEPTH.search(stored)) and (colour := image.info.get("transparency")) is not None:
        highest = 2 ** int(depth[1]) - 1
        values = colour if isinstance(colour, tuple) else (colour,)
        scaled = tuple(value * 255 // highest for value in values)
        image.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]
    picture = image.convert("RGBA")
    alpha = picture.getchannel("A")
    ground = Image.new("RGB", picture.size, ImageColor.getrgb(background))
    ground.paste(picture, mask=alpha)
    return ground, alpha.getextrema()[0] != 255


def drawing_from(rng: np.random.Generator) -> RandomInteger:
    return lambda low, high: int(rng.integers(low, high + 1))


def crop_to_square(
    image: Image.Image,
    size: int,
    crop: Literal["none", "center", "random", "random-square"],
    draw: Optional[RandomInteger] = None,
) -> Image.Image:
    """An image of ``size`` x ``size``: halved by boxes, resized bicubically, cropped (ADM's crop).

    ``center`` crops the middle; ``random`` resizes the short side to between 1 and 1/0.8 of ``size`` and
    crops at a random place; ``random-square`` crops the largest square at a random place and resizes it
    (TransDiff's crop for training on images); without ``draw`` both are ``center``. ``none`` only resizes and
    raises ``ValueError`` for an image that is not square.
    """
    width, height = image.size
    if crop == "none" and width != height:
        raise ValueError(
            f"data.crop: got 'none' for an image of {width} x {height}; allowed: 'center' or a random crop"
        )
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
    """Convert a grey or RGB image to [C, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
    return rearrange(from_bytes(pixels), "h w c -> c h w")


def decode_latents(data: bytes, info: LatentInfo, flip: bool) -> Tensor:
    """The moments [2c, h, w] float16 of the image, or with ``flip`` of its mirror image (if cached)."""
    if len(data) != info.sample_bytes:
        raise ValueError(f"{len(data)} bytes of latents; allowed: {info.sample_bytes}")
    half = data[len(data) // 2 :] if flip else data[: info.sample_bytes // info.flips]
    return torch.from_numpy(np.frombuffer(half, np.float16).copy()).view(info.shape)
