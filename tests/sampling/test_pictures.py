"""The positions of images in a grid, and the fit of labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lit_transdiff.data.pixels import from_bytes, to_bytes
from lit_transdiff.sampling.draw import IMAGES_SHOWN, labelled
from lit_transdiff.sampling.pictures import captioned, grid, wrap


def coloured(count: int, size: int = 8) -> torch.Tensor:
    """Images of one colour each, of which no two are alike and none is white or grey."""
    red = torch.linspace(-1, 1, count)
    return torch.stack([red, -torch.ones(count), torch.ones(count)], 1)[:, :, None, None].expand(
        -1, -1, size, size
    )


def box(picture: Image.Image, colour: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, left, height and width of all pixels of a colour, which form a rectangle."""
    found = np.argwhere((np.asarray(picture) == colour).all(-1))
    (top, left), (bottom, right) = found.min(0), found.max(0)
    assert len(found) == (bottom - top + 1) * (right - left + 1)
    return int(top), int(left), int(bottom - top + 1), int(right - left + 1)


@pytest.mark.parametrize("labelled", [False, True])
def test_images_lie_in_rows_and_columns_at_equal_distances(labelled: bool) -> None:
    labels = (
        dict(
            row_labels=["a", "b"],
            column_labels=["first", "second column", "3"],
            title="A title of some length",
        )
        if labelled
        else {}
    )
    images = coloured(5)
    picture = grid(images, 3, scale=3, **labels)  # type: ignore[arg-type]
    boxes = [box(picture, tuple(to_bytes(image)[:, 0, 0].tolist())) for image in images]
    assert all((height, width) == (24, 24) for _, _, height, width in boxes)
    tops, lefts = [b[0] for b in boxes], [b[1] for b in boxes]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert lefts[:2] == lefts[3:] and lefts[1] - lefts[0] == lefts[2] - lefts[1] >= 24


@pytest.mark.parametrize(
    "labels",
    [
        dict(row_labels=["a long label of a row", "b"]),
        dict(column_labels=["a long label of a column", "b"]),
        dict(title="a-long-word-that-cannot-be-broken-although-it-is-wider-than-the-picture and more words"),
    ],
)
def test_no_label_is_clipped(labels: dict[str, object]) -> None:
    """The margins of the picture stay white."""
    pixels = np.asarray(grid(coloured(4), 2, **labels))  # type: ignore[arg-type]
    border = np.concatenate(
        [
            pixels[:4].reshape(-1, 3),
            pixels[-4:].reshape(-1, 3),
            pixels[:, :4].reshape(-1, 3),
            pixels[:, -4:].reshape(-1, 3),
        ]
    )
    assert (border == 255).all()


def test_grey_images_and_enlargement_without_smoothing() -> None:
    images = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])[None, None]
    pixels = np.asarray(grid(images, 1, scale=4))
    top, left = np.argwhere((pixels == 0).all(-1)).min(0)
    assert (pixels[top : top + 4, left : left + 4] == 0).all()
    assert (pixels[top + 4 : top + 8, left + 4 : left + 8] == 0).all()
    assert (pixels[top : top + 4, left + 4 : left + 8] == 255).all()


def test_small_images_are_enlarged_by_default_and_large_ones_are_not() -> None:
    for size, scale in ((8, 12), (40, 2), (96, 1), (120, 1)):
        images = torch.rand(2, 3, size, size) * 2 - 1
        assert grid(images, 2).tobytes() == grid(images, 2, scale=scale).tobytes()


def test_bytes() -> None:
    assert to_bytes(torch.tensor([-1.2, -1, 0, 0.5, 1, 3])).tolist() == [0, 0, 128, 191, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(every)), every) and torch.equal(
        from_bytes(every), every.float() / 127.5 - 1
    )
    with pytest.raises(ValueError, match="1 values that are not finite"):
        to_bytes(torch.tensor([0, float("nan")]))


def test_pictures_beside_each_other_keep_their_order_and_shrink() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    pictures = [
        Image.new("RGB", (width, 100), colour)
        for width, colour in zip((100, 1000, 500), colours, strict=True)
    ]
    whole = captioned(pictures, ["one", "two\nwith a second line", "three"], columns=2, max_width=500)
    boxes = [box(whole, colour) for colour in colours]
    assert [b[2:] for b in boxes] == [(100, 100), (50, 500), (100, 500)]
    assert boxes[0][0] == boxes[1][0] < boxes[2][0] and boxes[0][1] == boxes[2][1] < boxes[1][1]


def test_wrapping_keeps_all_words() -> None:
    from lit_transdiff.sampling.pictures import font, text_width

    face, text = font(14), "some words and an-unbreakably-long-word-indeed to wrap"
    lines = wrap(text, face, 100)
    assert " ".join(lines) == text
    assert all(text_width(line, face) <= 100 or " " not in line for line in lines)


def test_what_cannot_be_laid_out_is_refused() -> None:
    for arguments in (
        dict(columns=0),
        dict(columns=2, row_labels=["a"]),
        dict(columns=2, column_labels=["a"]),
        dict(columns=2, scale=0),
    ):
        with pytest.raises(ValueError, match="got"):
            grid(coloured(4), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images: got"):
        grid(torch.zeros(2, 4, 8, 8), 1)
    with pytest.raises(ValueError, match="captions"):
        captioned([], [])


@pytest.mark.parametrize("references", [False, True])
def test_a_grid_of_many_images_shows_the_first_of_each_class(references: bool) -> None:
    few, many = (torch.zeros(2, n, 3, 3, 8, 8) for n in (IMAGES_SHOWN, 3000))
    sizes = [labelled(rows, ["shoe", "bag"], references).size for rows in (few, many)]
    # as large, but for a line that says so
    assert sizes[1][0] >= sizes[0][0] and sizes[1][1] - sizes[0][1] < 100
