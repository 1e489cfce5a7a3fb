"""Encoding of images for shards: the original file, or cropped or padded and encoded again."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import numpy as np
from PIL import Image

from lit_transdiff.config import BACKGROUNDS, is_colour, require
from lit_transdiff.data.decode import FORMATS, crop_to_square, open_image

LARGEST_SIDE = 16384  # pixels per side
JPEG_QUALITY = 95  # quality of images that are encoded again


@dataclass(frozen=True)
class Encoding:
    """The treatment of images: none, a centre crop to ``image_size``, or zero padding to ``pad_to``.

    ``exif`` and ``background`` are those of ``open_image``, for images that are encoded again.
    """

    image_size: Optional[int] = None
    pad_to: Optional[int] = None
    exif: Literal["turn", "ignore"] = "turn"
    background: str = "white"

    def __post_init__(self) -> None:
        allowed = "none when image_size is given"
        require(self.image_size is None or self.pad_to is None, "pad_to", self.pad_to, allowed)
        for size, field in ((self.image_size, "image_size"), (self.pad_to, "pad_to")):
            require(size is None or 1 <= size <= LARGEST_SIDE, field, size, f"1 to {LARGEST_SIDE} pixels")
        require(is_colour(self.background), "background", self.background, BACKGROUNDS)
        for name, default in (("exif", "turn"), ("background", "white")):
            kept = f"files are kept as they are, and data.{name} says how they are read"
            value, allowed = getattr(self, name), f"{default!r} without image_size or pad_to: {kept}"
            require(not self.keeps_files or value == default, name, value, allowed)

    @property
    def keeps_files(self) -> bool:
        """Whether files are copied unchanged."""
        return self.image_size is None and self.pad_to is None

    @property
    def plan(self) -> dict[str, Any]:
        """The settings that affect the bytes of an image."""
        sizes = {"image_size": self.image_size, "pad_to": self.pad_to}
        return sizes if self.keeps_files else {**sizes, "exif": self.exif, "background": self.background}


class Encoded(NamedTuple):
    """The content of a file in a shard, and the oddities of its source."""

    extension: str
    content: bytes
    oddities: tuple[str, ...] = ()  # as in ``open_image``


def encode_sample(origin: Path | np.ndarray, encoding: Encoding) -> Encoded:
    """An image as stored in a shard; it is decoded in any case. Raises ``ValueError`` if that fails.

    An ``OSError`` concerns the disk, not the image: it stops everything instead of skipping the image.
    """
    if not isinstance(origin, Path):
        return Encoded("png", encode_image(Image.fromarray(origin), "png", encoding))
    content = origin.read_bytes()
    image, form, oddities = open_image(content, encoding.exif, encoding.background)
    if encoding.keeps_files:
        return Encoded(FORMATS[form], content, oddities)
    extension = "jpg" if form in ("JPEG", "MPO") and encoding.pad_to is None else "png"
    return Encoded(extension, encode_image(image, extension, encoding), oddities)


def encode_image(image: Image.Image, extension: str, encoding: Encoding) -> bytes:
    """Encode a grey or RGB image, cropped or padded, without metadata."""
    if encoding.image_size is not None:
        image = crop_to_square(image, encoding.image_size, "center")
    if encoding.pad_to is not None:
        image = pad(image, encoding.pad_to)
    image.info = {}
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def pad(image: Image.Image, size: int) -> Image.Image:
    """``image`` centred in ``size`` x ``size`` zeros."""
    if max(image.size) > size:
        raise ValueError(
            f"pad_to: got {size} for an image of {image.width} x {image.height}; allowed: at least its size"
        )
    padded = Image.new(image.mode, (size, size))
    padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return padded
