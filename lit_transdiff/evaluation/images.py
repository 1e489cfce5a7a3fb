"""Images as files: ``.npz`` in the ADM evaluator's layout (``arr_0`` [N, H, W, 3] uint8), and folders of PNG.

Shapes: N images, B images of a batch, C channels, H W pixels.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from lit_transdiff.base.files import Damaged, whole
from lit_transdiff.config import require
from lit_transdiff.data.pixels import from_bytes
from lit_transdiff.sampling.pictures import save_png


@contextmanager
def open_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open the bytes of ``arr_0`` [N, H, W, 3]. Raises ``ValueError`` unless it has uint8 images."""
    with ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            file = opened.enter_context(archive.open("arr_0.npy"))
            version = np.lib.format.read_magic(file)
            layout = np.lib.format
            read = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
        except OSError:
            raise
        except KeyError as error:
            raise ValueError(f"{path}: {error}; allowed: images as arr_0.") from error
        except Exception as error:  # each layer of the format has errors of its own for unexpected bytes
            raise damaged_images(path, error) from error
        ok = len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and not fortran_order
        require(ok, f"{path}: arr_0", f"{dtype} of shape {shape}", "uint8 images of shape [N, H, W, 3]")
        try:
            yield file, shape
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise damaged_images(path, error) from error


def damaged_images(path: Path, error: Exception) -> Damaged:
    return Damaged(f"{path} is damaged: {error}. Copy it again from its source, or make it again.")


def images_shape(path: str | Path) -> tuple[int, ...]:
    """The shape [N, H, W, 3] of a file's images, from its header."""
    with open_images(Path(path)) as (_, shape):
        return shape


def image_batches(path: str | Path, batch_size: int = 64) -> Iterator[Tensor]:
    """The images of ``arr_0`` as batches [B, 3, H, W] in [-1, 1]; only one batch is in memory at a time."""
    with open_images(Path(path)) as (file, (count, *size)):
        for first in range(0, count, batch_size):
            images = min(batch_size, count - first)
            wanted = images * int(np.prod(size))
            content = file.read(wanted)
            allowed = f"{count} images"
            fits = len(content) == wanted
            require(fits, f"{path}: arr_0", f"an end after {first} to {first + images} images", allowed)
            pixels = np.frombuffer(content, dtype=np.uint8).reshape(images, *size)
            yield from_bytes(rearrange(torch.from_numpy(pixels.copy()), "b h w c -> b c h w"))


def write_npz(path: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write uint8 ``batches`` [B, C, H, W] as ``arr_0`` (grey ones repeated) and ``labels`` as ``arr_1``.

    The file is written batch by batch, completely or not at all, and uncompressed as by ``numpy.savez``.
    """
    with (
        whole(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for i, batch in enumerate(batches):
                colour = repeat(batch, "b c h w -> b h w (c k)", k=3 // batch.shape[1])
                if i == 0:
                    shape = (len(labels), *colour.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(colour).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels)


def write_pngs(folder: Path, pixels: Tensor, indices: Sequence[int]) -> None:
    """Write ``pixels`` [B, C, H, W] uint8 as ``00000.png``, numbered by ``indices``; grey when C = 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, index in zip(pixels, indices, strict=True):
        save_png(image, png(folder, index))


def png(folder: Path, index: int) -> Path:
    """The path of the image with this index."""
    return folder / f"{index:05d}.png"
