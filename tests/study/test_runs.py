"""One call for runs: folders, archives, offline logs and W&B give the same, and what is damaged takes nothing
else with it.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from PIL import Image

from lit_transdiff.checkpoints.run_folder import open_folder
from lit_transdiff.study import folders, wandb_logs
from lit_transdiff.study.runs import archive, runs
from lit_transdiff.study.wandb_logs import log_files, read_log
from lit_transdiff.tracking.loggers import MetricsCSV
from lit_transdiff.tracking.metrics_file import COLUMNS, read_rows
from lit_transdiff.tracking.wandb_run import STEP, WandbRun
from tests.helpers.run_folders import OLD_COLUMNS, color, make_run, write_long
from tests.helpers.small import small_run
from tests.helpers.wandb_stub import Stub


def test_a_folder_of_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "b", 3.0, lr=0.1)
    make_run(tmp_path / "deep" / "er", "a", 2.0)
    found = runs(tmp_path)
    assert [run.name for run in found] == ["a", "b"]
    run = found[0]
    assert (run.stage, run.group, run.tags, run.config["optimizer"]["lr"]) == (
        "ar_pretrain",
        "g",
        ["a"],
        1e-3,
    )
    history = run.history()
    assert list(history["step"]) == [2, 4, 6] and list(history["images_seen"]) == [16, 32, 48]
    assert (
        list(history["train/loss"]) == [1.0, 0.5, pytest.approx(1 / 3)]
        and history["device_hours"].is_monotonic_increasing
    )
    assert list(run.history(["val/loss"])["step"]) == [6]
    assert (run.summary["train/loss"], run.summary["val/loss"]) == (pytest.approx(1 / 3), 2.0)
    assert list(run.samples()) == [2, 6] and list(run.pictures()) == ["final"]
    assert run.samples()[6].getpixel((0, 0)) == (color("samples/step-00000006.png"), 0, 0)
    (evaluation,) = run.evaluations
    assert evaluation.value("frechet_distance") == 2.0 and evaluation.value("inception_score") == 2.0
    assert [r.name for r in runs(tmp_path, {"config.optimizer.lr": 0.1})] == ["b"]
    assert [r.name for r in runs(tmp_path, {"summary.val/loss": lambda v: v < 2.5, "group": ["g", "h"]})] == [
        "a"
    ]
    assert runs(tmp_path, {"tags": "z"}) == []
    with pytest.raises(FileNotFoundError, match="contains no run"):
        runs(make_empty(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder, and no project"):
        runs("./nowhere")


def make_empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_an_archive_holds_what_is_read(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "a", 2.0)
    (tmp_path / "runs" / "a" / "export" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "runs" / "trials.jsonl").write_text("{}")
    packed = archive(tmp_path / "runs", tmp_path / "runs.zip")
    assert "trials.jsonl" in zipfile.ZipFile(packed).namelist()
    (one,), (other,) = runs(tmp_path / "runs"), runs(packed)
    pd.testing.assert_frame_equal(one.history(), other.history())
    assert (one.config, one.summary, list(one.samples())) == (
        other.config,
        other.summary,
        list(other.samples()),
    )
    assert one.evaluations[0].scores == other.evaluations[0].scores
    assert not list(Path(other.where).rglob("*.safetensors"))


SHIPPED = sorted(
    file for folder in ("experiments/studies", "notebooks") for file in Path(folder).glob("*.zip")
)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_results_are_undamaged(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert runs(file) and not caplog.records


def test_time_adds_up_over_restarts(tmp_path: Path) -> None:
    file = make_run(tmp_path, "a", 1.0) / "metrics.csv"
    with open(file, "w", newline="") as out:
        # a restart after 2
        rows = [(1, 8, 1800, "x", 5), (2, 16, 3600, "x", 4), (3, 24, 900, "x", 3), (4, 32, 1800, "x", 2)]
        csv.writer(out).writerows([OLD_COLUMNS, *rows])
    (run,) = runs(tmp_path)
    assert list(run.history()["device_hours"]) == [0.5, 1.0, 1.25, 1.5]


def starts(folder: Path, *devices: int) -> None:
    (folder / "environment.json").write_text(json.dumps([{"num_processes": count} for count in devices]))


def test_device_hours_are_summed_over_starts_of_other_sizes(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", 1.0)
    starts(folder, 64, 8)
    (folder / "metrics.csv").write_text(
        "step,images_seen,seconds,metric,value\n1,8,3600,x,1\n2,16,7200,x,1\n3,24,3600,x,1\n"
    )
    (run,) = runs(tmp_path)  # as earlier versions wrote it
    assert list(run.history()["device_hours"]) == [64, 128, 136]
    (folder / "metrics.csv").unlink()
    for i, devices in enumerate([(2,), (2, 4), (2, 4, 8)]):
        starts(folder, *devices)
        if i != 1:  # the second start ends before it logs anything
            log = MetricsCSV(folder / "metrics.csv", 8)
            log.start -= 3600 * (1 + i)  # so long ago: the third start's clock is ahead of the first's
            log.log_metrics({"x": 1.0}, 1 + i)
    (run,) = runs(tmp_path)
    assert list(run.history()["device_hours"]) == pytest.approx([2, 2 + 3 * 8], rel=1e-4)


def test_a_file_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    file = make_run(tmp_path, "a", 1.0) / "metrics.csv"
    file.write_text(",".join(OLD_COLUMNS) + "\n1,8,1,x,1\n")
    MetricsCSV(file, 8).log_metrics({"x": 2.0}, 2)
    (run,) = runs(tmp_path)
    assert list(run.history()["x"]) == [1.0, 2.0]


def test_a_loss_that_is_not_finite_stays_the_last(tmp_path: Path) -> None:
    MetricsCSV(make_run(tmp_path, "a", 0.5) / "metrics.csv", 8).log_metrics({"val/loss": math.nan}, 8)
    make_run(tmp_path, "b", 1.0)
    diverged, good = runs(tmp_path)
    assert math.isnan(diverged.summary["val/loss"]) and diverged.diverged and not good.diverged


def test_metrics_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "a", 1.0)
    read: list[Path] = []
    monkeypatch.setattr(folders, "read_rows", lambda file: read.append(file) or read_rows(file))
    (run,) = runs(tmp_path, {"group": "g"})
    assert read == []
    assert run.summary["val/loss"] == 1.0 and len(run.history()) == 3 and run.step == 6 and len(read) == 1


def test_a_line_that_was_changed_or_added_by_hand_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make_run(tmp_path, "a", 1.0) / "metrics.csv"
    read_rows(file)
    assert not caplog.text
    names, *lines = file.read_text().splitlines()
    assert names == ",".join(COLUMNS) and [line.split(",")[3] for line in lines[:3]] == ["train/loss"] * 3
    changed = lines[1].replace("0.25", "0.125")
    unsealed = changed.rpartition(",")[0]
    for line, loss, said in (
        (
            changed,
            [0.5, 1 / 6],
            "damaged or changed, and left out: line 3. If you changed one, empty its checksum.",
        ),
        (f"{unsealed},", [0.5, 0.125, 1 / 6], "without a checksum, but counted: line 3."),
        (unsealed, [0.5, 0.125, 1 / 6], "without a checksum, but counted: line 3."),
        # a quotation mark takes no other line with it
        (changed.replace("4", '"', 1), [0.5, 1 / 6], "left out: line 3."),
        ("\0" * 200_000, [0.5, 1 / 6], "left out: line 3."),
        (f'{unsealed}\n"', [0.5, 0.125, 1 / 6], "left out: line 4."),
    ):
        file.write_text("\n".join([names, lines[0], line, *lines[2:]]) + "\n")
        caplog.clear()
        found = read_rows(file)
        assert (
            found["value"][found["metric"] == "train/loss"].tolist() == pytest.approx(loss)
            and said in caplog.text
        ), line
    file.write_text("\n".join([f"{names},note", *(f"{line},mine" for line in lines)]) + "\n")
    caplog.clear()
    assert len(read_rows(file)) == len(lines) and "has columns that are not read: 'note'" in caplog.text
    assert "left out" not in caplog.text
    assert pd.read_csv(file)["checksum"].dtype == "int64"


def test_what_was_added_by_hand_is_there_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv", 8)
    for step in (2, 4, 6):
        log.log_metrics({'a "b", c': step / 3}, step)
    text = log.path.read_text().replace("2,16,", "2,17,")
    log.path.write_text(f"{text}3,24,0,mine,1.5\n")
    log.drop_after(4)
    log.log_metrics({"x": 0.1}, 6)
    found = read_rows(log.path)
    assert list(zip(found["step"], found["metric"], found["value"], strict=True)) == [
        *((4, 'a "b", c', 4 / 3), (3, "mine", 1.5), (6, "x", 0.1))
    ]
    assert "left out: line 2." in caplog.text and "but counted: line 4." in caplog.text
    log.path.write_text(log.path.read_text().replace("2,17,", "2,16,"))
    assert len(read_rows(log.path)) == 4


def test_links_and_loops_add_no_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "b", 1.0)
    (tmp_path / "runs" / "a").symlink_to("b")
    (tmp_path / "runs" / "loop").symlink_to(".")
    (tmp_path / "runs" / "up").symlink_to("..")
    assert [Path(run.where).name for run in runs(tmp_path / "runs")] == ["b"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "elsewhere").symlink_to("../runs/b")
    assert len(runs(tmp_path / "linked")) == 1


@pytest.mark.parametrize(
    "file, content, lost",
    [
        ("metrics.csv", "", "metrics"),
        (
            "metrics.csv",
            "step,images_seen,seconds,metric,value\n2,16,0.1,train/loss,1\n4,32,0.3,tra",
            "a line",
        ),
        (
            "metrics.csv",
            "step,images_seen,seconds,metric,value\n2,16,.1,train/loss,1\n4,32,.3,tra6,48,1.0,train/loss,2\n",
            "a line",
        ),
        ("config.yaml", "", "the run"),
        ("config.yaml", "a: [", "the run"),
        ("evaluations/r.json", '{"scores": {', "evaluation"),
        ("evaluations/r.json", "[]", "evaluation"),
        ("environment.json", "[{", ""),
        ("export/export.json", "{", ""),
        ("samples/step-00000006.png", "", "step"),
        ("samples/step-00000006 (copy).png", "", ""),
        ("samples/final/grid.png", "no picture", "final"),
    ],
)
def test_a_damaged_file_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, content: str, lost: str
) -> None:
    make_run(tmp_path, "a", 1.0)
    folder = make_run(tmp_path, "b", 2.0)
    (folder / file).write_text(content)
    found = runs(tmp_path)
    assert [run.name for run in found] == (["a"] if lost == "the run" else ["a", "b"])
    run = found[-1]
    steps = {"metrics": [], "a line": [2]}.get(lost, [2, 4, 6])
    assert list(run.history()["step"]) == steps and len(run.evaluations) == (lost != "evaluation")
    assert list(run.samples()) == ([2] if lost == "step" else [2, 6]) and list(run.pictures()) == [
        "final"
    ] * (lost != "final")
    assert str(folder / file) in caplog.text
    assert archive(tmp_path, tmp_path / "all.zip").is_file()


@pytest.mark.parametrize(
    "damage", [{"reference_guidance": 0.5}, {"guidance_scale": "2"}, {"guidance_interval": ["0", "1"]}]
)
def test_a_result_whose_sampler_has_no_numbers_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: dict[str, Any]
) -> None:
    file = make_run(tmp_path, "a", 1.0) / "evaluations" / "r.json"
    content = json.loads(file.read_text())
    content["manifest"]["sampling"] |= damage
    file.write_text(json.dumps(content))
    assert [len(run.evaluations) for run in runs(tmp_path)] == [0]
    assert f"{file} is not a result of evaluate and is left out" in caplog.text


def test_filters_say_what_they_take(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 2.0)
    found = [
        len(runs(tmp_path, {"tags": tags})) for tags in ("a", ["a", "b"], ["b"], lambda tags: tags == ["a"])
    ]
    assert found == [1, 1, 0, 1]
    for key in ("lr", "config", "history", "optimizer.lr"):
        with pytest.raises(
            ValueError, match=f"filters: '{key}' is not known; allowed: id, name.*config.NAME, summary.NAME"
        ):
            runs(tmp_path, {key: 1})


def test_a_folder_that_is_not_there_may_be_a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(timeout: int) -> None:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"runz/fashion is neither a folder nor a project at W&B \(permission"
    ):
        runs("runz/fashion")


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished children, independent of other load on the machine."""
    return sum(os.times()[:4])


