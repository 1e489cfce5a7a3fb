import gzip
import os
import struct
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.encode import Encoding
from lit_transdiff.data.idx import read_idx
from lit_transdiff.data.index import read_index
from lit_transdiff.data.order import Rows
from lit_transdiff.data.pack import Cut, pack
from lit_transdiff.data.verify import verify
from tests.helpers.small import twice


def values_of(index, data):
    """key -> [C, H, W] of all samples, read as in evaluation."""
    samples = np.arange(len(index))
    values = PlannedDataset(index, data)[Rows(samples, samples * 0, samples[:, None])].values[:, 0]
    return {index.key_of(i): v for i, v in enumerate(values)}


def test_image_folder_is_packed_as_it_is(image_folder, tmp_path):
    report = pack(image_folder, tmp_path / "x", cut=Cut(samples_per_shard=7), progress=False)
    index = report.index
    assert (
        index.class_names == ("ant", "bee", "cat", "dog", "elk") and index.class_counts.tolist() == [13] * 5
    )
    assert [shard.samples for shard in index.shards] == [7] * 9 + [2] and not report.skipped
    with tarfile.open(tmp_path / "x" / "x-000000.tar") as tar:
        key = index.key_of(0)
        assert (
            tar.extractfile(f"{key}.png").read()
            == (image_folder / key.replace("_", "/")).with_suffix(".png").read_bytes()
        )
    values = values_of(index, DataConfig(image_size=8, image_channels=1))["cat_3"]
    pixels = np.array(Image.open(image_folder / "cat/3.png"))
    assert torch.equal(((values[0] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels))


def test_same_bytes_each_time_and_no_overwriting(image_folder, tmp_path):
    sums = []
    for name in ("one", "two"):
        report = pack(
            image_folder, tmp_path / name, cut=Cut(samples_per_shard=20), seed=3, name="x", progress=False
        )
        sums.append([shard.sha256 for shard in report.index.shards])
    assert sums[0] == sums[1]
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()
    assert (tmp_path / "one/index.npz").read_bytes() == (tmp_path / "two/index.npz").read_bytes()
    other = pack(
        image_folder, tmp_path / "three", cut=Cut(samples_per_shard=20), seed=4, name="x", progress=False
    )
    assert [shard.sha256 for shard in other.index.shards] != sums[0]
    with pytest.raises(ValueError, match=r"made with other settings \(seed was 3, now 4\)"):
        pack(image_folder, tmp_path / "one", cut=Cut(samples_per_shard=20), seed=4, name="x", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    again = pack(
        image_folder, tmp_path / "one", cut=Cut(samples_per_shard=20), seed=3, name="x", progress=False
    )
    assert str(again) == str(report) and before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()
    }
    (tmp_path / "one/packing.json").unlink()
    with pytest.raises(ValueError, match=r"already holds index\.json .* but no packing\.json"):
        pack(image_folder, tmp_path / "one", progress=False)


def test_corrupt_images_are_listed_and_dotted_names_kept_apart(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "in" / name).mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "in/n01/n01_1.jpg")
    Image.new("CMYK", (20, 10)).save(tmp_path / "in/n01/a.b.jpg")
    Image.new("L", (20, 10)).save(tmp_path / "in/n01/a_b.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "in/n02/x.JPEG")
    (tmp_path / "in/n02/broken.jpg").write_bytes(b"broken")
    (tmp_path / "in/n02/cut.jpg").write_bytes((tmp_path / "in/n02/x.JPEG").read_bytes()[:300])
    (tmp_path / "in/n02/notes.txt").write_text("not an image")
    report = pack(tmp_path / "in", tmp_path / "out", encoding=Encoding(image_size=8), progress=False)
    assert sorted(name.rpartition("/")[2] for name, _ in report.skipped) == ["broken.jpg", "cut.jpg"]
    assert "2 unreadable images skipped" in str(report)
    assert "broken.jpg\tnot a readable image" in (tmp_path / "out/skipped.txt").read_text()
    values = values_of(report.index, DataConfig(image_size=8))
    assert set(values) == {"n01_1", "n01_a_b", "n01_a_b-2", "n02_x"}
    assert all(value.shape == (3, 8, 8) for value in values.values())


@pytest.mark.skipif(sys.platform == "darwin", reason="its disks take names in UTF-8 alone")
def test_names_that_are_not_utf8_are_told(tmp_path):
    latin = os.fsdecode(b"\xe9")
    (tmp_path / "in/a").mkdir(parents=True)
    for name in ("1", latin):
        Image.new("RGB", (8, 8)).save(tmp_path / f"in/a/{name}.png")
    (tmp_path / f"in/a/x.{latin}").touch()
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert report.skipped == [(f"{tmp_path}/in/a/\\xe9.png", "a name that is not UTF-8")]
    assert "\\xe9.png\ta name that is not UTF-8" in (tmp_path / "out/skipped.txt").read_text()
    assert ".\\xe9 (1)" in str(report)
    (tmp_path / "in/a").rename(tmp_path / "in" / latin)
    with pytest.raises(ValueError, match=r"in: class folder: got .*xe9'; allowed: a name in UTF-8"):
        pack(tmp_path / "in", tmp_path / "other", progress=False)


def test_what_is_no_image_among_the_images_is_reported(tmp_path):
    """A folder called 2.png, a dangling link, a sub-folder, files of other formats, and a file beside the
    class folders.
    """
    (tmp_path / "in/a/2.png").mkdir(parents=True)
    (tmp_path / "in/a/deeper").mkdir()
    for name in ("in/notes.txt", "in/a/3.tif", "in/a/4.GIF", "in/a/5.gif", "in/a/README"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"in/a: got 'no images, but \.gif \(2\), \.tif \(1\), .*'; allowed: files ending in"
    ):
        pack(tmp_path / "in", tmp_path / "out", progress=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "in/a/1.png")
    (tmp_path / "in/a/6.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in/a/7.png").symlink_to("1.png")
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert sorted(report.index.key.tolist()) == [b"a_1", b"a_7"]
    assert report.skipped == [(f"{tmp_path}/in/a/6.png", "a dangling link")]
    assert "6.png\ta dangling link" in (tmp_path / "out/skipped.txt").read_text()
    expected = "; passed over: .gif (2), .tif (1), .txt (1), files without an extension (1), folders (2)"
    assert str(report).endswith(f"1 unreadable images skipped, listed in skipped.txt{expected}")
    assert str(pack(tmp_path / "in", tmp_path / "out", progress=False)) == str(report)


def write_idx(path, array, magic):
    path.write_bytes(gzip.compress(struct.pack(f">i{array.ndim}i", magic, *array.shape) + array.tobytes()))


def test_idx_with_padding_and_limit(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 28, 28), np.uint8), np.arange(60, dtype=np.uint8) % 3
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images, 2051)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels, 2049)
    with pytest.raises(ValueError, match="split: 'test' is not known"):
        pack(tmp_path, tmp_path / "out", split="test")
    with pytest.raises(ValueError, match="3 names, one for each class"):
        pack(tmp_path, tmp_path / "out", split="train", class_names=["a"])
    with pytest.raises(ValueError, match="limit: got 61"):
        pack(tmp_path, tmp_path / "out", split="train", limit=61)
    index = pack(
        tmp_path,
        tmp_path / "out",
        split="train",
        limit=31,
        encoding=Encoding(pad_to=32),
        class_names=["a", "b", "c"],
        progress=False,
    ).index
    assert index.class_counts.tolist() == [11, 10, 10]
    for key, value in values_of(index, DataConfig(image_size=32, image_channels=1)).items():
        pixels = ((value[0] + 1) * 127.5).round().numpy().astype(np.uint8)
        assert np.array_equal(pixels, np.pad(images[int(key)], 2))
        assert index.label[index.key.tolist().index(key.encode())] == int(key) % 3


