"""Nothing is written outside of a folder, and nothing is replaced or removed that
this program did not write.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_transdiff.base.files import remove
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.checkpoints.export import check_export_folder, read_info, write_export
from lit_transdiff.checkpoints.format import WRITTEN, complete_checkpoints, prune
from lit_transdiff.checkpoints.run_folder import check_folder
from lit_transdiff.config import CheckpointConfig, RunConfig
from lit_transdiff.config.targets import (
    below,
    check_replaces,
    check_replaces_json,
    fresh_folder,
    put_files,
    remove_written,
    save_tensors,
)
from lit_transdiff.data.index_files import check_free
from lit_transdiff.data.journal import ShardJournal
from lit_transdiff.evaluation.statistics import Statistics, save_statistics
from lit_transdiff.released.convert import convert
from lit_transdiff.study import table
from lit_transdiff.study.report import PAGE_SIGNS
from lit_transdiff.study.runs import unpacked

INFO = {"autoencoder": "0123", "class_names": ["a"], "step": 1}


def export_to(folder: Path, value: float = 0.0, own: bool = False) -> None:
    weights = {"w": torch.full((2,), value)}
    write_export(
        folder, RunConfig(), INFO, lambda made: save_tensors(weights, made / "model.safetensors"), own=own
    )


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a/..", "out/a", "a\0b", None, 3]
)
def test_a_name_from_a_file_stays_below_its_root(tmp_path: Path, name: object):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json: got "):
        below(tmp_path / "root", name, "index.json")


@pytest.mark.parametrize("name", ["a.tar", "a/b.tar", "a/../b", "..a", "link.tar", "in/b"])
def test_a_name_that_stays_is_taken(tmp_path: Path, name: str):
    (tmp_path / "a").mkdir()
    (tmp_path / "link.tar").symlink_to("/dev/null")  # of a shard on another disk
    (tmp_path / "in").symlink_to(tmp_path / "a")
    (tmp_path.parent / "way").symlink_to(tmp_path) if not (tmp_path.parent / "way").is_symlink() else None
    assert below(tmp_path, name, "x") == tmp_path / name


@pytest.mark.parametrize("what", ["folder", "file", "json", "run", "checkpoint"])
def test_an_export_goes_over_nothing_else(tmp_path: Path, what: str):
    target = tmp_path / "thesis"
    if what == "file":
        target.write_text("years of work")
    else:
        names = {
            "folder": "chapter.txt",
            "json": "export.json",
            "run": "config.yaml",
            "checkpoint": "COMPLETE.json",
        }
        (target / "figures").mkdir(parents=True)
        (target / names[what]).write_text('{"files": ["figures"]}')
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="thesis"):
        export_to(target)
    assert everything(tmp_path) == before and os.listdir(tmp_path) == ["thesis"]


def test_an_export_replaces_an_earlier_one_and_leaves_the_rest(tmp_path: Path):
    for target in (tmp_path / "new", tmp_path / "empty", tmp_path / "link"):
        if target.name == "empty":
            target.mkdir()
        if target.name == "link":
            target.symlink_to(tmp_path / "elsewhere")
        export_to(target)
        (target / "notes.txt").write_text("mine")
        (target / "samples").mkdir()
        old = everything(target)
        export_to(target, 1.0)
        now = everything(target)
        changed = {name for name in now if now[name] != old.get(name)}
        assert (
            changed == {"model.safetensors", "export.json"}
            and set(now) == set(old)
            and (target / "samples").is_dir()
        )
    assert (
        sorted(os.listdir(tmp_path)) == ["elsewhere", "empty", "link", "new"]
        and (tmp_path / "link").is_symlink()
    )


def test_an_export_of_an_earlier_version_is_replaced_and_a_file_of_others_in_its_way_is_not(tmp_path: Path):
    export_to(tmp_path / "old")
    (tmp_path / "old" / "export.json").write_text(json.dumps(INFO))
    export_to(tmp_path / "old", 1.0)
    info = json.loads((tmp_path / "old" / "export.json").read_text())
    del info["checksum"]  # of the whole content, which changes
    (tmp_path / "old" / "export.json").write_text(
        json.dumps({**info, "files": ["config.yaml", "export.json"]})
    )
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors, which an earlier export did not write"):
        export_to(tmp_path / "old", 2.0)
    assert everything(tmp_path) == before


def test_an_export_that_breaks_off_is_no_export_and_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export_to(tmp_path / "one")
    real = os.replace

    def breaks(source: Path, dest: Path) -> None:
        if Path(dest).name == "model.safetensors":
            raise KeyboardInterrupt
        real(source, dest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", breaks)
        with pytest.raises(KeyboardInterrupt):
            export_to(tmp_path / "one", 1.0)
    with pytest.raises(ValueError, match="export again"):
        read_info(tmp_path / "one" / "export.json")
    export_to(tmp_path / "one", 1.0)
    assert read_info(tmp_path / "one" / "export.json")["step"] == 1
    assert sorted(os.listdir(tmp_path / "one")) == ["config.yaml", "export.json", "model.safetensors"]


def test_what_a_run_keeps_is_no_place_for_an_export(tmp_path: Path):
    run = tmp_path / "one"
    export_to(run / "export")
    (run / "config.yaml").write_text("")
    (run / "checkpoints").mkdir()
    for place in (run, tmp_path, run / "export", run / "checkpoints", run / "checkpoints" / "step-00000002"):
        with pytest.raises(ValueError, match=r"output|which an export did not write"):
            check_export_folder(place, run)
    for place in (run / "export-00000002", tmp_path / "new" / "deep"):
        check_export_folder(place, run)


def test_files_of_others_stay_where_ours_are_removed(tmp_path: Path):
    for name in ("rank-00000.safetensors", "rank-00000.crc32", "training.pt", "COMPLETE.json", "notes.txt"):
        (tmp_path / "step-00000001" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "step-00000001" / name).write_text("")
    remove_written(tmp_path / "step-00000001", WRITTEN)
    assert os.listdir(tmp_path / "step-00000001") == ["notes.txt"]
    for step in (2, 3):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "training.pt").write_bytes(b"1")
        manifest = {"step": step, "shapes": {}, "files": {"training.pt": 1}}
        (folder / "COMPLETE.json").write_text(json.dumps(manifest))
        (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        prune(tmp_path, CheckpointConfig())
        assert [c.step for c in complete_checkpoints(tmp_path)] == [3]
        assert os.listdir(tmp_path / "step-00000002.removed") == ["notes.txt"]


def test_a_checkpoint_whose_files_lie_elsewhere_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "secret").write_text("1")
    manifest = {"step": 1, "shapes": {}, "files": {"../secret": 1}}
    (tmp_path / "step-00000001" / "COMPLETE.json").write_text(json.dumps(manifest))
    assert complete_checkpoints(tmp_path) == [] and "'../secret'" in caplog.text


def test_samples_go_into_a_fresh_folder(tmp_path: Path):
    made = []
    for _ in range(3):
        made.append(fresh_folder(tmp_path / "drawn"))
        (made[-1] / "grid.png").write_text("")
    assert [folder.name for folder in made] == ["drawn", "drawn-2", "drawn-3"]
    with pytest.raises(ValueError, match=r"output: got '.*grid\.png'"):
        fresh_folder(made[0] / "grid.png")


def test_shards_are_made_in_a_folder_of_their_own(tmp_path: Path):
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds finished"):
        ShardJournal(tmp_path, "packing.json").check({})
    shards = ShardJournal(tmp_path / "new", "packing.json")
    shards.check({})
    shards.begin({})
    (tmp_path / "new" / "movie.partial-1").write_text("mine")
    (tmp_path / "new" / "finished" / "notes.txt").write_text("mine")
    shards.begin({})
    shards.close()
    assert sorted(everything(tmp_path / "new")) == ["finished/notes.txt", "movie.partial-1", "packing.json"]


@pytest.mark.parametrize("name", ["environment.json", "metrics.csv", "export"])
def test_a_run_does_not_begin_in_a_folder_of_others(tmp_path: Path, name: str):
    run = RunConfig(output_dir=str(tmp_path), name="one")
    run.folder.mkdir()
    (run.folder / "slurm-1.out").write_text("")
    check_folder(run)
    (run.folder / name).write_text("mine")
    with pytest.raises(ValueError, match=f"one holds {name}, which a run did not write"):
        check_folder(run)
    (run.folder / "lock").write_text("a key")
    with pytest.raises(ValueError, match="lock"), FolderLock(run.folder) as lock:
        lock.take()
    assert (run.folder / "lock").read_text() == "a key"


def test_files_of_results_replace_their_own_kind_only(tmp_path: Path):
    for file, signs in ((tmp_path / "notes.html", PAGE_SIGNS), (tmp_path / "a", ["x"])):
        check_replaces(file, signs, "a report")
        file.write_text("mine")
        with pytest.raises(ValueError, match=f"{file.name}'; allowed: a name that is free, or of a report"):
            check_replaces(file, signs, "a report")
        file.write_text(f"<html>{signs[0]}")
        check_replaces(file, signs, "a report")
    (tmp_path / "comparison.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"comparison\.md"):
        table.check_output(tmp_path)


def test_an_index_of_another_program_stays(tmp_path: Path):
    file, sign = tmp_path / "index.json", ("format", "lit_transdiff shards")
    for content in (
        "",
        "\0\0",
        "{}",
        '{"format": "lit_transdiff shards"}',
        '{"format": "lit_transdiff shards", "shar',
    ):
        file.write_text(content)
        check_replaces_json(file, *sign)
    for content in ('{"weight_map": {}}', '[{"text": "a"}]', '{"text": "a"}\n{"text": "b"}\n', "my notes"):
        file.write_text(content)
        with pytest.raises(ValueError, match="another program"):
            check_replaces_json(file, *sign)


def test_a_sidecar_of_another_program_stays(tmp_path: Path):
    file = tmp_path / "index.npz"
    np.savez(file, offset=np.zeros(1, np.int64))  # of an index whose index.json was removed
    check_free(tmp_path)
    for arrays in ({"arr_0": np.zeros(3)}, {"keys": np.zeros(3)}):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=r"index\.npz'; allowed: a name that is free, or of an index"):
            check_free(tmp_path)


def test_statistics_replace_no_other_file(tmp_path: Path):
    statistics = Statistics(np.zeros(2), np.eye(2), num_images=2)
    file = tmp_path / "images.npz"
    for arrays in (
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
        {"about": np.array("of mine"), "x": np.zeros(2)},
    ):
        np.savez(file, **arrays)
        before = file.read_bytes()
        with pytest.raises(ValueError, match=r"images\.npz"):
            save_statistics(statistics, file)
        assert file.read_bytes() == before
    for _ in range(2):
        save_statistics(statistics, tmp_path / "mine.npz")


def test_a_link_to_nothing_is_not_replaced_by_convert(tmp_path: Path):
    (tmp_path / "source.pth").write_text("")
    (tmp_path / "dest").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dest: got"):
        convert(tmp_path / "source.pth", tmp_path / "dest")


def test_an_archive_of_runs_stays_in_its_folder(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        archive.writestr("../../escaped.txt", "x")
    with pytest.raises(ValueError, match=r"runs\.zip: entry: got '\.\./\.\./escaped\.txt'"):
        unpacked(tmp_path / "runs.zip", 0.0)


def test_a_damaged_archive_of_runs_is_named(tmp_path: Path):
    file = tmp_path / "runs.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("one/config.yaml", "name: one\n")
    sound = file.read_bytes()
    for content in (b"no archive", sound[:-30], sound.replace(b"name: one", b"name: two")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"runs\.zip is not a complete zip archive"):
            unpacked(file, 0.0)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_weights_follow_the_umask(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        export_to(tmp_path / "one")
        export_to(tmp_path / "one", 1.0)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "one").iterdir()} == {0o666 & ~mask}


def test_files_are_put_whole_into_a_new_folder(tmp_path: Path):
    (tmp_path / "made" / "raw").mkdir(parents=True)
    (tmp_path / "made" / "raw" / "w").write_text("1")
    put_files(
        tmp_path / "made", tmp_path / "there", [], "w", lambda: pytest.fail("nothing is there to replace")
    )
    assert everything(tmp_path / "there") == {"raw/w": b"1"} and not (tmp_path / "made").exists()


def test_what_a_link_leads_to_stays(tmp_path: Path) -> None:
    """For example a checkpoint of another run from which a run was started."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "COMPLETE.json").write_text("{}")
    (tmp_path / "theirs" / "training.pt").write_text("x")
    for removed in (lambda link: remove_written(link, WRITTEN), remove):
        (tmp_path / "step-00000001").symlink_to(tmp_path / "theirs")
        removed(tmp_path / "step-00000001")
        assert not (tmp_path / "step-00000001").is_symlink()
        assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"COMPLETE.json", "training.pt"}
