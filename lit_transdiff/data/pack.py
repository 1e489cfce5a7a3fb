"""Images of any supported source -> shuffled webdataset shards with their index."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image
from tqdm import tqdm

from lit_transdiff.config import require
from lit_transdiff.data.decode import FORMATS, crop_to_square, open_image
from lit_transdiff.data.index import ShardIndex, index_shards
from lit_transdiff.data.shards import ShardWriter
from lit_transdiff.data.sources import ImageSource, open_source

JPEG_QUALITY = 95  # of images that are cropped before packing
Encoded = tuple[str, int, str, bytes]  # key, label, extension, data


@dataclass(frozen=True)
class PackReport:
    """What was packed, and the ``(name, reason)`` of each image that could not be read."""

    index: ShardIndex
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        total = sum(shard.bytes for shard in self.index.shards)
        text = f"{len(self.index)} images of {self.index.num_classes} classes in {len(self.index.shards)} shards, {total:,} bytes"
        return text + (f"; {len(self.skipped)} unreadable images skipped, listed in skipped.txt" if self.skipped else "")


def pack(
    source: str | Path,
    dest: str | Path,
    *,
    split: Optional[str] = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    image_size: Optional[int] = None,
    pad_to: Optional[int] = None,
    limit: Optional[int] = None,
    class_names: Optional[Sequence[str]] = None,
    name: Optional[str] = None,
    progress: bool = True,
) -> PackReport:
    """Pack an image folder (``class/image.*``), IDX files (``split``: "train" or "t10k") or a list file into ``dest``.

    Samples are shuffled once with ``seed``; ``limit`` draws that many, evenly over the classes. Files are stored as they
    are, unless ``image_size`` (pixels: centre crop, resize) or ``pad_to`` (pixels: zeros around) is given. Shards are
    called ``name-000000.tar`` (``name``: that of ``dest``). Every image is decoded; those that cannot be are skipped,
    reported, and listed in ``skipped.txt``. The same arguments give the same bytes.
    Raises ``ValueError`` for a ``dest`` that already holds shards or an index.
    """
    dest = Path(dest)
    require(samples_per_shard >= 1, "samples_per_shard", samples_per_shard, "an integer of at least 1")
    require(image_size is None or pad_to is None, "pad_to", pad_to, "nothing when image_size is given")
    for size, field in ((image_size, "image_size"), (pad_to, "pad_to")):
        require(size is None or size >= 1, field, size, "pixels, 1 and more")
    refuse_to_overwrite(dest)
    images = open_source(source, split, class_names)
    order = draw(images, limit, seed)
    if progress:
        shards = -(-len(order) // samples_per_shard)
        share = round(images.num_bytes * len(order) / len(images.labels))
        tqdm.write(
            f"{len(order)} of {len(images.labels)} images (about {share:,} bytes as they are) -> {shards} shards in {dest}"
        )
    dest.mkdir(parents=True, exist_ok=True)
    skipped: list[tuple[str, str]] = []
    samples = encode_all(images, tqdm(order, desc="packing", unit="image", disable=not progress), image_size, pad_to, skipped)
    write_shards(samples, dest, name or dest.name, samples_per_shard)
    if skipped:
        (dest / "skipped.txt").write_text("".join(f"{origin}\t{reason}\n" for origin, reason in skipped))
    require(
        len(skipped) < len(order), str(source), f"{len(skipped)} unreadable images of {len(order)}", "at least one readable image"
    )
    return PackReport(index_shards(dest, images.class_names, seed, progress=progress), skipped)


def write_shards(samples: Iterator[Encoded], dest: Path, name: str, samples_per_shard: int) -> None:
    """``name-000000.tar``, ``name-000001.tar``, ... until there are no more samples."""
    for number in count():
        first = next(samples, None)
        if first is None:
            break
        with ShardWriter(dest / f"{name}-{number:06d}.tar") as writer:
            for sample in chain([first], islice(samples, samples_per_shard - 1)):
                writer.write(*sample)


def refuse_to_overwrite(dest: Path) -> None:
    """``ValueError`` if ``dest`` holds an index or shards, which may be those of another data set."""
    present = sorted(path.name for pattern in ("index.json", "*.tar") for path in dest.glob(pattern))
    if present:
        raise ValueError(f"{dest} already holds {present[0]} ({len(present)} files of shards and index); choose an empty folder.")


def draw(images: ImageSource, limit: Optional[int], seed: int) -> np.ndarray:
    """[n] the samples to pack, in shuffled order; with ``limit``, equally many of each class (the first ones one more)."""
    order = np.random.default_rng(seed).permutation(len(images.labels))
    if limit is None:
        return order
    num_classes = len(images.class_names)
    require(num_classes <= limit <= len(order), "limit", limit, f"{num_classes} (one a class) to {len(order)} images")
    quota = np.full(num_classes, limit // num_classes) + (np.arange(num_classes) < limit % num_classes)
    counts = np.bincount(images.labels, minlength=num_classes)
    for c in np.flatnonzero(counts < quota):
        raise ValueError(f"limit: got {limit}, which is {quota[c]} a class; class {images.class_names[c]!r} has {counts[c]}.")
    labels = images.labels[order]
    kept = [order[labels == c][: quota[c]] for c in range(num_classes)]
    return order[np.isin(order, np.concatenate(kept))]


def encode_all(
    images: ImageSource, order: Iterator[int], image_size: Optional[int], pad_to: Optional[int], skipped: list[tuple[str, str]]
) -> Iterator[Encoded]:
    """Encode the samples of ``order``; those that cannot be read go to ``skipped``."""
    for i in order:
        try:
            extension, data = encode_sample(images.read(i), image_size, pad_to)
        except ValueError as error:
            skipped.append((images.origins[i], str(error)))
            continue
        yield images.keys[i], int(images.labels[i]), extension, data


def encode_sample(origin: Path | np.ndarray, image_size: Optional[int], pad_to: Optional[int]) -> tuple[str, bytes]:
    """(extension, file content) of one image; a file that needs no change is taken over byte by byte."""
    image = open_image(origin) if isinstance(origin, Path) else Image.fromarray(origin)
    if isinstance(origin, Path) and image_size is None and pad_to is None:
        return FORMATS[image.format or ""], origin.read_bytes()
    extension = "jpg" if image.format in ("JPEG", "MPO") and pad_to is None else "png"
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image_size is not None:
        image = crop_to_square(image, image_size, "center")
    if pad_to is not None:
        image = pad(image, pad_to)
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