def test_ten_thousand_steps_of_a_folder_are_read_in_five_seconds(tmp_path: Path) -> None:
    folder = write_long(tmp_path, 10_000)
    start = cpu_seconds()
    (run,) = runs(folder)
    assert len(run.history()) == 10_000 and cpu_seconds() - start < 5


TRACKED = {"wandb": True, "project": "p", "group": "g", "tags": ["a"]}


def log_some(root: Path, steps: int = 3) -> WandbRun:
    log = WandbRun(small_run(root, tracking=TRACKED))
    for step in range(1, steps + 1):
        log.log_metrics({"train/loss": 1 / step, "eval/frechet_distance": 2.0, "odd": math.nan}, step)
    log.log_picture("samples", Image.new("RGB", (4, 4), (9, 9, 9)), steps)
    log.log_picture("samples/references", Image.new("RGB", (4, 4), (5, 5, 5)), steps)
    log.finish()
    return log


def check_same(run) -> None:
    assert (run.name, run.stage, run.group, run.tags, run.state) == (
        "small",
        "ar_pretrain",
        "g",
        ["a"],
        "finished",
    )
    assert run.config["optimizer"]["lr"] == 1e-3
    assert list(run.history(["train/loss"])["train/loss"]) == pytest.approx([1, 1 / 2, 1 / 3])
    assert list(run.history()["images_seen"]) == [8, 16, 24]
    assert run.summary["train/loss"] == pytest.approx(1 / 3)
    assert run.evaluations[0].value("frechet_distance") == 2.0
    assert run.samples()[3].getpixel((0, 0)) == (9, 9, 9)
    assert run.pictures()["references"].getpixel((0, 0)) == (5, 5, 5)


