"""The CSV file survives restarts; W&B's place and mode come from the run and the environment."""

import csv
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric import Fabric

from lit_transdiff.cli import pipeline
from lit_transdiff.tracking import loggers
from lit_transdiff.tracking.evaluations import log_own_scores
from lit_transdiff.tracking.identity import run_id
from lit_transdiff.tracking.loggers import COLUMNS, MetricsCSV, build_loggers
from lit_transdiff.tracking.wandb_run import WandbRun
from tests.helpers.small import small_run


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_written_at_once_and_appended(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, images_per_step=8).log_metrics({"train/loss": 1.5, "epoch": 0}, step=2)
    MetricsCSV(path, images_per_step=8).log_metrics({"train/loss": 1.25}, step=4)
    assert [(r["step"], r["images_seen"], r["metric"], r["value"]) for r in rows(path)] == [
        ("2", "16", "train/loss", "1.5"),
        ("4", "32", "train/loss", "1.25"),
    ]
    assert tuple(rows(path)[0]) == COLUMNS


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path):
    log = MetricsCSV(tmp_path / "metrics.csv", images_per_step=1)
    for step in (2, 4, 6):
        log.log_metrics({"a": step, "b": step}, step=step)
    log.drop_after(4)
    assert {r["step"] for r in rows(log.path)} == {"2", "4"}


def test_what_is_appended_does_not_continue_a_torn_line(tmp_path: Path):
    """As of scores, which are logged when the run's own start is over."""
    path = tmp_path / "metrics.csv"
    MetricsCSV(path, images_per_step=1).log_metrics({"a": 1.5}, step=2)
    with open(path, "a") as file:
        file.write("4,4,0.3,eval/b,1.")
    MetricsCSV(path, images_per_step=1).log_metrics({"eval/b": 1.25}, step=4)
    assert [(row["metric"], row["value"]) for row in rows(path)] == [("a", "1.5"), ("eval/b", "1.25")]


def test_scores_that_a_stop_kept_out_of_the_file_come_later_and_once(tmp_path: Path):
    run = small_run(tmp_path)
    result = {"scores": {"fid": 3.5, "precision": {"mean": 0.5, "std": 0.1}}}
    path = run.folder / "metrics.csv"
    run.folder.mkdir()
    MetricsCSV(path, run.images_per_step).log_metrics({"eval/fid": 3.5}, 6)  # the stop came here
    for _ in range(2):
        log_own_scores(run, result, new=False)
    found = [(row["metric"], row["value"]) for row in rows(path)]
    assert found == [("eval/fid", "3.5"), ("eval/precision", "0.5"), ("eval/precision_std", "0.1")]


def full(path: Path, *arguments: object, **keywords: object) -> object:
    """``open`` on a full disk: a part of what is written gets there."""
    file = open(path, *arguments, **keywords)  # type: ignore[call-overload] # noqa: SIM115
    write = file.write

    def half(text: str) -> None:
        write(text[: len(text) // 2])
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    file.write = half
    return file


def test_numbers_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    log = MetricsCSV(tmp_path / "metrics.csv", images_per_step=1, despite_full_disk=True)
    log.log_metrics({"a": 0.5}, step=1)
    monkeypatch.setattr(loggers, "open", full, raising=False)
    log.log_metrics({"a": 1.5}, step=2)
    log.log_metrics({"a": 2.5}, step=3)
    assert [row["step"] for row in rows(log.path)] == ["1"] and caplog.text.count("wait in memory") == 1
    strict = MetricsCSV(tmp_path / "metrics.csv", images_per_step=1)
    with pytest.raises(OSError, match="No space left"):
        strict.log_metrics({"a": 9.0}, step=9)
    monkeypatch.undo()
    log.finalize("success")
    assert [(row["step"], row["value"]) for row in rows(log.path)] == [
        ("1", "0.5"),
        ("2", "1.5"),
        ("3", "2.5"),
    ]
    assert "lost" not in caplog.text


def test_without_wandb_there_is_the_file_alone(tmp_path: Path):
    assert [type(logger) for logger in build_loggers(small_run(tmp_path))] == [MetricsCSV]


@pytest.mark.parametrize("mode", [None, "offline"])
def test_wandb_is_offline_without_a_key_and_stays_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    run = small_run(tmp_path, tracking={"wandb": True, "project": "p", "group": "g", "tags": ["t"]})
    logger = WandbRun(run)
    experiment = logger.experiment
    assert (experiment.group, experiment.job_type, experiment.name) == ("g", "ar_pretrain", "small")
    assert experiment.config["optimizer"]["lr"] == 1e-3
    assert experiment.offline
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.finish()
    assert list((run.folder / "wandb").glob("offline-run-*/*.wandb"))


def test_a_run_folder_keeps_its_wandb_id(tmp_path: Path):
    assert run_id(tmp_path) == run_id(tmp_path)


@pytest.mark.parametrize("mode", ["", "onlin"])
def test_a_mode_that_wandb_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ValueError, match=f"WANDB_MODE: got '{mode}'; allowed: online, offline, disabled"):
        build_loggers(small_run(tmp_path, tracking={"wandb": True}))


@pytest.mark.parametrize("mode", ["", "onlin"])
def test_such_a_mode_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(pipeline, "evaluate", lambda *arguments, **options: pytest.fail("scored"))
    run = small_run(tmp_path, tracking={"wandb": True})
    generator: Any = SimpleNamespace(checkpoint=str(tmp_path))
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match="WANDB_MODE"):
        pipeline.score_own(run, generator, fabric)
    with pytest.raises(ValueError, match="WANDB_MODE"):
        pipeline.score_checkpoint(generator, run, None, fabric)
