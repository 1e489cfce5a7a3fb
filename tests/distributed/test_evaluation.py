"""Evaluation over processes: killed and continued, one process or two, the same bits."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from lit_transdiff.config.loading import save_yaml
from lit_transdiff.evaluation.evaluate import evaluate
from tests.helpers.forks import PROGRAM, run_forked
from tests.helpers.judge import SAMPLING, tiny_files, tiny_generator, tiny_settings
from tests.helpers.scoring_ranks import SETTINGS, two_ranks
from tests.helpers.small import FASHION, NO_DROPOUT, STEADY, small_run


def test_killed_in_the_middle_and_continued_by_two_processes_as_one_uninterrupted(tmp_path: Path) -> None:
    """Scores, images and picture, bit for bit; the second start draws only what the first had not."""
    files, halved, whole = tiny_files(tmp_path), tmp_path / "halved", tmp_path / "whole"
    processes = two_ranks(files, halved, pause=0.4)
    try:
        deadline = time.monotonic() + 120
        while len(list(halved.glob("evaluations/*/[0-9]*.npz"))) < 4:
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not list(halved.glob("evaluations/*.json"))
    done = len(list(halved.glob("evaluations/*/[0-9]*.npz")))
    assert 4 <= done < 11

    processes = two_ranks(files, halved, pause=0)
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    (first, result), (second, of_other_rank) = (
        json.loads((halved / f"rank{r}.json").read_text()) for r in range(2)
    )
    assert first + second == 11 - done and result == of_other_rank
    alone = evaluate(
        tiny_generator(), tiny_settings(files, **SETTINGS), SAMPLING, output=whole, save_images="both"
    )
    assert result["scores"] == alone["scores"]
    assert result["manifest"]["num_ranks"] == 2 and alone["manifest"]["num_ranks"] == 1
    mine, theirs = (
        {p.relative_to(f): p for p in f.glob("evaluations/**/*") if p.is_file()} for f in (halved, whole)
    )
    # the images, the scores, the picture, the .npz
    assert mine.keys() == theirs.keys() and len(mine) == 43 + 3
    for name in mine:
        assert name.suffix == ".json" or mine[name].read_bytes() == theirs[name].read_bytes(), name


@pytest.mark.slow
def test_two_processes_score_while_they_train_as_one_does(tmp_path: Path) -> None:
    evaluation = {
        "every": 3,
        "online_images": 50,
        "batch_size": 16,
        "extractor": "classifier",
        "num_images": 50,
    }
    evaluation |= {
        "extractor_weights": str(FASHION / "classifier.safetensors"),
        "metrics": ["class_accuracy", "inception_score"],
    }
    for processes in (1, 2):
        run = small_run(
            tmp_path, name=f"on-{processes}", model=NO_DROPOUT, evaluation=evaluation, optimizer=STEADY
        )
        save_yaml(run, tmp_path / "run.yaml")
        run_forked(processes, PROGRAM, "train", str(tmp_path / "run.yaml"))

    def scores(folder: Path) -> list[float]:
        with open(folder / "metrics.csv", newline="") as file:
            return [
                float(row["value"]) for row in csv.DictReader(file) if row["metric"].startswith("online/")
            ]

    one, two = scores(tmp_path / "on-1"), scores(tmp_path / "on-2")
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-3)