def test_an_offline_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    log_some(tmp_path)
    (run,) = runs(tmp_path)
    check_same(run)
    (file,) = tmp_path.rglob("run-*.wandb")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.chmod(0o600)
    file.write_bytes(content)
    assert "is damaged" not in caplog.text
    runs(tmp_path)
    assert f"{file} is damaged: W&B's reader skipped a part" in caplog.text


def test_device_hours_of_wandb_add_up_over_restarts_and_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of a second offline start begins at zero; the run is one of four processes."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    run = small_run(tmp_path, tracking=TRACKED)
    open_folder(run, num_processes=4)
    whole = time.monotonic()
    for steps in ((1, 2), (3, 4)):
        log = WandbRun(run)
        assert log.experiment.offline  # the clock runs
        for step in steps:
            time.sleep(0.5)
            log.log_metrics({"train/loss": 1.0}, step)
        log.finish()
    whole = time.monotonic() - whole
    (offline,) = [read_log(files) for files in log_files(tmp_path)]
    hours = offline.history()["device_hours"]
    assert hours.is_monotonic_increasing
    assert 4 * 2.0 <= hours.iloc[-1] * 3600 <= 4 * whole  # four sleeps of half a second, on four devices
    assert "num_devices" not in offline.config


def test_a_project_at_wandb(stub: Stub, tmp_path: Path) -> None:
    log_some(tmp_path)
    (run,) = runs("team/p")
    check_same(run)
    assert (
        runs("team/p", {"group": "other"}) == [] and len(runs("team/p", {"config.optimizer.lr": 1e-3})) == 1
    )


