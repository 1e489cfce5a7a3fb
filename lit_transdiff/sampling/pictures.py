"""Labelled pictures: grids of samples, and several pictures side by side.

Shapes: N images, C channels (1 or 3), H W pixels. Images are in [-1, 1]. The only library is Pillow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_transdiff.base.files import naming_full
from lit_transdiff.config import require
from lit_transdiff.data.pixels import to_bytes

BACKGROUND, INK, FAINT = (255, 255, 255), (28, 30, 34), (110, 114, 122)
SHOWN_PIXELS = 96  # the approximate smallest width of an image in a grid
MILLISECONDS = 250  # duration of a picture of a film
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    images: Tensor,
    columns: int,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    scale: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """A picture of ``images`` [N, C, H, W] in rows of ``columns``, each pixel ``scale`` pixels wide.

    By default images below SHOWN_PIXELS are enlarged towards that size.

    Labels are one per row and one per column, or absent. The picture grows until every label fits.
    """
    rows = math.ceil(len(images) / columns) if columns > 0 else 0
    scale = max(1, SHOWN_PIXELS // images.shape[-1]) if scale is None else scale
    check_grid(images, rows, columns, scale, row_labels, column_labels)
    tiles = repeat(to_bytes(images.detach().cpu()), "n c h w -> n (h y) (w x) c", y=scale, x=scale)
    height, width = tiles.shape[1:3]
    gap = max(2, min(height, width) // 24)
    margin = 4 * gap + 6
    small, large = font(min(20, max(13, height // 5))), font(min(26, max(17, height // 4)))

    left = max((text_width(label, small) + 10 for label in row_labels or ()), default=0)
    step_x = max([width + gap] + [text_width(label, small) + 12 for label in column_labels or ()])
    step_y = max(height + gap, line_height(small) if row_labels else 0)
    lines = wrap(title, large, max(left + columns * step_x - gap, 360)) if title else []
    top = len(lines) * line_height(large) + (10 if lines else 0)
    header = line_height(small) + 4 if column_labels else 0
    inner = max([left + columns * step_x - gap] + [text_width(line, large) for line in lines])

    canvas = Image.new(
        "RGB", (inner + 2 * margin, top + header + rows * step_y - gap + 2 * margin), BACKGROUND
    )
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        pen.text((margin, margin + i * line_height(large)), line, INK, font=large)
    x_0, y_0 = margin + left, margin + top + header
    for i, label in enumerate(column_labels or ()):
        pen.text((x_0 + i * step_x + (step_x - gap) // 2, y_0 - 6), label, FAINT, font=small, anchor="mb")
    for i, label in enumerate(row_labels or ()):
        pen.text((x_0 - 10, y_0 + i * step_y + (step_y - gap) // 2), label, FAINT, font=small, anchor="rm")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        x = x_0 + column * step_x + (step_x - gap - width) // 2
        corner = x, y_0 + row * step_y + (step_y - gap - height) // 2
        canvas.paste(picture(tile), corner)
    return canvas


def check_grid(
    images: Tensor,
    rows: int,
    columns: int,
    scale: int,
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
) -> None:
    """Refuse images and labels that cannot be laid out."""
    shape = tuple(images.shape)
    allowed = "[N, C, H, W] with N above 0 and C 1 or 3"
    require(len(shape) == 4 and shape[0] > 0 and shape[1] in (1, 3), "images", shape, allowed)
    require(columns >= 1 and scale >= 1, "columns and scale", (columns, scale), "integers of at least 1")
    require(row_labels is None or len(row_labels) == rows, "row_labels", row_labels, f"{rows} labels")
    allowed = f"{columns} labels"
    require(column_labels is None or len(column_labels) == columns, "column_labels", column_labels, allowed)


def captioned(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 3, max_width: int = 900
) -> Image.Image:
    """Pictures in rows of ``columns``, each under its caption, whose first line is in large type.

    Pictures wider than ``max_width`` pixels are scaled down; captions are wrapped to the width of their
    column.
    """
    count = len(pictures)
    allowed = f"one for each of {count} pictures, at least one"
    require(count > 0 and count == len(captions), "captions", len(captions), allowed)
    margin, columns = 24, min(columns, count)
    shown = [narrowed(p.convert("RGB"), max_width) for p in pictures]
    texts = [caption_lines(caption, max(320, *(p.width for p in shown))) for caption in captions]
    width = max(
        [p.width for p in shown] + [text_width(words, face) for text in texts for words, face in text]
    )

    rows = [range(i, min(i + columns, count)) for i in range(0, count, columns)]
    heads = [max(sum(line_height(face) for _, face in texts[i]) for i in row) + 8 for row in rows]
    bodies = [max(shown[i].height for i in row) for row in rows]
    size = (columns * (width + margin) + margin, sum(heads) + sum(bodies) + margin * (len(rows) + 1))
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    top = margin
    for row, head, body in zip(rows, heads, bodies, strict=True):
        for column, i in enumerate(row):
            x, y = margin + column * (width + margin), top
            for n, (words, face) in enumerate(texts[i]):
                pen.text((x, y), words, FAINT if n else INK, font=face)
                y += line_height(face)
            canvas.paste(shown[i], (x, top + head))
        top += head + body + margin
    return canvas


def narrowed(picture: Image.Image, max_width: int) -> Image.Image:
    """``picture``, scaled down if it is wider than ``max_width``."""
    return scaled(picture, max_width) if picture.width > max_width else picture


def scaled(picture: Image.Image, width: int) -> Image.Image:
    """``picture``, made ``width`` pixels wide."""
    return picture.resize(
        (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS
    )


def caption_lines(caption: str, width: int) -> list[tuple[str, Font]]:
    """The wrapped lines of a caption, each with its font."""
    head, *rest = caption.split("\n")
    small = font(20)
    return [(words, font(28)) for words in wrap(head, font(28), width)] + [
        (w, small) for line in rest for w in wrap(line, small, width)
    ]


def picture(tile: Tensor) -> Image.Image:
    """Convert an image [H, W, C] of uint8 to an RGB picture."""
    return as_image(tile).convert("RGB")


def as_image(tile: Tensor) -> Image.Image:
    """Convert an image [H, W, C] of uint8 to a picture, grey if C = 1."""
    return Image.fromarray((rearrange(tile, "h w 1 -> h w") if tile.shape[2] == 1 else tile).numpy())


def save_png(pixels: Tensor, path: Path) -> None:
    """Save an image [C, H, W] of uint8 as a PNG file, grey if C = 1."""
    save_picture(as_image(rearrange(pixels, "c h w -> h w c")), path)


def save_film(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write pictures of one size as an animation without end, which rests on the last one."""
    times = [MILLISECONDS] * (len(pictures) - 1) + [6 * MILLISECONDS]
    save_picture(
        pictures[0], path, save_all=True, append_images=pictures[1:], duration=times, loop=0, lossless=True
    )


def save_picture(picture: Image.Image, path: Path, **settings: Any) -> None:
    """Write a picture, with settings of its format; a full disk leaves no partial file."""
    try:
        with naming_full(path):
            picture.save(path, **settings)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def font(size: int) -> Font:
    """Pillow's built-in font at ``size`` pixels."""
    return ImageFont.load_default(size)


def text_width(text: str, face: Font) -> int:
    return math.ceil(face.getlength(text))


def line_height(face: Font) -> int:
    return math.ceil(1.35 * face.getbbox("Ag|")[3])


def wrap(text: str, face: Font, width: int) -> list[str]:
    """Wrap ``text`` to lines of at most ``width`` pixels; longer words are not split."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", face) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def opener(file: Path) -> Callable[[], Image.Image]:
    """A function that reads a picture on demand; it raises ``ValueError`` that names a damaged file."""

    def load() -> Image.Image:
        try:
            with warnings.catch_warnings():
                # Pillow itself refuses only pictures of twice that size.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as picture:
                    return picture.convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is too large to be shown and is skipped ({error}).") from error
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} is not a complete picture ({error}).") from error

    return load
