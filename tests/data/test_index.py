import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.index import index_shards, read_index
from lit_transdiff.data.order import BatchLayout, Rows
from lit_transdiff.data.shards import ShardReader
from lit_transdiff.data.stream import StreamDataset
from lit_transdiff.data.verify import verify
from tests.helpers.shards import bad_shards, png, write_tar


def test_index_finds_what_was_written(shards):
    index = read_index(shards)
    reader = ShardReader(index, max_open=2)
    assert len(index) == 65 and index.num_classes == 5 and index.kind == "images"
    for sample in np.random.default_rng(0).permutation(len(index)).tolist():
        shard, key = index.name_of(sample).split("/")
        with tarfile.open(shards / shard) as tar:
            assert reader.read(sample) == tar.extractfile(f"{key}.png").read()
            assert int(tar.extractfile(f"{key}.cls").read()) == index.label[sample]
            assert index.class_names[index.label[sample]] == key.split("_")[0]
    assert len(reader.descriptors) == 2
    verify(shards)


def test_users_shards(tmp_path):
    write_tar(
        tmp_path / "a.tar", ("x/1.JPG", png()), ("x/1.cls", b"3\n"), ("x/1.json", b"{}"), ("README", b"text")
    )
    write_tar(tmp_path / "b.tar", ("2.cls", b"0"), ("2.png", png()))
    index = index_shards(tmp_path, progress=False)
    assert [index.name_of(i) for i in range(2)] == ["a.tar/x/1", "b.tar/2"]
    assert index.class_names == ("0", "1", "2", "3") and index.label.tolist() == [3, 0]
    with pytest.raises(ValueError, match="label: got 3; allowed: 0 to 1"):
        index_shards(tmp_path, ["a", "b"], progress=False)


