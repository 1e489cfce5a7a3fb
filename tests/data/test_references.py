import json

import numpy as np
import pytest
from PIL import Image

from lit_transdiff.data.index import read_index
from lit_transdiff.data.order import TrainPlan, epoch_order
from lit_transdiff.data.pack import pack
from lit_transdiff.data.references import group_references, num_groups, read_groups


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)


@pytest.mark.parametrize("num_references", [2, 4, 7])
def test_groups_use_every_image_and_are_of_different_images_of_one_class(num_references):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 3000)
    counts = np.bincount(labels)
    for _ in range(3):
        groups, left_over = group_references(labels, rng.permutation(3000), num_references)
        assert (
            len(groups)
            == sum(-(-count // num_references) for count in counts)
            == num_groups(counts, num_references)
        )
        assert groups.shape[1] == num_references and groups.dtype == np.int64 and left_over == 0
        assert (labels[groups] == labels[groups[:, :1]]).all()
        assert all(len(set(group)) == num_references for group in groups.tolist())
        used = np.bincount(groups.reshape(-1), minlength=3000)
        assert used.min() == 1 and used.max() <= 2
        assert [used[labels == c].sum() - counts[c] for c in range(20)] == [
            -count % num_references for count in counts
        ]


@pytest.mark.parametrize("num_references", [2, 4, 7])
def test_groups_without_repeats(num_references):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 3000)
    groups, left_over = group_references(labels, rng.permutation(3000), num_references, fill_up=False)
    assert len(groups) == sum(count // num_references for count in np.bincount(labels))
    assert (labels[groups] == labels[groups[:, :1]]).all()
    assert len(np.unique(groups)) == groups.size == 3000 - left_over


def test_groups_follow_the_order_one_by_one():
    """The same groups as a plain loop with one open group a class, the last one filled up with those before
    it.
    """
    rng = np.random.default_rng(1)
    labels, order = rng.integers(0, 5, 200), rng.permutation(200)
    seen, whole, places = {c: [] for c in range(5)}, [], {}
    for place, sample in enumerate(order.tolist()):
        seen[labels[sample]].append(sample)
        places[sample] = place
        if len(seen[labels[sample]]) % 4 == 0:
            whole.append(seen[labels[sample]][-4:])
    assert group_references(labels, order, 4, fill_up=False)[0].tolist() == whole
    rest = [samples[-4:] for samples in seen.values() if len(samples) % 4]
    assert rest and group_references(labels, order, 4)[0].tolist() == sorted(
        whole + rest, key=lambda group: places[group[-1]]
    )


def test_one_reference_passes_through():
    order = np.array([2, 0, 1])
    groups, left_over = group_references(np.zeros(3, int), order, 1)
    assert groups.tolist() == [[2], [0], [1]] and left_over == 0


def test_imagenet_scale():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 1_281_167).astype(np.int32)
    starts = np.linspace(0, len(labels), 1001).astype(np.int64)
    order = epoch_order(starts, 0, 0, 64)
    groups, _ = group_references(labels, order, 4)
    assert len(np.unique(groups)) == len(labels) and groups.size - len(labels) < 3000
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    span = (place[groups].max(axis=1) - place[groups].min(axis=1)) / 1281
    assert np.median(span) < 3  # shards: the images of a group are read from neighbouring shards of the order


def test_a_class_smaller_than_a_group_is_an_error(shards):
    with pytest.raises(
        ValueError, match=r"model\.num_references: got 14, but class 'ant' .* has only 13 images"
    ):
        TrainPlan(read_index(shards), 0, num_references=14)


def test_fixed_groups(shards, tmp_path):
    index = read_index(shards)
    keys = [[index.key_of(s) for s in np.flatnonzero(index.label == c)[:3]] for c in range(5)]
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in keys))
    groups = read_groups(path, index, 3)
    plan = TrainPlan(index, 0, num_references=3, groups=groups)
    assert (
        sorted(plan.rows(0, 5).samples.tolist())
        == sorted(groups.tolist())
        == sorted(plan.rows(5, 10).samples.tolist())
    )
    (a, b, c), other = keys[0], keys[1][0]
    for line, message in [
        ([a, b], "number of keys: got 2"),
        ([a, b, "nobody"], "key: got 'nobody'"),
        ([a, b, b], "different images"),
        ([a, b, other], r"classes: got \['ant', 'bee'\]"),
        ("a", "a list of sample keys"),
    ]:
        path.write_text(json.dumps([a, b, c]) + "\n" + json.dumps(line))
        with pytest.raises(ValueError, match=f"line 2.*{message}"):
            read_groups(path, index, 3)
    path.write_text("\n\n" + json.dumps([a, b, "zzz" * 40]))
    with pytest.raises(ValueError, match=r"line 3: key: got 'zzz"):
        read_groups(path, index, 3)
    path.write_text("[")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_groups(path, index, 3)


