"""Images are read as viewers show them: upright, and without the colours hidden under transparent pixels."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import SampleDecoder
from lit_transdiff.data.decode import open_image
from lit_transdiff.data.encode import Encoding
from lit_transdiff.data.index import read_index
from lit_transdiff.data.pack import pack

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
# How an upright image is stored for each orientation: which pixel [row, column] of H x W lies first, as
# arrays.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[:, ::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[::-1].transpose(1, 0, 2),
}
FORMATS = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}


def upright() -> np.ndarray:
    """A picture [24, 16, 3] that changes with every rotation."""
    y, x = np.mgrid[:24, :16]
    return np.stack([10 * y, 15 * x, 255 - 10 * y], -1).astype(np.uint8)


def content_of(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return content_of(
        Image.fromarray(STORED[orientation](upright()).copy()), form, exif=exif, **FORMATS[form]
    )


def farthest(found: Image.Image, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(found).astype(int) - expected).max())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_upright(form, orientation):
    found = open_image(photo(orientation, form))
    assert farthest(found.image, upright()) <= 6 and found.oddities == (
        ("oriented",) if orientation > 1 else ()
    )
    as_stored = open_image(photo(orientation, form), exif="ignore").image
    assert farthest(as_stored, STORED[orientation](upright())) <= 6


DAMAGED = [
    b"",
    b"\x99" * 50,
    b"II*\0",
    b"II*\0\xff\xff\xff\x7f",
    b"II*\0\x08\0\0\0\x05\0\x12\x01",
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # the orientation is a text
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",  # the orientation is 9
]


@pytest.mark.parametrize("block", DAMAGED, ids=range(len(DAMAGED)))
def test_a_broken_exif_block_leaves_the_image_readable(block):
    sound, payload = photo(1), b"Exif\0\0" + block
    broken = sound[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + sound[2:]
    found = open_image(broken)
    assert found.oddities == () and farthest(found.image, upright()) <= 6


def halves(mode: str, left, right) -> Image.Image:
    """8 x 8: the left half of one colour, the right half of another."""
    image = Image.new(mode, (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def indexed(**options) -> bytes:
    image = halves("P", 0, 1)
    image.putpalette([*RED, *GREEN])
    return content_of(image, "PNG", **options)


def png(kind: int, depth: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of two pixels; ``kind`` 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0))
    colour = chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + colour
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


HIDDEN_GREEN = halves("RGBA", (*RED, 255), (*GREEN, 0))
FRAMES = {"save_all": True, "append_images": [HIDDEN_GREEN.transpose(Image.Transpose.ROTATE_180)]}
WORDS = struct.Struct(">6H")
TRANSPARENT = {  # name: content, the first pixel, the last
    "RGBA": (content_of(HIDDEN_GREEN), RED, WHITE),
    "RGBA, half": (content_of(halves("RGBA", (*RED, 255), (0, 0, 0, 128))), RED, (127,) * 3),
    "WebP": (content_of(HIDDEN_GREEN, "WEBP", lossless=True, exact=True), RED, WHITE),
    "animated WebP": (content_of(HIDDEN_GREEN, "WEBP", lossless=True, exact=True, **FRAMES), RED, WHITE),
    "animated PNG": (content_of(HIDDEN_GREEN, "PNG", **FRAMES), RED, WHITE),
    "LA": (content_of(halves("LA", (10, 255), (90, 0))), (10,) * 3, WHITE),
    "P, one colour": (indexed(transparency=1), RED, WHITE),
    "P, alpha of each": (indexed(transparency=b"\xff\x00"), RED, WHITE),
    "RGB": (content_of(halves("RGB", RED, GREEN), transparency=GREEN), RED, WHITE),
    "L": (content_of(halves("L", 10, 90), transparency=90), (10,) * 3, WHITE),
    "1": (content_of(halves("1", 1, 0), transparency=0), WHITE, WHITE),
    "L of 2 bits": (png(0, 2, b"\x60", b"\0\x02"), (85,) * 3, WHITE),
    "L of 4 bits": (png(0, 4, b"\x3c", b"\0\x0c"), (51,) * 3, WHITE),
    "RGB of 16 bits": (
        png(2, 16, WORDS.pack(65535, 0, 0, 0, 10_440, 0), WORDS.pack(0, 10_440, 0, 0, 0, 0)[:6]),
        RED,
        WHITE,
    ),
    "RGBA of 16 bits": (png(6, 16, struct.pack(">8H", 65535, 0, 0, 65535, 0, 65535, 0, 0)), RED, WHITE),
    "LA of 16 bits": (png(4, 16, struct.pack(">4H", 40_000, 65535, 40_000, 0)), (156,) * 3, WHITE),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_hidden_under_transparent_pixels_does_not_show(name):
    content, first, last = TRANSPARENT[name]
    found = open_image(content)
    size = found.image.size
    assert found.image.mode == "RGB" and found.image.getpixel((0, 0)) == first
    assert found.image.getpixel((size[0] - 1, size[1] - 1)) == last
    assert found.oddities == (("transparent", "animated") if "animated" in name else ("transparent",))
    if last == WHITE:
        other = open_image(content, background="#102030").image
        assert other.getpixel((size[0] - 1, size[1] - 1)) == (0x10, 0x20, 0x30)


OPAQUE = {
    "RGB": (content_of(halves("RGB", RED, GREEN)), "RGB", RED),
    "RGBA": (content_of(halves("RGBA", (*RED, 255), (*GREEN, 255))), "RGB", RED),
    "L": (content_of(halves("L", 10, 90)), "L", 10),
    "L of 4 bits": (png(0, 4, b"\x3c"), "L", 51),
    "1": (content_of(halves("1", 1, 0)), "RGB", WHITE),
    "P": (indexed(), "RGB", RED),
    "RGB of 16 bits": (png(2, 16, WORDS.pack(65535, 0, 0, 0, 10_440, 0)), "RGB", RED),
    "CMYK": (content_of(halves("CMYK", (0, 255, 255, 0), (255, 0, 255, 0)), "JPEG"), "RGB", (254, 0, 0)),
    "BMP": (content_of(halves("RGB", RED, GREEN), "BMP"), "RGB", RED),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_images_of_every_mode(name):
    content, mode, first = OPAQUE[name]
    found = open_image(content)
    assert (found.image.mode, found.image.getpixel((0, 0)), found.oddities) == (mode, first, ())


def test_grey_of_16_bits_is_refused_not_clipped():
    with pytest.raises(ValueError, match=r"mode I;16 .*; allowed: 8 bits"):
        open_image(png(0, 16, struct.pack(">2H", 40_000, 65535)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of one class: an upright photo, the same stored on its side, and a square with a transparent
    half.
    """
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a").mkdir()
    for orientation in (1, 6):
        (folder / f"a/o{orientation}.jpg").write_bytes(photo(orientation))
    (folder / "a/half.png").write_bytes(content_of(HIDDEN_GREEN))
    return folder


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(image_size=16), Encoding(pad_to=24)], ids=str)
def test_packed_and_read_images_are_what_a_viewer_shows(photos, tmp_path, encoding):
    report = pack(photos, tmp_path / "x", encoding=encoding, progress=False)
    assert "note: 1 images lie on their side or are mirrored" in str(report)
    assert "note: 1 images are transparent in places: " in str(report)
    assert str(pack(photos, tmp_path / "x", encoding=encoding, progress=False)) == str(report)
    index = report.index
    decoder = SampleDecoder(index, DataConfig(image_size=16), seed=0, training=False)
    values = {}
    for sample in range(len(index)):
        shard, offset, size = index.shards[0].name, int(index.offset[sample]), int(index.size[sample])
        content = (tmp_path / "x" / shard).read_bytes()[offset : offset + size]
        values[index.key_of(sample)] = decoder(content, sample, 0)
        if not encoding.keeps_files:
            assert not Image.open(io.BytesIO(content)).getexif(), "an orientation would be applied twice"
    assert float((values["a_o1"] - values["a_o6"]).abs().max()) < 0.1
    assert float(values["a_half"][:, 8, 9].min()) > 0.7, "green or black shows where white should"


