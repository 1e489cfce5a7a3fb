"""Pictures from a trained model: labelled grids, single images, semantic fusion and successive images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.base.randomness import mix
from lit_transdiff.config import SamplingConfig, require
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.models.sizes import bytes_of_images, least_of_drawing, room_here
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.pictures import grid, save_picture, save_png

IMAGES_SHOWN = 16  # the most images per class in a grid


def draw_samples(
    generator: Generator,
    classes: Sequence[int],
    per_class: int,
    output: Path,
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    references: bool = False,
    batch_size: int = 64,
) -> Path:
    """Write ``per_class`` images of each class, ``output/class-XXXX/seed-XXXX.png``, and ``output/grid.png``.

    The grid shows the first ``IMAGES_SHOWN`` images of each class, with ``references`` all R successive
    images of each. An image depends only on ``seed``, its class and its number.
    """
    rows = rows_of_classes(generator, classes, per_class, sampling, seed, batch_size)
    for label, of_class in zip(classes, rows, strict=True):
        folder = output / f"class-{label:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(of_class):
            for r, image in enumerate(row if references else row[-1:]):
                suffix = f"-reference-{r}" if references and r < len(row) - 1 else ""
                save_image(image, folder / f"seed-{number:04d}{suffix}.png")
    save_picture(labelled(rows, [generator.names[c] for c in classes], references), output / "grid.png")
    return output / "grid.png"


def rows_of_classes(
    generator: Generator,
    classes: Sequence[int],
    per_class: int,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Sample the images [K, N, R, C, H, W] of K classes, N rows of each, on the CPU.

    An image depends only on ``seed``, its class and its number.
    """
    check_number(generator, per_class, len(classes))
    labels = [c for c in classes for _ in range(per_class)]
    seeds = [mix(seed, c, n) for c in classes for n in range(per_class)]
    generator = generator.for_images(len(labels), sampling or generator.run.sampling)
    rows = images_in_batches(generator, labels, seeds, sampling, batch_size)
    return rearrange(rows, "(k n) r c h w -> k n r c h w", n=per_class)


def check_number(generator: Generator, per_class: int, num_classes: int) -> None:
    """Refuse more images than fit into memory, where all are kept for the grid."""
    require(per_class >= 1, "--per-class", per_class, "at least 1")
    run = generator.run
    number = per_class * num_classes * run.model.num_references
    room_here("cpu").require(
        bytes_of_images(run.data, number), **{"--per-class": per_class}, classes=num_classes
    )


def labelled(rows: Tensor, names: Sequence[str], references: bool) -> Image.Image:
    """The grid of the first rows [K, N, R, C, H, W] of each class: the last of the R images, or all."""
    count = rows.shape[1]
    rows = rows[:, :IMAGES_SHOWN]
    first = f"the first {IMAGES_SHOWN} of {count:,} images of a class" if count > IMAGES_SHOWN else ""
    if not references:
        shown = rearrange(rows[:, :, -1], "k n c h w -> (k n) c h w")
        return grid(shown, rows.shape[1], row_labels=names, title=first or None)
    labels = [name if n == 0 else "" for name in names for n in range(rows.shape[1])]
    heads = [f"image {r + 1}" for r in range(rows.shape[2])]
    title = "; ".join(filter(None, ["successive images", first]))
    shown = rearrange(rows, "k n r c h w -> (k n r) c h w")
    return grid(shown, rows.shape[2], row_labels=labels, column_labels=heads, title=title)


def draw_fusion(
    generator: Generator,
    pair: tuple[int, int],
    count: int,
    output: Path,
    *,
    kind: str,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Path:
    """Write ``output/fusion.png``: ``count`` images of each class and, between them, of spliced features."""
    check_number(generator, count, 3)
    room_here(generator.device.type).require(least_of_drawing(generator.run, count), **{"--per-class": count})
    a, b = pair
    seeds = [mix(seed, "fusion", n) for n in range(count)]
    second = generator.check_labels([b] * count)
    spliced = generator.model.fusion(second, kind, seed)
    first_row = generator.images([a] * count, seeds, sampling)[:, -1]
    fused_row = generator.images([a] * count, seeds, sampling, contexts=spliced)[:, -1]
    second_row = generator.images(second, seeds, sampling)[:, -1]
    labels = [generator.names[a], f"{generator.names[a]} + {generator.names[b]}", generator.names[b]]
    output.mkdir(parents=True, exist_ok=True)
    images = torch.cat([first_row, fused_row, second_row]).cpu()
    save_picture(
        grid(images, count, row_labels=labels, title=f"semantic fusion, {kind}"), output / "fusion.png"
    )
    return output / "fusion.png"


def images_in_batches(
    generator: Generator,
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig | None,
    batch_size: int,
) -> Tensor:
    """Sample the images [N, R, C, H, W] of all labels in batches, and collect them on the CPU."""
    parts, starts = [], range(0, len(labels), batch_size)
    for i in tqdm(starts, desc="sampling", unit="batch", disable=len(starts) <= 1):
        batch = slice(i, i + batch_size)
        parts.append(generator.images(labels[batch], seeds[batch], sampling).cpu())
    return torch.cat(parts)


def save_image(image: Tensor, path: Path) -> None:
    """Save an image [C, H, W] in [-1, 1] as an 8-bit PNG, grey if C = 1."""
    save_png(to_bytes(image), path)