def test_list_file(image_folder, tmp_path):
    (image_folder.parent / "list.tsv").write_text("small/ant/1.png\tred\nsmall/bee/2.png\tblue\n")
    index = pack(image_folder.parent / "list.tsv", tmp_path / "a", progress=False).index
    assert index.class_names == ("blue", "red") and sorted(index.label) == [0, 1]
    (image_folder.parent / "list.csv").write_text("small/ant/1.png,2\nsmall/ant/missing.png,0\n")
    with pytest.raises(ValueError, match=r"line 2: got '.*missing\.png'"):
        pack(image_folder.parent / "list.csv", tmp_path / "b", progress=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1", ""], "line 3: label: got ''; allowed: a class number"),
        (["cat", "", "dog"], "line 2: label: got ''; allowed: .*999999, or the name of a class"),
        (["0", "-1", "2"], "line 2: label: got '-1'; allowed: a class number"),
        (["cat", "dog", "7"], "line 1: label: got 'cat'; allowed: a class number"),
        (["1.0", "2.0", "10.0"], r"line 1: label: got '1\.0'; allowed: .* or the name"),
        (["-1", "-2", "-10"], "line 1: label: got '-1'; allowed: .* or the name"),
        (["1", "٣", "2"], "line 2: label: got '٣'; allowed: a class number"),
        (["٣", "٤", "٥"], "line 1: label: got '٣'; allowed: .* or the name"),
        (["0", "9999999999", "1"], "line 2: label: got '9999999999'"),
    ],
)
def test_a_label_that_would_number_the_classes_anew_is_refused(image_folder, tmp_path, labels, message):
    path = image_folder.parent / "labels.csv"
    path.write_text(
        "".join(f"small/ant/{i}.png,{label}\n" for i, label in enumerate(labels)), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=message):
        pack(path, tmp_path / "x", progress=False)
    path.write_bytes(b"small/ant/1.png,0\nsmall/ant/\xe9.png,0\n")
    with pytest.raises(ValueError, match=r"labels\.csv: line 2: not UTF-8.*Unpack an archive first"):
        pack(path, tmp_path / "x", progress=False)


