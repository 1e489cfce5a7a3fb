"""Packing in several processes, in mid-work killed, continued, and in shards of a given number or size."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lit_transdiff.__main__ import main
from lit_transdiff.base.files import format_bytes
from lit_transdiff.data.encode import Encoding
from lit_transdiff.data.pack import Cut, pack
from lit_transdiff.data.verify import verify
from tests.helpers.small import ROOT


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """420 JPEGs (links to a few) in two synsets, and three that are no images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for synset in ("n01", "n02"):
        (folder / "train" / synset).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (300 + i, 400, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{synset}-{i}.jpg")
        for i in range(210):
            os.link(folder / f"{synset}-{i % 5}.jpg", folder / "train" / synset / f"{synset}_{i}.JPEG")
        for i in (7, 50, 130):
            (folder / "train" / synset / f"{synset}_{i}.JPEG").unlink()
            (folder / "train" / synset / f"{synset}_{i}.JPEG").write_bytes(b"broken")
    return folder / "train"


def start(source: Path, dest: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lit_transdiff", "pack", str(source), str(dest), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found += [child, *children_of(child)]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_and_continued_is_as_uninterrupted(photos, tmp_path):
    options = dict(cut=Cut(shards=30), encoding=Encoding(image_size=64), seed=2)
    line = ["--shards", "30", "--image-size", "64", "--seed", "2", "--workers", "2"]
    whole = pack(photos, tmp_path / "whole/train", **options, progress=False)
    part = tmp_path / "part/train"
    process = start(photos, part, *line)
    wait_until(lambda: len(list(part.glob("finished/*.npz"))) >= 3)
    workers = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not any(is_running(pid) for pid in workers))  # they end with it
    done = {path.name: path.stat().st_mtime_ns for path in part.glob("*.tar")}
    assert 3 <= len(done) < 30 and not (part / "index.json").exists()
    recorded = {path.name.removesuffix(".npz") for path in part.glob("finished/*.npz")}

    with pytest.raises(ValueError, match=r"other settings \(seed was 2, now 3\)"):
        pack(photos, part, **(options | {"seed": 3}), progress=False)
    process = start(photos, part, *line)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"{len(recorded)} of them are there already" in said and "6 unreadable images skipped" in said
    after = {path.name: path.stat().st_mtime_ns for path in part.glob("*.tar")}
    assert all(after[name] == done[name] for name in recorded)  # nothing packed twice
    assert contents(part) == contents(tmp_path / "whole/train")  # nothing lost
    assert len(verify(part)) == 414 == len(set(whole.index.key.tolist()))
    skipped = {line.split("\t")[0] for line in (part / "skipped.txt").read_text().splitlines()}
    assert skipped == {str(photos / s / f"{s}_{i}.JPEG") for s in ("n01", "n02") for i in (7, 50, 130)}


def test_a_shard_that_was_damaged_before_the_end_is_written_again(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_transdiff.data.pack.finish_packing", lambda *_: None)  # killed before the index
    pack(image_folder, tmp_path / "x", cut=Cut(samples_per_shard=20), progress=False)
    monkeypatch.undo()
    (tmp_path / "x/x-000001.tar").write_bytes(b"short")
    (tmp_path / "x/x-000002.tar").unlink()
    pack(image_folder, tmp_path / "x", cut=Cut(samples_per_shard=20), progress=False)
    pack(image_folder, tmp_path / "y", cut=Cut(samples_per_shard=20), name="x", progress=False)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_shards_of_a_given_number_or_size(image_folder, tmp_path):
    by_number = pack(image_folder, tmp_path / "a", cut=Cut(shards=6), progress=False).index
    assert [shard.samples for shard in by_number.shards] == [11] * 5 + [10]
    total = sum(shard.bytes for shard in by_number.shards)
    by_size = pack(image_folder, tmp_path / "b", cut=Cut(shard_size=40_000), progress=False).index
    assert 3 * 40_000 < total < 5 * 40_000 and [shard.samples for shard in by_size.shards] == [17, 16, 16, 16]
    # a tar is filled up to a multiple of 10,240
    assert all(shard.bytes <= 40_960 for shard in by_size.shards)
    with pytest.raises(ValueError, match="shards and shard_size: got"):
        Cut(shards=3, shard_size=5)
    with pytest.raises(ValueError, match="shards: got 66; allowed: at most 65"):
        pack(image_folder, tmp_path / "c", cut=Cut(shards=66), progress=False)


def test_the_size_is_said_and_must_fit_before_anything_is_written(
    image_folder, photos, tmp_path, capfd, monkeypatch
):
    for number in (7, 1):
        report = pack(image_folder, tmp_path / f"a{number}", cut=Cut(shards=number))
        size = format_bytes(sum(shard.bytes for shard in report.index.shards))
        said = capfd.readouterr().out
        assert (
            f"65 of 65 images of 5 classes -> {number} shards in {tmp_path / f'a{number}'}, {size};" in said
        )
    (shard,) = report.index.shards
    report = pack(photos, tmp_path / "b", cut=Cut(shards=1), encoding=Encoding(image_size=64))
    said = capfd.readouterr().out.split("about ")[1].split(" MB")[0]
    assert float(said) * 1e6 == pytest.approx(report.index.shards[0].bytes, rel=0.05)
    monkeypatch.setattr("lit_transdiff.base.files.free_bytes", lambda folder: shard.bytes - 1)
    with pytest.raises(ValueError, match=f"{format_bytes(shard.bytes)} are to be written, but only"):
        pack(image_folder, tmp_path / "c", cut=Cut(shards=1), progress=False)
    assert not (tmp_path / "c").exists()


def test_a_disk_that_fills_up_ends_in_a_line_and_is_continued(image_folder, tmp_path, monkeypatch, capsys):
    """The write that fails, and the closing after it; nothing half-written stays."""
    line = ["pack", str(image_folder), str(tmp_path / "x"), "--samples-per-shard", "20"]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    finished = lambda: (tmp_path / "x/finished/x-000000.tar.npz").exists()  # noqa: E731
    write, close = wds.TarWriter.write, wds.TarWriter.close
    monkeypatch.setattr(wds.TarWriter, "write", lambda *a: full() if finished() else write(*a))
    monkeypatch.setattr(wds.TarWriter, "close", lambda *a: full() if finished() else close(*a))
    assert main(line) == 1
    assert "No space left on device. Make room, and start the same command again." in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "finished",
        "packing.json",
        "x-000000.tar",
    ]
    monkeypatch.undo()
    assert main(line) == 0 and len(verify(tmp_path / "x")) == 65


def test_names_of_classes_from_a_file(image_folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("bee crane\nant\tan ant, or so\nelk crane\ncat a cat\ndog a dog\nfox not here\n")
    index = pack(image_folder, tmp_path / "a", class_names=names, progress=False).index
    assert index.class_names == ("an ant, or so", "crane (bee)", "a cat", "a dog", "crane (elk)")
    names.write_text("one\ntwo and a half\nthree\nfour\nfive\n")
    index = pack(image_folder, tmp_path / "b", class_names=names, progress=False).index
    assert index.class_names[1] == "two and a half"
    names.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="class_names: got 2; allowed: 5 names"):
        pack(image_folder, tmp_path / "c", class_names=names, progress=False)