@pytest.mark.parametrize("order", ["images first", "labels first"])
def test_labels_may_lie_apart_from_their_images(tmp_path, order):
    """As tar makes a shard of *.png *.cls: it is read at offsets, and as a stream."""
    images = [(f"{i}.png", png((8, 8 + i))) for i in range(4)]
    labels = [(f"{i}.cls", str(i % 2).encode()) for i in (3, 1, 0, 2)]
    write_tar(tmp_path / "a.tar", *(images + labels if order == "images first" else labels + images))
    index = index_shards(tmp_path, progress=False)
    assert index.key.tolist() == [b"0", b"1", b"2", b"3"] and index.label.tolist() == [0, 1, 0, 1]
    assert [ShardReader(index).read(i) for i in range(4)] == [content for _, content in images]
    data = DataConfig(train=f"pipe:cat {tmp_path}/a.tar", image_size=8, image_channels=1)
    stream = StreamDataset(index, data, 0, BatchLayout(2, 2), total=2)
    assert sorted(sample.sample for sample in stream.read_shards(iter([0]))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("label", "members", "names", "expected"),
    [
        ("txt", {"txt": b"1\n"}, None, 1),
        (".txt", {"txt": b"bee", "cls": b"0"}, ["ant", "bee"], 1),
        ("json:label", {"json": b'{"label": 1, "cls": 0}'}, None, 1),
        ("json:name", {"json": b'{"name": "bee"}'}, ["ant", "bee"], 1),
        ("cls", {"cls": b"2"}, ["0", "1", "10", "2"], 2),  # a class number, not the name of one
        (
            "json:name",
            {"json": b'{"label": 1}'},
            None,
            "sample '1': .json: got label; allowed: with the field 'name'",
        ),
        (
            "json:label",
            {"json": b'{"label": true}'},
            None,
            "sample '1': label 'True'; allowed: a class number",
        ),
        ("json:label", {"json": b"{"}, None, "sample '1': .json: .*; allowed: JSON with the field 'label'"),
        (
            "txt",
            {"txt": b"a photo of a bee"},
            ["ant", "bee"],
            "label 'a photo of a bee'; allowed: .* one of the names",
        ),
        ("txt", {"cls": b"0"}, None, "sample '1' has no label \\(.txt\\)"),
        ("cls", {"txt": b"0"}, None, "sample '1' has no label .*index --label txt, or json:FIELD"),
        ("json", {"json": b"0"}, None, "--label: got 'json'; allowed: cls, txt, or json:FIELD"),
    ],
)
def test_labels_of_other_members(tmp_path, label, members, names, expected):
    write_tar(
        tmp_path / "a.tar", ("0.png", png()), ("1.png", png()), *((f"1.{e}", c) for e, c in members.items())
    )
    other = {"cls": b"0", "txt": b"0", "json": b'{"label": 0, "name": 0}'}
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for extension, content in other.items():
            info = tarfile.TarInfo(f"0.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if isinstance(expected, int):
        assert index_shards(tmp_path, names, progress=False, label=label).label.tolist() == [0, expected]
    else:
        with pytest.raises(ValueError, match=expected):
            index_shards(tmp_path, names, progress=False, label=label)


def test_labels_that_begin_with_1_are_refused_with_a_way_on(tmp_path):
    write_tar(tmp_path / "a.tar", ("1.png", png()), ("1.cls", b"1"), ("2.png", png()), ("2.cls", b"2"))
    with pytest.raises(
        ValueError, match=r"labels: got '1 to 2'; allowed: class numbers from 0 on.*--class-names"
    ):
        index_shards(tmp_path, progress=False)
    assert index_shards(tmp_path, ["none", "a", "b"], progress=False).class_counts.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", png())], "a.tar: sample '1' has no label"),
        ([("1.cls", b"0")], "a.tar: sample '1' has no image"),
        ([("1.png", b""), ("1.jpg", b""), ("1.cls", b"0")], "a.tar: sample '1' has 2 images"),
        ([("1.png", b""), ("1.png", b""), ("1.cls", b"0")], "a.tar: sample '1' has two members .png"),
        ([("1.png", b""), ("1.cls", b"cat")], "a.tar: sample '1': label 'cat'"),
        ([("1.png", b""), ("1.cls", b"-1")], "a.tar: sample '1': label '-1'"),
        (
            [("1.png", png()), ("1.cls", b"3000000000")],
            "sample '1': label '3000000000'; allowed: a class number, 0 to 999999",
        ),
        ([("1.png", png()), ("1.cls", b"0" * 31 + b"12")], "a.tar: sample '1': label '0"),
        ([("1.png", b""), ("1.cls", b"0")], "a.tar: sample '1' is an empty image"),
        ([("1.v2.png", b""), ("1.v2.cls", b"0")], "a.tar: key '1.v2' has a dot"),
        ([("1.png", b""), ("1.cls", b"0"), ("1.pyd", b"")], "a.tar: member '1.pyd' is a pickle"),
        ([("1.png", b""), ("1.cls", b"0"), ("1.meta.pkl", b"")], "a.tar: member '1.meta.pkl' is a pickle"),
        (
            [("1.png", b""), ("1.cls", b"0"), ("2.png", b""), ("2.cls", b"0"), ("1.png", b"")],
            "a.tar: key '1' is there twice",
        ),
        ([("1.bin", b""), ("1.cls", b"0")], "a.tar: sample '1' holds latents; indexed are images"),
    ],
)
def test_refused_shards(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", *members)
    with pytest.raises(ValueError, match=message):
        index_shards(tmp_path, progress=False)
    assert not (tmp_path / "index.json").exists()


def test_key_in_two_shards(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, ("1.png", png()), ("1.cls", b"0"))
    with pytest.raises(ValueError, match=r"b\.tar: key '1' is also in a\.tar"):
        index_shards(tmp_path, progress=False)


def test_damaged_tars(tmp_path):
    write_tar(
        tmp_path / "a.tar", *[(f"{i}.{e}", d) for i in range(4) for e, d in (("png", png()), ("cls", b"1"))]
    )
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tar.getmember("2.png").offset
    for content, message in [
        (whole[: header + 200], "a.tar: .*truncated|a.tar: not a whole"),
        (whole[: header + 600], "a.tar: truncated: member '2.png'|a.tar: not a whole"),
        (whole[:header], "a.tar: truncated: the end-of-tar blocks are missing"),
        (whole[:header] + b"x" * 512 + whole[header + 512 :], "a.tar: damaged header or trailing data"),
        (whole + b"hidden".ljust(512, b"\0"), "a.tar: damaged header or trailing data"),
        (b"not a tar" * 1000, "a.tar: not a whole, uncompressed tar"),
    ]:
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            index_shards(tmp_path, progress=False)


def test_missing_folder_and_index_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="lit-transdiff pack"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="lit-transdiff index"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar"):
        index_shards(tmp_path)


def test_shards_are_checked_against_the_index(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    first = copy / read_index(copy).shards[0].name
    content = bytearray(first.read_bytes())
    content[700] ^= 1
    first.write_bytes(content)
    read_index(copy)  # as long as before
    with pytest.raises(ValueError, match=f"1 of 10 shards differ from their SHA-256: {first.name}"):
        verify(copy)
    reader = ShardReader(read_index(copy))
    first.write_bytes(content[:600])
    with pytest.raises(ValueError, match=f"{first.name}/.* bytes read: the shard is truncated"):
        reader.read(1)
    with pytest.raises(ValueError, match=f"{first.name}: 600 bytes, but"):
        read_index(copy)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        read_index(copy)
    shutil.copy(shards / first.name, first)
    np.savez(copy / "index.npz", offset=[0], size=[0], label=[0], key=[b"a"])
    with pytest.raises(ValueError, match=r"index\.npz does not belong to index\.json\)\. Make it again"):
        read_index(copy)
    for name in ("index.npz", "index.json"):
        (copy / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match="copy: the index is damaged"):
            read_index(copy)


@pytest.mark.parametrize(
    "name", ["sub/a.tar", "../a.tar", "index.json", "caching.json", "finished", "~/a.tar", None]
)
def test_an_index_names_tars_of_its_folder_only(shards, tmp_path, name):
    shutil.copytree(shards, tmp_path / "shards")
    header = json.loads((tmp_path / "shards" / "index.json").read_text())
    header["shards"][0]["name"] = header["shards"][1]["name"] if name is None else name
    (tmp_path / "shards" / "index.json").write_text(json.dumps(header))
    with np.load(tmp_path / "shards" / "index.npz") as sidecar:
        columns = {key: sidecar[key] for key in sidecar.files if key != "header"}
    np.savez(tmp_path / "shards" / "index.npz", **columns)
    with pytest.raises(ValueError, match="shards: name: got"):
        read_index(tmp_path / "shards", check_files=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an image", "not a readable image"),
        (png()[:45], "not a readable image"),
        (png((9000, 8000)), "9000 x 8000 pixels; allowed"),
    ],
    ids=["no image", "cut", "bomb"],
)
def test_bad_samples_are_refused_or_replaced(tmp_path, caplog, content, reason):
    index = bad_shards(tmp_path, content)
    rows = Rows(np.array([7]), np.array([0]), np.array([[0, 1, 2]]))
    data = DataConfig(image_size=8, image_channels=1)
    with pytest.raises(ValueError, match=f"a.tar/1: .*{reason}"):
        PlannedDataset(index, data)[rows]
    skipping = PlannedDataset(index, DataConfig(image_size=8, image_channels=1, on_bad_sample="skip"))
    # the next one of class 0 that the group does not have
    assert skipping[rows].samples.tolist() == [[0, 3, 2]]
    assert skipping[rows].labels.tolist() == [0]
    assert "a.tar/1" in caplog.text and "(2 skipped by this process)" in caplog.text