@pytest.mark.slow
def test_ten_thousand_steps_of_an_offline_log_are_read_in_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    log_some(tmp_path, 10_000)
    start = cpu_seconds()
    (run,) = runs(tmp_path)
    assert len(run.history()) == 10_000 and cpu_seconds() - start < 5


@pytest.mark.slow
def test_ten_thousand_steps_at_wandb_are_read_in_five_seconds(stub: Stub, tmp_path: Path) -> None:
    log_some(tmp_path, 10_000)
    start = cpu_seconds()  # with the time of the server, which is a thread of this process
    (run,) = runs("team/p")
    assert len(run.history()) == 10_000 and cpu_seconds() - start < 5


def test_the_last_start_is_the_one_that_came_furthest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock went back between two starts: the folder of the second has the earlier time."""

    def start(steps: range, loss: float, code: int) -> list[dict[str, Any]]:
        rows = [{"type": "history", "history": {"item": {STEP: step, "train/loss": loss}}} for step in steps]
        return [*rows, {"type": "exit", "exit": {"exit_code": code}}]

    first, second = (tmp_path / f"offline-run-20260101_{hour}0000-a" / "run-a.wandb" for hour in (12, 11))
    starts = {first: start(range(1, 5), 2.0, 1), second: start(range(4, 7), 1.0, 0)}
    for file in starts:
        file.parent.mkdir()
        file.touch()
    monkeypatch.setattr(wandb_logs, "records", starts.__getitem__)
    (files,) = log_files(tmp_path)
    run = read_log(files)
    assert files == [second, first] and run.state == "finished"
    assert run.history()["train/loss"].tolist() == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
