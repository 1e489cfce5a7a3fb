"""The comparison of a folder of results."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image

from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.results import DECIDING, result_name
from lit_transdiff.study.table import Written, compare_results, write_comparison
from lit_transdiff.study.text import markdown

PLAIN = dict(drift_scale=1.0, noise_scale=1.0)
SAMPLING = (
    dict(
        solver="euler",
        num_steps=40,
        guidance_scale=1.5,
        guidance_interval=[0.0, 1.0],
        reference_guidance=None,
    )
    | PLAIN
)

MANIFEST = dict(
    stage="ar_pretrain",
    num_references=1,
    training={"images_seen": 64000},
    sampling=SAMPLING,
    images_per_second=12.345,
    decoder_evaluations_per_image=80.0,
    extractor="classifier",
    extractor_fingerprint="f",
    reference="somewhere/real.npz",
    reference_hash="r",
    num_images=1000,
    label_mode="balanced",
    num_neighbours=3,
    weights="ema 0.999",
    weights_fingerprint="w",
    seed=0,
    date="2026-01-01",
)


def write(folder: Path, run: str, scores: dict, **changes: object) -> None:
    manifest = {name: None for name in DECIDING} | MANIFEST | {"run": run} | changes
    place = folder / run / "evaluations"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{result_name(manifest)}.json").write_text(json.dumps({"scores": scores, "manifest": manifest}))
    Image.new("RGB", (300, 200), (120, 160, 200)).save(place / f"{result_name(manifest)}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "onestep",
        {"frechet_distance": 2.5, "precision": 0.7, "inception_score": {"mean": 8.1, "std": 0.2}},
    )
    write(
        tmp_path,
        "mrar",
        {"frechet_distance": 1.25, "precision": 0.6},
        num_references=4,
        training=None,
        sampling=SAMPLING | {"noise_scale": 0.9},
    )
    write(tmp_path, "other", {"frechet_distance": 0.1, "precision": 0.9}, reference_hash="another")
    return tmp_path


def test_the_table_marks_the_best_of_what_is_judged_alike(folder: Path, tmp_path: Path) -> None:
    made = write_comparison(folder, tmp_path / "out")
    table = [
        [cell.strip() for cell in line.split("|")]
        for line in made.markdown.read_text().splitlines()
        if "|" in line
    ]
    lines = {cells[1]: cells for cells in table}
    head = lines["run"]
    column = {name.split(" ")[0]: i for i, name in enumerate(head)}
    assert (
        "Frechet distance ↓" in head
        and "precision ↑" in head
        and "inception score ↑" in head
        and "recall ↑" not in head
    )
    assert lines["mrar"][column["Frechet"]] == "**1.25**" and lines["onestep"][column["Frechet"]] == "2.5"
    assert lines["onestep"][column["precision"]] == "**0.7**" and lines["mrar"][column["precision"]] == "0.6"
    assert lines["other"][column["Frechet"]] == "0.1"  # another reference: best of nothing
    assert lines["onestep"][column["inception"]] == "8.1 ± 0.2" and lines["mrar"][column["inception"]] == "-"
    assert "64,000" in lines["onestep"] and "euler 40 x 1.5" in lines["onestep"]
    assert (
        "euler 40 x 1.5, scales 1 0.9" in lines["mrar"]
        and "classifier, real, 1,000 images, balanced" in lines["mrar"]
    )
    assert "Not all rows have the same judge" in made.text and "analogues" in made.text


def test_the_table_says_by_how_much_results_differ(tmp_path: Path) -> None:
    errors = {"frechet_distance": 0.03, "recall": 0.01}
    write(
        tmp_path,
        "a-onestep",
        {"frechet_distance": 1.0, "recall": 0.6, "precision": 0.5},
        standard_errors=errors,
    )
    write(
        tmp_path,
        "b-mrar",
        {"frechet_distance": 0.5, "recall": 0.61, "precision": 0.7},
        standard_errors=errors,
    )
    write(tmp_path, "c-earlier", {"frechet_distance": 0.9, "recall": 0.6})
    write(tmp_path, "d-other", {"frechet_distance": 0.1}, standard_errors=errors, reference_hash="another")
    text = " ".join(write_comparison(tmp_path, tmp_path / "out").markdown.read_text().split())
    # For three others at once, t of 1 - 0.05 / 3 is 2.40: times sqrt(2) x 0.03 = 0.10, and 0.01 + 0.034.
    assert (
        "b-mrar against a-onestep: Frechet distance better by 0.5 ± 0.1, recall no difference above 0.044."
        in text
    )
    assert "95 % intervals over the sampled images" in text and text.count("against a-onestep") == 1


def with_groups(scores: dict[str, float], noise: float) -> dict[str, object]:
    """Twenty values without a group whose errors are mostly common to all results, and parts."""
    wiggles = [math.sin(g) + noise * math.cos(3 * g) for g in range(20)]
    values = {name: [score + 0.01 * wiggle for wiggle in wiggles] for name, score in scores.items()}
    return {
        "standard_errors": dict.fromkeys(scores, 0.2),
        "groups": 20,
        "without_group": {name: rows for name, rows in values.items() if name != "recall"},
        "parts": {name: rows[:10] for name, rows in values.items() if name == "recall"},
    }


def test_results_of_the_same_images_are_compared_pair_by_pair(tmp_path: Path) -> None:
    for name, scores, noise in (
        ("a", {"frechet_distance": 1.0, "recall": 0.60, "judge/frechet_distance": 2.0}, 0.0),
        ("b", {"frechet_distance": 0.9, "recall": 0.70, "judge/frechet_distance": 2.2}, 0.1),
    ):
        judge = {"judge": {"extractor_fingerprint": "f", "reference_hash": "r"}}
        write(tmp_path, name, scores, **with_groups(scores, noise), extractors=judge)
    text = " ".join(write_comparison(tmp_path, tmp_path / "out").markdown.read_text().split())
    gaps = [0.001 * math.cos(3 * g) for g in range(20)]
    half = 2.093 * math.sqrt(19 * statistics.pvariance(gaps))  # t of 19 degrees of freedom
    assert f"Frechet distance better by 0.1 ± {half:.2g}" in text
    parts = 0.1 + statistics.mean(gaps[:10]), 2.262 * statistics.stdev(gaps[:10]) / math.sqrt(10)
    assert f"recall better by {parts[0]:.2g} ± {parts[1]:.2g} (mean of 10 parts of the images)" in text
    assert f"Frechet distance by judge worse by 0.2 ± {half:.2g}" in text
    assert (
        "Representations disagree about b against a: frechet_distance is better by the main extractor, "
        "worse by judge." in text
    )


def test_other_noise_is_not_paired_and_scores_below_those_of_real_images_warn(tmp_path: Path) -> None:
    scores = {"frechet_distance": 1.0, "precision": 0.9}
    write(tmp_path, "a", scores, **with_groups(scores, 0.0), seed=1)
    real = {"frechet_distance": 0.95, "precision": 0.8}
    lower = {"frechet_distance": 0.9, "precision": 0.9}
    write(tmp_path, "b", lower, **with_groups(lower, 0.1), seed=2, real_scores=real)
    text = " ".join(write_comparison(tmp_path, tmp_path / "out").markdown.read_text().split())
    assert "b against a: Frechet distance no difference above 0.66" in text  # 0.1 + 1.96 sqrt(2) 0.2
    assert "b: Frechet distance 0.9 is below the 0.95 of real images" in text
    assert "precision 0.9 is below" not in text


def test_text_is_aligned_and_the_csv_holds_plain_numbers(folder: Path, tmp_path: Path) -> None:
    made = write_comparison(folder, tmp_path / "out")
    lines = made.text.splitlines()[:5]
    starts = [i for i in range(1, len(lines[1])) if lines[1][i - 1 : i + 1] == " -"]
    assert all(len(line) > start and line[start - 1] == " " for line in lines for start in starts)
    with open(made.csv) as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert (
        float(rows["onestep"]["inception_score"]) == 8.1
        and float(rows["onestep"]["inception_score_std"]) == 0.2
    )
    assert rows["mrar"]["inception_score"] == "" and float(rows["mrar"]["frechet_distance"]) == 1.25
    assert rows["other"]["reference_hash"] == "another" and rows["other"]["file"].endswith(".json")
    with Image.open(made.picture) as picture:
        assert picture.width > 3 * 300 and picture.height > 200


def names(folder: Path) -> list[str]:
    return [entry.run.name for entry in compare_results(folder).entries]


def test_folders_without_results_are_refused_and_broken_files_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="contains no result"):
        write_comparison(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist\. Name a folder of runs"):
        write_comparison(tmp_path / "nowhere", tmp_path / "out")
    assert names(folder) == ["mrar", "onestep", "other"]
    for bad in (
        "{}",
        "[]",
        "not JSON",
        '{"scores": {"precision": "high"}, "manifest": {}}',
        '{"scores": {}, "manifest": {"run": "x"}}',
    ):
        (folder / "mrar" / "evaluations" / "x.json").write_text(bad)
        caplog.clear()
        assert names(folder) == ["mrar", "onestep", "other"]
        assert "x.json is " in caplog.text and "left out" in caplog.text
    with pytest.raises(ValueError, match="none of the files in evaluations/ is a result"):
        shutil.copytree(
            folder / "mrar",
            tmp_path / "only",
            ignore=lambda _, names: [n for n in names if n.startswith("mrar")],
        )
        write_comparison(tmp_path / "only", tmp_path / "out")


def table_of(made: Written) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in made.markdown.read_text().splitlines()
        if "|" in line
    ]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_repeats_are_one_row_and_the_luckiest_is_not_the_best(tmp_path: Path) -> None:
    for seed, distance in enumerate((2.5, 1.0, 2.8)):
        spread = {"inception_score": {"mean": 8.0 + seed, "std": 0.0}, "precision": 0.7}
        write(tmp_path, "a", {"frechet_distance": distance} | spread, seed=seed, date=f"2026-01-0{seed + 1}")
    # seed 0, earlier
    write(tmp_path, "a", {"frechet_distance": 7.0}, seed=0, metrics=["frechet_distance"], date="2025-01-01")
    write(tmp_path, "b", {"frechet_distance": 2.0, "inception_score": {"mean": 3.0, "std": 0.0}})
    write(tmp_path, "b", {"frechet_distance": 0.5}, num_images=50_000)
    made = write_comparison(tmp_path, tmp_path / "out")
    pooled, single, many = sorted(table_of(made), key=lambda row: (row["run"], "50,000" in row["judged by"]))
    assert pooled["Frechet distance ↓"] == "2.1 ± 0.96 (n=3)" and pooled["seeds"] == "0, 1, 2"
    assert pooled["inception score ↑"] == "**9 ± 1 (n=3)**" and pooled["precision ↑"] == "0.7 ± 0 (n=3)"
    # one value has no spread
    assert single["Frechet distance ↓"] == "**2**" and single["inception score ↑"] == "3"
    assert many["Frechet distance ↓"] == "0.5"  # of other images: best of nothing
    with open(made.csv) as file:
        assert len(list(csv.DictReader(file))) == 6  # every result


@pytest.mark.parametrize(
    "change, column",
    [
        ({"sampling": SAMPLING | {"num_steps": 10}}, "sampler, steps x guidance"),
        ({"sampling": SAMPLING | {"guidance_scale": 3.0}}, "sampler, steps x guidance"),
        ({"sampling": SAMPLING | {"solver": "heun"}}, "sampler, steps x guidance"),
        ({"num_images": 50}, "judged by"),
        ({"checkpoint": "runs/a/best", "weights_fingerprint": "v"}, "checkpoint"),
        ({"training": {"images_seen": 64000, "step": 7}, "weights_fingerprint": "v"}, "checkpoint"),
        ({"precision": "bfloat16"}, "precision of sampling"),
        ({"scored_reference": "all"}, "scored reference"),
        ({"num_neighbours": 5}, "result"),  # what no column shows
        ({"sampling": SAMPLING | {"temperature": 0.9}}, "result"),
    ],
)
def test_what_differs_between_evaluations_of_a_run_is_shown(
    tmp_path: Path, change: dict, column: str
) -> None:
    write(tmp_path, "a", {"frechet_distance": 2.0})
    write(tmp_path, "a", {"frechet_distance": 2.0}, **change)
    first, second = table_of(write_comparison(tmp_path, tmp_path / "out"))
    assert first[column] != second[column]


def test_the_text_fits_a_terminal(tmp_path: Path) -> None:
    scores = {name: {"mean": 0.123456, "std": 0.01} for name in METRICS}
    write(tmp_path, "guidance_scale_1.5-guidance_interval_0.2_0.7-num_steps_40-1a2b3c4d", scores)
    write(
        tmp_path,
        "mrar",
        scores,
        num_references=4,
        sampling=SAMPLING | {"noise_scale": 0.9},
        stage="mrar_finetune",
    )
    text = write_comparison(tmp_path, tmp_path / "out").text
    assert max(map(len, text.splitlines())) <= 120 and text.count("0.1235 ± 0.01") >= 2 * len(METRICS)
    assert "num_steps_40-1a2b3c4d" in text


def test_weights_are_shown_where_they_differ(folder: Path, tmp_path: Path) -> None:
    """Results of earlier versions say ema of every export; what the export says of itself is right."""
    assert "weights" not in write_comparison(folder, tmp_path / "out").markdown.read_text().splitlines()[0]
    write(
        folder,
        "raw",
        {"frechet_distance": 3.0},
        weights="ema",
        training={"images_seen": 1, "weights": "last"},
    )
    made = write_comparison(folder, tmp_path / "out")
    assert "weights" in made.markdown.read_text().splitlines()[0]
    with open(made.csv) as file:
        assert {row["run"]: row["weights"] for row in csv.DictReader(file)} == {
            **dict.fromkeys(("mrar", "onestep", "other"), "ema 0.999"),
            "raw": "last",
        }


def test_a_missing_picture_is_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = next((folder / "other").rglob("*.png"))
    picture.unlink()
    made = write_comparison(folder, tmp_path / "out")
    assert str(picture) in caplog.text and made.picture is not None
    for picture in folder.rglob("*/evaluations/*.png"):
        picture.unlink()
    assert (
        write_comparison(folder, tmp_path / "none").picture is None
        and not (tmp_path / "none" / "comparison.png").exists()
    )


def test_settings_are_text_in_markdown():
    cell = "a|b <img src=x onerror=alert(1)> [x](javascript:y) `c` \\"
    text = markdown(["run"], [[cell], ["two\nlines"]])
    assert text.splitlines()[2] == r"| a\|b &lt;img src=x onerror=alert(1)&gt; [x]\(javascript:y) \`c\` \\ |"
    assert text.splitlines()[3] == "| two lines |"
