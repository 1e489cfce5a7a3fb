"""One process trains in a run folder, and a run is the same run however its paths are spelled, but not with
other data.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_transdiff.__main__ import main
from lit_transdiff.base import locks
from lit_transdiff.base.files import crc32_of
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.checkpoints.format import TRAINING
from lit_transdiff.checkpoints.run_folder import check_folder, content_checksum, last_checkpoint
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.data.index import read_index
from lit_transdiff.training.trainer import train
from tests.helpers.small import FASHION, small_run


def silent(text: str) -> None:
    pass


def longer(run: RunConfig, **data: object) -> RunConfig:
    """The same run, two steps longer, with other settings of ``data``."""
    training = dataclasses.replace(run.training, max_steps=8)
    return dataclasses.replace(run, training=training, data=dataclasses.replace(run.data, **data))  # type: ignore[arg-type]


# --- the lock
# ------------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_one_that_died_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "LOCK_PATIENCE", 0.3)
    run = small_run(tmp_path)
    save_yaml(run, tmp_path / "run.yaml")
    run.folder.mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); f.write('node7, "
        "pid 5'); f.flush()"
    )
    line = [
        sys.executable,
        "-c",
        code + "; print('held', flush=True); time.sleep(60)",
        str(run.folder / "lock"),
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
        assert f"{run.folder}: another process trains this run (node7, pid 5)." in capsys.readouterr().err
        assert [path.name for path in run.folder.iterdir()] == ["lock"]
        holder.kill()
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert f"pid {os.getpid()}" in (run.folder / "lock").read_text()
    with FolderLock(run.folder) as lock:  # training has freed it
        lock.take()
        lock.take()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with FolderLock(tmp_path / "run") as lock:
        lock.take()
    assert "No locks available" in caplog.text and "is not noticed" in caplog.text


# --- the same run
# ------------------------------------------------------------------------------------------------------------


def test_other_words_for_the_same_paths_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(tmp_path)
    train(run, silent)
    (tmp_path / "link").symlink_to(FASHION)
    monkeypatch.chdir(FASHION.parent)
    for train_data in (f"{FASHION}/train/", "fashion/train", str(tmp_path / "link" / "train")):
        check_folder(longer(run, train=train_data, num_workers=2))
    check_folder(dataclasses.replace(run, output_dir=f"{tmp_path}/"))
    shutil.move(run.folder, tmp_path / "elsewhere")
    check_folder(dataclasses.replace(run, name="elsewhere"))


def test_data_that_were_moved_are_the_same_run_and_other_data_are_not(tmp_path: Path) -> None:
    """Also where nothing is left at the old path: the checkpoint knows what was there."""
    shutil.copytree(FASHION / "train", tmp_path / "train")
    run = small_run(tmp_path, data={"train": str(tmp_path / "train")}, optimizer={"schedule": "constant"})
    train(run, silent)
    shutil.move(tmp_path / "train", tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"other settings \(data\.train: .*evaluation' now\)\. Give this one another name"
    ):
        check_folder(longer(run, train=str(FASHION / "evaluation")))
    said: list[str] = []
    train(longer(run, train=str(tmp_path / "moved")), said.append)
    assert "continuing from" in "".join(said)


def repack(folder: Path) -> None:
    """Another index at the same place."""
    index = read_index(folder)
    first, *others = index.shards
    dataclasses.replace(index, shards=(dataclasses.replace(first, sha256="0" * 64), *others)).save()


def test_data_that_were_packed_again_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FASHION / "train", tmp_path / "train")
    run = small_run(tmp_path, data={"train": str(tmp_path / "train")}, optimizer={"schedule": "constant"})
    train(run, silent)
    before = (run.folder / "environment.json").read_bytes()
    repack(tmp_path / "train")
    with pytest.raises(
        ValueError, match=r"step-00000006 holds a run with other settings \(data\.train: 'content .*' there"
    ):
        train(longer(run), silent)
    assert (run.folder / "environment.json").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"\0" * 100])
def test_settings_are_those_of_the_checkpoint_where_config_yaml_is_lost(
    tmp_path: Path, content: bytes | None
) -> None:
    run = small_run(tmp_path, optimizer={"schedule": "constant"})
    train(run, silent)
    file = run.folder / "config.yaml"
    file.unlink() if content is None else file.write_bytes(content)
    other = dataclasses.replace(longer(run), optimizer=dataclasses.replace(run.optimizer, lr=0.5))
    with pytest.raises(
        ValueError,
        match=r"step-00000006 holds a run with other settings \(optimizer\.lr: 0\.001 there, 0\.5 now",
    ):
        train(other, silent)
    assert train(longer(run), silent).step == 8


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = small_run(tmp_path, optimizer={"schedule": "constant"})
    train(run, silent)
    found = last_checkpoint(run)
    assert found is not None
    training = found.training()
    assert training.pop("inputs").keys() == {"data.train", "data.evaluation"}
    torch.save(training, found.folder / TRAINING)
    manifest = found.manifest | {"crc32": {}}
    manifest["files"][TRAINING] = (found.folder / TRAINING).stat().st_size
    (found.folder / "COMPLETE.json").write_text(json.dumps(manifest))
    assert train(longer(run), silent).step == 8
    assert "is of an earlier version" in caplog.text


def test_what_a_path_leads_to(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    assert content_checksum(str(tmp_path)) == content_checksum(f"{tmp_path}/export/") is not None
    for place in (None, "https://host/{0..9}.tar", f"pipe:cat {'x' * 500}"):
        assert content_checksum(place) is None
    assert content_checksum(str(tmp_path / "nothing")) is None
    assert content_checksum(str(FASHION / "train" / "index.json")) == content_checksum(str(FASHION / "train"))
    assert f"{crc32_of(FASHION / 'train' / 'index.json'):08x}-" in str(
        content_checksum(str(FASHION / "train"))
    )
