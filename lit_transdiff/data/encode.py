"""One image as it is stored in a shard: the file as it is, or cropped or padded and encoded again."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from lit_transdiff.config import require
from lit_transdiff.data.decode import FORMATS, crop_to_square, open_image

JPEG_QUALITY = 95  # of images that are encoded again


@dataclass(frozen=True)
class Encoding:
    """What becomes of the images: nothing, or ``image_size`` pixels (centre crop, resize), or zeros around to ``pad_to``."""

    image_size: Optional[int] = None
    pad_to: Optional[int] = None

    def __post_init__(self) -> None:
        require(self.image_size is None or self.pad_to is None, "pad_to", self.pad_to, "nothing when image_size is given")
        for size, field in ((self.image_size, "image_size"), (self.pad_to, "pad_to")):
            require(size is None or size >= 1, field, size, "pixels, at least 1")

    @property
    def keeps_files(self) -> bool:
        """Whether files are taken over byte by byte."""
        return self.image_size is None and self.pad_to is None


def encode_sample(origin: Path | np.ndarray, encoding: Encoding) -> tuple[str, bytes]:
    """(extension, file content) of one image, which is decoded in any case. Raises ``ValueError`` when it cannot be.

    An ``OSError`` is the disk's, not the image's: it stops everything, rather than that an image is left out for it.
    """
    content = origin.read_bytes() if isinstance(origin, Path) else b""
    image = open_image(content) if isinstance(origin, Path) else Image.fromarray(origin)
    if isinstance(origin, Path) and encoding.keeps_files:
        return FORMATS[image.format or ""], content
    extension = "jpg" if image.format in ("JPEG", "MPO") and encoding.pad_to is None else "png"
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if encoding.image_size is not None:
        image = crop_to_square(image, encoding.image_size, "center")
    if encoding.pad_to is not None:
        image = pad(image, encoding.pad_to)
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return extension, buffer.getvalue()


def pad(image: Image.Image, size: int) -> Image.Image:
    """``image`` in the middle of ``size`` x ``size`` zeros."""
    if max(image.size) > size:
        raise ValueError(f"pad_to: got {size} for an image of {image.width} x {image.height}; allowed: at least its size")
    padded = Image.new(image.mode, (size, size))
    padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return padded
