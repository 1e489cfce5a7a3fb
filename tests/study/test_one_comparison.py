"""The command's table, Python, the sweep's summary and the page name the same best and give the same verdicts
on one folder.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_transdiff.study.compare import compare
from lit_transdiff.study.runs import runs
from lit_transdiff.study.table import write_comparison
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.report import outcome
from lit_transdiff.sweep.trial import Trial
from tests.helpers.run_folders import evaluate_again, make_run, on_the_page

METRIC = "eval/frechet_distance"
Verdicts = dict[tuple[str, int], str]  # by the run and its number of solver steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of three learning rates, repeats of an evaluation, two runs at other steps of the solver, one
    run unfinished.

    The single best number is of a run whose settings are not the best, and so is the best of the run that is
    not finished.
    """
    root = tmp_path / "runs"
    for name, lr, scores in (
        ("slow", 1e-3, (2.0, 2.2)),
        ("fast", 1e-2, (1.8, 2.6)),
        ("bad", 1.0, (9.0, 9.2)),
    ):
        for seed, score in enumerate(scores):
            place = make_run(root, f"{name}{seed}", score, seed=seed, lr=lr)
            if name == "slow":
                evaluate_again(place, score + 0.02, "2027", seed=1)  # its run's value is the mean of both
                evaluate_again(place, score - 0.6, "2028", {"num_steps": 7})
    lucky = make_run(root, "lucky", 0.1, lr=0.1)
    (lucky / "export" / "export.json").unlink()
    return root


EXPECTED: Verdicts = {
    **{(f"slow{seed}", 7): "best" for seed in (0, 1)},
    **{(f"slow{seed}", 2): "no difference" for seed in (0, 1)},
    **{(f"fast{seed}", 2): "no difference" for seed in (0, 1)},
    **{(f"bad{seed}", 2): "worse" for seed in (0, 1)},
    ("lucky", 2): "",
}


def test_in_python(folder: Path) -> None:
    made = compare(runs(folder))
    words = made.verdict_of_rows(METRIC)
    assert {
        (e.run.name, e.settings["sampling.num_steps"]): word
        for e, word in zip(made.entries, words, strict=True)
    } == EXPECTED
    assert made.verdicts(METRIC)["verdict"].value_counts().to_dict() == {
        "best": 1,
        "no difference": 2,
        "worse": 1,
        "no finished run": 1,
    }
    assert "1.5 ± 0.14, best" in str(made) and "lucky is not averaged: unfinished" in str(made)


def test_in_the_table_of_the_command(folder: Path, tmp_path: Path) -> None:
    made = write_comparison(folder, tmp_path / "out")
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in made.markdown.read_text().splitlines()
        if "|" in line
    ]
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    shown = {
        (row["run"].split()[0], row["sampler, steps x guidance"].split()[1]): row["Frechet distance ↓"]
        for row in rows
    }
    assert shown == {
        ("slow0", "7"): "**1.5 ± 0.14 (n=2)**",
        ("slow0", "2"): "2.11 ± 0.14 (n=2) ≈",
        ("fast0", "2"): "2.2 ± 0.57 (n=2) ≈",
        ("bad0", "2"): "9.1 ± 0.14 (n=2)",
        ("lucky", "2"): "0.1",
    }
    assert "lucky is not averaged: unfinished" in made.text and "≈ no difference from the best" in made.text


def test_on_the_page(folder: Path) -> None:
    found: Verdicts = {}
    for run in on_the_page(runs(folder)):
        for evaluation, verdicts in zip(run["evaluations"], run["of_evaluations"], strict=True):
            found[run["name"], evaluation["manifest"]["sampling"]["num_steps"]] = verdicts.get(METRIC, "")
        assert run["verdicts"][METRIC] == EXPECTED[run["name"], 2]
    assert found == EXPECTED


def test_in_the_summary_of_a_sweep(folder: Path) -> None:
    sweep = Sweep("s", "grid", {}, metric=METRIC)
    text = outcome(sweep, [Trial("a", {}, "finished")], folder)
    found = re.findall(r"(slow\d|fast\d|bad\d|lucky) .*?(best|no difference|worse|$)", text, re.MULTILINE)
    assert [word for _, word in found if word] == ["best"] * 2 + ["no difference"] * 4 + ["worse"] * 2
    assert [name[:-1] for name, word in found if word] == ["slow"] * 4 + ["fast"] * 2 + ["bad"] * 2


def test_equal_results_have_no_best(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        make_run(tmp_path, name, 2.0, lr=lr)
    assert list(compare(runs(tmp_path)).verdicts(METRIC)["verdict"]) == ["equal", "equal"]
    assert "**2**" not in write_comparison(tmp_path, tmp_path / "out").markdown.read_text()