def test_the_released_index_file(shards, tmp_path):
    """Lines of ``cate`` and ``files``; more files than R are allowed, the first R count."""
    index = read_index(shards)
    lines = [
        {"cate": "cat", "files": [f"{i}.png" for i in (3, 1, 4, 0)]},
        {"cate": "dog", "files": ["dog_5.JPEG", "9.x.png", "2.png"]},
    ]
    path = tmp_path / "files.txt"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:1] * 20_000))
    assert len(read_groups(path, index, 3)) == 20_000
    path.write_text(json.dumps(lines[0]))
    assert [index.key_of(sample) for sample in read_groups(path, index, 3)[0]] == ["cat_3", "cat_1", "cat_4"]
    for line, message in [
        (lines[1], r"line 2: key: got 'dog_9_x'"),
        ({"cate": "cat", "files": ["1.png"]}, "line 2: number of keys: got 1"),
        ({"cate": "cow", "files": ["1.png", "2.png", "3.png"]}, "line 2: key: got 'cow_1'"),
        ({"files": ["1.png", "2.png", "3.png"]}, "line 2: cate: got None"),
        ({"cate": "cat"}, "line 2: got .*a list of sample keys or file names"),
    ]:
        path.write_text(json.dumps(lines[0]) + "\n" + json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=message):
            read_groups(path, index, 3)


def test_a_file_name_that_may_mean_another_image_is_refused(tmp_path):
    """Two files of one stem, and of two classes: the keys of the later ones end in -2."""
    for name in (
        "n01/n01_0.jpg",
        "n01/n01_0.png",
        "n01/n01_1.png",
        "n01/n01_2.png",
        "dog/house_0.png",
        "dog/house_1.png",
    ):
        write_image(tmp_path / "in" / name)
    for name in ("dog_house/0.png", "dog_house/dog_house_2.png", "dog_house/dog_house_3.png"):
        write_image(tmp_path / "in" / name)
    index = pack(tmp_path / "in", tmp_path / "shards", progress=False).index
    path = tmp_path / "files.txt"

    def read(*lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [[index.key_of(sample) for sample in group] for group in read_groups(path, index, 2)]

    good = {"cate": "n01", "files": ["n01_1.png", "n01_2.png"]}
    assert read(good, ["n01_0", "n01_0-2"]) == [["n01_1", "n01_2"], ["n01_0", "n01_0-2"]]
    for line, message in [
        (
            {"cate": "n01", "files": ["n01_0.png", "n01_1.png"]},
            "line 2: file with the key: got 'n01_0'; .* also has n01_0-2",
        ),
        ({"cate": "dog_house", "files": ["0.png", "1.png"]}, "line 2: file with the key: got 'dog_house_0'"),
        (
            {"cate": "dog", "files": ["dog_house_2.png", "dog_house_3.png"]},
            "line 2: cate: got 'dog'; allowed: dog_house",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            read(good, line)


@pytest.mark.parametrize(
    "line",
    [b'["n\xe901_0","n01_1"]', b"[" * 100_000, b"[" + b"9" * 5000 + b"]", b'["\\ud800","ant_1"]'],
    ids=range(4),
)
def test_a_line_that_cannot_be_read_is_named(shards, tmp_path, line):
    path = tmp_path / "files.txt"
    path.write_bytes(b'["ant_0","ant_1"]\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"files\.txt: line 2: "):
        read_groups(path, read_index(shards), 2)
