"""Classes as they are found: their order, those without images, images of two
classes, names that look alike.
"""

import shutil

import numpy as np
import pytest
from PIL import Image

from lit_transdiff.config.paths import parse_names
from lit_transdiff.data.findings import notes_on_names
from lit_transdiff.data.pack import pack
from lit_transdiff.data.verify import index_again


def write(folder, names, each=1, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_folders_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    write(tmp_path / "in", [str(c) for c in range(12)])
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert report.index.class_names == tuple(map(str, range(12))) and not report.notes
    labels = {
        key.decode(): label for key, label in zip(report.index.key, report.index.label.tolist(), strict=True)
    }
    assert labels["2_0"] == 2 and labels["10_0"] == 10


def test_numbers_with_gaps_are_told(tmp_path):
    write(tmp_path / "in", ["0", "1", "2", "10", "11"])
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert report.index.class_names == ("0", "1", "2", "10", "11")
    assert "numbers are not their names: class 3 is '10', class 4 is '11'" in str(report)


def test_words_stay_in_the_order_of_text_which_is_told_where_numbers_differ(tmp_path):
    write(tmp_path / "in", ["class_1", "class_2", "class_10"])
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert report.index.class_names == ("class_1", "class_10", "class_2")
    assert "order of text, not of the numbers in their names: 'class_10' has the place of 'class_2'" in str(
        report
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["n01440764", "n01443537", "n15075141"], ""),
        (["00", "01", "02"], ""),
        (["a b", "a1", "b2"], ""),
        (["1", "2", "3"], "class 0 is '1'"),
        (["v1.10", "v1.9"], "'v1.10' has the place of 'v1.9'"),
        (["Cat", "cat", "dog"], "upper and lower case alone: Cat, cat"),
    ],
)
def test_what_is_said_of_names(names, said):
    notes = " ".join(notes_on_names(names))
    assert said in notes and bool(notes) == bool(said)


def test_an_image_of_two_classes_is_named(tmp_path):
    source = write(tmp_path / "in", ["ant", "bee", "cat"], each=3)
    (source / "bee/copy.png").write_bytes((source / "ant/1.png").read_bytes())
    # twice in one class: nothing to tell
    (source / "cat/again.png").write_bytes((source / "cat/0.png").read_bytes())
    report = pack(source, tmp_path / "out", progress=False)
    assert f"1 images are in more than one class: {source}/" in str(report)
    (note,) = report.notes
    assert f"{source}/ant/1.png" in note and f"{source}/bee/copy.png" in note and "again" not in note
    assert str(pack(source, tmp_path / "out", progress=False)) == str(report)


def test_a_class_without_images_is_named_and_keeps_its_number(tmp_path):
    source = write(tmp_path / "in", ["ant", "cat"])
    (source / "bee").mkdir()
    (source / "bee/notes.txt").touch()
    (source / "dog").mkdir()
    (source / "dog/broken.png").write_bytes(b"broken")
    (source / ".cache").mkdir()
    report = pack(source, tmp_path / "out", progress=False)
    assert report.index.class_names == (
        "ant",
        "bee",
        "cat",
        "dog",
    ) and report.index.class_counts.tolist() == [1, 0, 1, 0]
    assert report.notes == ["2 classes have no images: 1 ('bee'), 3 ('dog')"]
    assert "passed over: .txt (1), hidden folders (1)" in str(report)


def test_folders_that_are_one_level_too_deep_are_refused(tmp_path):
    write(tmp_path / "in/train", ["ant", "bee"])
    with pytest.raises(
        ValueError, match=r"in/train: got 'no images, but folders \(2\)'.*or pack .*in/train itself"
    ):
        pack(tmp_path / "in", tmp_path / "out", progress=False)


def test_names_are_a_list_or_a_file_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert parse_names(None) is None
    assert parse_names("cat,dog") == ["cat", "dog"] and parse_names("cat") == ["cat"]
    for given in ("~/names.txt", "$HOME/names.txt", f"{tmp_path}/names.txt"):
        assert parse_names(given) == tmp_path / "names.txt"
    for missing in ("nmes.txt", "~/nmes.txt", "lists/names"):  # not the one class of that name
        with pytest.raises(ValueError, match="files: got '--class-names: "):
            parse_names(missing)


def test_an_index_takes_names_from_a_file(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "names.txt").write_text("a\n\nb\nc d\ne\nf\n")
    assert index_again(tmp_path / "shards", tmp_path / "names.txt").class_names == ("a", "b", "c d", "e", "f")


def test_negative_numbers_are_told():
    assert list(notes_on_names(["-1", "0", "1"])) == [
        "classes are numbered from 0 without gaps, so that their numbers are not their names: class 0 is "
        "'-1', class 1 is '0', "
        "class 2 is '1'"
    ]
