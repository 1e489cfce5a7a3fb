"""Runs beside each other: which of them are averaged, which scores compare, and which differences exceed
noise.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_transdiff.study.compare import compare, labels
from lit_transdiff.study.runs import of_group, runs
from lit_transdiff.tracking.loggers import MetricsCSV
from tests.helpers.run_folders import HEAD, evaluate_again, make_run


def test_only_what_differs_and_the_spread_over_seeds(tmp_path: Path) -> None:
    for seed, score in enumerate((2.0, 2.2, 2.4)):
        make_run(tmp_path, f"slow{seed}", score, seed=seed)
        make_run(tmp_path, f"fast{seed}", score + 0.1 + (0.2, -0.1, -0.1)[seed], seed=seed, lr=1e-2)
        make_run(tmp_path, f"bad{seed}", score + 5, seed=seed, lr=1.0)
    made = compare(runs(tmp_path))
    assert made.settings == ["optimizer.lr"] and len(made.table) == 9 and len(made.groups) == 3
    by_lr = made.groups.set_index("optimizer.lr")
    assert by_lr.loc[1e-3, "eval/frechet_distance mean"] == pytest.approx(2.2)
    assert by_lr.loc[1e-3, "eval/frechet_distance std"] == pytest.approx(0.2)
    verdicts = made.verdicts("eval/frechet_distance").set_index("optimizer.lr")["verdict"]
    assert verdicts.to_dict() == {1e-3: "best", 1e-2: "no difference", 1.0: "worse"}
    # higher is better
    assert made.verdicts("eval/precision").set_index("optimizer.lr")["verdict"][1e-3] == "best"
    noise = made.verdicts("eval/frechet_distance")["noise"].iloc[0]
    # What a seed adds to all groups does not count: of the deviations 0.2, -0.1, -0.1 of one of three groups,
    # 2/3 remain in it and -1/3 in each other. q of three groups with 4 degrees of freedom is 5.040.
    rest = (0.04 + 0.01 + 0.01) * (4 / 9 + 2 / 9) / 4
    assert noise == pytest.approx(5.040 * (rest / 3) ** 0.5, rel=1e-3)


def test_groups_of_other_seeds_are_not_paired(tmp_path: Path) -> None:
    for seed, score in enumerate((2.0, 2.2, 2.4)):
        make_run(tmp_path, f"slow{seed}", score, seed=seed)
        make_run(tmp_path, f"fast{seed}", score + 0.1, seed=seed + 1, lr=1e-2)
    noise = compare(runs(tmp_path)).verdicts("eval/frechet_distance")["noise"]
    assert list(noise) == pytest.approx([2.7764 * 0.2 * (2 / 3) ** 0.5] * 2, rel=1e-3)  # t of 4


def test_none_is_a_setting_like_any_other(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"continuous{seed}", 2.0, seed=seed)
        make_run(tmp_path, f"steps{seed}", 2.5, seed=seed, flow={"discretize": 1000})
    made = compare(runs(tmp_path))
    assert made.settings == ["flow.discretize"] and list(made.groups["flow.discretize"]) == ["None", 1000]
    assert list(made.groups["runs"]) == [2, 2]


def test_labels_name_what_differs(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 2.0)
    make_run(tmp_path, "b", 2.5, lr=0.1, seed=1, group="other")
    found = runs(tmp_path)
    assert list(labels(found).values()) == ["lr 0.001, seed 0", "lr 0.1, seed 1"] and list(labels(found)) == [
        r.where for r in found
    ]
    assert list(labels(found[:1]).values()) == ["a"]
    assert [run.name for run in of_group(found, "other")] == ["b"]
    assert of_group(found, "of nobody") == found


def test_without_repeats_nothing_is_called_noise(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 2.0)
    make_run(tmp_path, "b", 2.5, lr=0.1)
    assert list(compare(runs(tmp_path)).verdicts("eval/frechet_distance")["verdict"]) == ["best", "unknown"]


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        make_run(tmp_path / folder, "run", 2.0)
    assert list(labels(runs(tmp_path)).values()) == ["run (x/run)", "run (y/run)"]


def test_runs_that_differ_in_their_seeds_alone_are_one_group(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, f"a{seed}", 2.0 + seed / 10, seed=seed)
    made = compare(runs(tmp_path), ["val/loss"])
    (group,) = made.groups.to_dict("records")
    assert (group["runs"], group["val/loss n"]) == (3, 3)
    assert (group["val/loss mean"], group["val/loss std"]) == (pytest.approx(2.1), pytest.approx(0.1))
    assert "2.1 ± 0.1, alone" in str(made) and "2.1 ± 0.1, alone" in made._repr_html_()


def test_what_is_printed_says_mean_spread_and_verdict(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"a{seed}", 2.0 + seed / 10, seed=seed)
        make_run(tmp_path, f"b{seed}", 2.04 + 0.14 * seed, seed=seed, lr=0.1)
    made = compare(runs(tmp_path), ["val/loss"])
    for text in (repr(made), made._repr_html_()):
        # s^2 = 0.02^2 / 2; t of one degree of freedom is 12.7: 0.06 + 12.7 x 0.02
        assert "2.05 ± 0.071, best" in text and "2.11 ± 0.099, no difference above 0.31" in text


def test_a_runs_score_is_that_of_its_own_settings(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", 2.0)
    evaluate_again(folder, 40.0, "2027", {"num_steps": 1})
    evaluate_again(folder, 30.0, "2028", num_images=5)
    evaluate_again(folder, 20.0, "2029", seed=7)
    make_run(tmp_path, "b", 2.5, lr=0.1)
    made = compare(runs(tmp_path), ["eval/frechet_distance"])
    by_run = made.table.groupby("run")["eval/frechet_distance"].apply(list)
    # seeds are averaged; other settings are rows of their own
    assert by_run["a"] == [11.0, 40.0, 30.0] and by_run["b"] == [2.5]
    assert made.table["judged by"][0] == "20 images, euler_maruyama 2 x 1, mean of 2 seeds"
    evaluate_again(folder, 3.0, "2030")  # the newest of those
    assert compare(runs(tmp_path), ["eval/frechet_distance"]).table["eval/frechet_distance"][0] == 11.5


@pytest.mark.parametrize("other", [{"num_images": 5}, {"extractor": "dinov2"}])
def test_there_is_no_verdict_across_judges(tmp_path: Path, other: dict[str, Any]) -> None:
    make_run(tmp_path, "a", 2.0)
    folder = make_run(tmp_path, "b", 2.5, lr=0.1)
    evaluate_again(folder, 1.0, "2027", **other)
    (folder / "evaluations" / "r.json").unlink()
    made = compare(runs(tmp_path), ["eval/frechet_distance", "val/loss"])
    assert {"best", "worse", "unknown"}.isdisjoint(made.verdicts("eval/frechet_distance")["verdict"])
    assert list(made.verdicts("val/loss")["verdict"])[:2] == ["best", "unknown"]
    assert ("not the run's own" in str(made)) == ("extractor" not in other)
    make_run(tmp_path, "b2", 2.6, lr=0.1, seed=1)  # one group, two judges
    verdicts = compare(runs(tmp_path)).verdicts("eval/frechet_distance")["verdict"]
    assert "judged differently" in list(verdicts) if "extractor" in other else "best" in list(verdicts)


def test_scores_while_training_are_others_than_full_ones(tmp_path: Path) -> None:
    MetricsCSV(make_run(tmp_path, "a", 2.0) / "metrics.csv", 8).log_metrics(
        {"online/frechet_distance": 9.0}, 6
    )
    found = runs(tmp_path)
    assert (
        compare(found).metrics[0] == "eval/frechet_distance"
        and "online/frechet_distance" not in compare(found).metrics
    )
    made = compare(found, ["eval/frechet_distance", "online/frechet_distance"])
    assert made.table.iloc[0][["eval/frechet_distance", "online/frechet_distance"]].tolist() == [2.0, 9.0]


def test_only_finished_runs_of_other_seeds_are_averaged(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        for seed in (0, 1):
            make_run(tmp_path, f"{lr}-{seed}", 1.0 + lr + seed / 10, seed=seed, lr=lr)
    folder = tmp_path / "0.2-1"
    (folder / "export" / "export.json").unlink()
    (folder / "metrics.csv").write_text(f"{HEAD}2,16,1,val/loss,0.1\n")
    shutil.copytree(tmp_path / "0.1-0", tmp_path / "copy")
    longer = make_run(tmp_path, "longer", 0.1, lr=0.2, seed=2)
    MetricsCSV(longer / "metrics.csv", 8).log_metrics({"val/loss": 0.5}, 60)
    make_run(tmp_path, "stopped", 0.1, lr=0.3)
    (tmp_path / "stopped" / "export" / "export.json").unlink()
    made = compare(runs(tmp_path), ["val/loss"])
    assert made.table.set_index("run").loc["0.2-1", ["state", "step"]].tolist() == ["unfinished", 2]
    assert made.groups.set_index("optimizer.lr")["runs"].to_dict() == {0.1: 2, 0.2: 1, 0.3: 0}
    assert made.verdicts("val/loss").set_index("optimizer.lr")["verdict"].to_dict() == {
        0.1: "no difference",
        0.2: "best",
        0.3: "no finished run",
    }
    for told in (
        "0.2-1 is not averaged: unfinished at step 2",
        "0.1-0 is not averaged: its settings and seed are those of 0.1-0",
        "0.2-0 is not averaged: it ended at step 6, others of its settings at 60",
    ):
        assert told in str(made)


def test_a_diverged_run_is_never_the_best(tmp_path: Path) -> None:
    MetricsCSV(make_run(tmp_path, "bad", 0.5, lr=0.1) / "metrics.csv", 8).log_metrics(
        {"val/loss": math.nan}, 6
    )
    make_run(tmp_path, "good", 1.0)
    made = compare(runs(tmp_path), ["val/loss", "eval/frechet_distance"])
    for metric in made.metrics:
        assert list(made.verdicts(metric)["verdict"]) == ["diverged", "alone"]
    assert list(made.table["state"]) == ["diverged", "finished"]


def test_losses_of_other_stages_do_not_compare(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 1.0)
    make_run(tmp_path, "b", 0.1, stage="diffusion_head", init_from="a")
    made = compare(runs(tmp_path), ["val/loss", "eval/frechet_distance"])
    assert list(made.verdicts("val/loss")["verdict"]) == ["alone", "alone"]
    assert list(made.verdicts("eval/frechet_distance")["verdict"]) == ["unknown", "best"]


def test_a_metric_that_no_run_has_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 1.0)
    make_run(tmp_path, "b", 2.0, lr=0.1)
    with pytest.raises(ValueError, match=r"metrics: 'val/lost' is not known. Did you mean 'val/loss'"):
        compare(runs(tmp_path), ["val/lost"])
    (tmp_path / "b" / "metrics.csv").write_text(f"{HEAD}6,48,1,train/loss,1\n")
    assert list(compare(runs(tmp_path), ["val/loss"]).verdicts("val/loss")["verdict"]) == [
        "alone",
        "not measured",
    ]