def test_images_may_be_taken_as_they_are_stored(photos, tmp_path):
    ignoring = Encoding(image_size=16, exif="ignore", background="black")
    report = pack(photos, tmp_path / "x", encoding=ignoring, progress=False)
    assert "--exif ignore leaves as it is" in str(report) and "black shows there" in str(report)
    with pytest.raises(
        ValueError, match=r"made with other settings \(exif was 'ignore', now 'turn'; background was 'black'"
    ):
        pack(photos, tmp_path / "x", encoding=Encoding(image_size=16), progress=False)
    with pytest.raises(
        ValueError, match=r"exif: got 'ignore'; allowed: 'turn' without image_size or pad_to: .* data\.exif"
    ):
        Encoding(exif="ignore")
    for setting in ("mauve", "#12345", ""):
        with pytest.raises(ValueError, match=r"data\.background: got .*; allowed: white, black, grey, or"):
            DataConfig(background=setting)


def test_shards_of_an_earlier_version_stay(photos, tmp_path, caplog):
    """Their plan does not record the treatment of orientation and transparency."""
    pack(photos, tmp_path / "x", encoding=Encoding(image_size=16), progress=False)
    plan = json.loads((tmp_path / "x/packing.json").read_text())
    (tmp_path / "x/packing.json").write_text(
        json.dumps({k: v for k, v in plan.items() if k not in ("exif", "background")})
    )
    again = pack(photos, tmp_path / "x", encoding=Encoding(image_size=16), progress=False)
    assert again.index.identity == read_index(tmp_path / "x").identity
    assert "made by an earlier version, without exif and background" in caplog.text
    (tmp_path / "x/index.json").unlink()
    with pytest.raises(ValueError, match="exif was None, now 'turn'"):
        pack(photos, tmp_path / "x", encoding=Encoding(image_size=16), progress=False)