def test_a_list_with_a_byte_order_mark_a_header_or_labels_from_1(image_folder, tmp_path):
    path = image_folder.parent / "other.csv"
    lines = ["small/ant/1.png,0", "small/bee/2.png,1"]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    assert pack(path, tmp_path / "a", progress=False).index.class_counts.tolist() == [1, 1]
    for header in ("path,label", "path,0"):
        path.write_text("\n".join([header, *lines]))
        with pytest.raises(ValueError, match=r"line 1: .*; remove this line, if it is a header"):
            pack(path, tmp_path / "b", progress=False)
    path.write_text("small/ant/1.png,1\nsmall/bee/2.png,2\n")
    with pytest.raises(
        ValueError,
        match=r"other\.csv: labels: got '1 to 2'; allowed: class numbers from 0 on: subtract 1, or",
    ):
        pack(path, tmp_path / "b", progress=False)
    assert pack(
        path, tmp_path / "b", class_names=["none", "x", "y"], progress=False
    ).index.class_counts.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            struct.pack(">4i", 2051, 2, 2, 2) + bytes(9),
            "bytes of data: got 'more than 8'; allowed: 8 for shape",
        ),
        (struct.pack(">4i", 2051, 2, 2, 2) + bytes(7), "bytes of data: got '7'; allowed: 8 for shape"),
        (struct.pack(">4i", 2051, -1, 2**30, 2**30), "the file is cut"),
        (struct.pack(">4i", 2051, 0, 28, 28), r"shape: got \(0, 28, 28\); allowed: at least one item"),
        (struct.pack(">2i", 2051, 2), "header: got '8 bytes'; allowed: 16: the file is cut"),
        (b"\0\0", "magic number: got '2 bytes'"),
        (struct.pack(">2i", 2049, 2), "magic number: got 2049"),
    ],
)
@pytest.mark.parametrize("gzipped", [True, False])
def test_an_idx_file_holds_what_its_header_says(tmp_path, content, message, gzipped):
    path = tmp_path / ("x-idx3-ubyte" + ".gz" * gzipped)
    path.write_bytes(gzip.compress(content) if gzipped else content)
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        read_idx(path, 2051)


def test_a_cut_or_endless_idx_file_takes_no_memory(tmp_path):
    path = tmp_path / "x-idx3-ubyte.gz"
    whole = gzip.compress(struct.pack(">4i", 2051, 4, 8, 8) + np.random.default_rng(0).bytes(256))
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(path, 2051)
    path.write_bytes(gzip.compress(struct.pack(">4i", 2051, 1, 8, 8) + bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 64"):
        read_idx(path, 2051)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("folder", "each"), [("train", 400), ("evaluation", 200)])
def test_bundled_shards(folder, each, request):
    path = request.config.rootpath / "data/fashion" / folder
    index = verify(path)
    assert index.class_counts.tolist() == [each] * 10 and index.class_names[9] == "ankle boot"
    card = (path.parent / "README.md").read_text()
    assert all(shard.sha256 in card for shard in index.shards)
    assert read_index(path / "index.json").seed == 0


def test_two_packs_at_once_are_one(image_folder, tmp_path):
    reports = twice(
        lambda: pack(image_folder, tmp_path / "both", cut=Cut(samples_per_shard=7), progress=False)
    )
    alone = pack(image_folder, tmp_path / "alone" / "both", cut=Cut(samples_per_shard=7), progress=False)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone" / "both")
    assert {str(report).replace("both", "") for report in reports} == {str(alone).replace("alone/both", "")}


def test_two_packs_of_other_settings_at_once_leave_one(image_folder, tmp_path):
    seeds = iter((0, 1))
    with pytest.raises(ValueError, match=r"made with other settings \(seed was"):
        twice(lambda: pack(image_folder, tmp_path / "both", seed=next(seeds), progress=False))
    assert len(read_index(tmp_path / "both")) == 65 and not (tmp_path / "both" / "finished").exists()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
