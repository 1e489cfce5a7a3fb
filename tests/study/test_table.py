"""The comparison of a folder of results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from lit_transdiff.evaluation.results import DECIDING, result_name
from lit_transdiff.study.table import collect, compare

PLAIN = dict(drift_scale=1.0, noise_scale=1.0)
SAMPLING = dict(solver="euler", num_steps=40, guidance_scale=1.5, guidance_interval=[0.0, 1.0], reference_guidance=None) | PLAIN

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
    write(tmp_path, "onestep", {"frechet_distance": 2.5, "precision": 0.7, "inception_score": {"mean": 8.1, "std": 0.2}})
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
    made = compare(folder, tmp_path / "out")
    table = [[cell.strip() for cell in line.split("|")] for line in made.markdown.read_text().splitlines() if "|" in line]
    lines = {cells[1]: cells for cells in table}
    head = lines["run"]
    column = {name.split(" ")[0]: i for i, name in enumerate(head)}
    assert "Frechet distance ↓" in head and "precision ↑" in head and "inception score ↑" in head and "recall ↑" not in head
    assert lines["mrar"][column["Frechet"]] == "**1.25**" and lines["onestep"][column["Frechet"]] == "2.5"
    assert lines["onestep"][column["precision"]] == "**0.7**" and lines["mrar"][column["precision"]] == "0.6"
    assert lines["other"][column["Frechet"]] == "0.1"  # another reference: best of nothing
    assert lines["onestep"][column["inception"]] == "8.1 ± 0.2" and lines["mrar"][column["inception"]] == "-"
    assert "64,000" in lines["onestep"] and "euler 40 x 1.5" in lines["onestep"]
    assert "euler 40 x 1.5, scales 1 0.9" in lines["mrar"] and "classifier, real, 1,000 balanced" in lines["mrar"]
    assert "Not all rows are judged alike" in made.text and "analogues" in made.text


def test_text_is_aligned_and_the_csv_holds_plain_numbers(folder: Path, tmp_path: Path) -> None:
    made = compare(folder, tmp_path / "out")
    lines = made.text.splitlines()[:5]
    starts = [i for i in range(1, len(lines[1])) if lines[1][i - 1 : i + 1] == " -"]
    assert all(len(line) > start and line[start - 1] == " " for line in lines for start in starts)
    with open(made.csv) as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert float(rows["onestep"]["inception_score"]) == 8.1 and float(rows["onestep"]["inception_score_std"]) == 0.2
    assert rows["mrar"]["inception_score"] == "" and float(rows["mrar"]["frechet_distance"]) == 1.25
    assert rows["other"]["reference_hash"] == "another" and rows["other"]["file"].endswith(".json")
    with Image.open(made.picture) as picture:
        assert picture.width > 3 * 300 and picture.height > 200


def test_folders_without_results_and_broken_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no result"):
        compare(tmp_path / "empty", tmp_path / "out")
    assert [row.manifest["run"] for row in collect(folder)] == ["mrar", "onestep", "other"]
    (folder / "mrar" / "evaluations" / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a result"):
        collect(folder)


def test_weights_are_shown_where_they_differ(folder: Path, tmp_path: Path) -> None:
    """Results of earlier versions say ema of every export; what the export says of itself is right."""
    assert "weights" not in compare(folder, tmp_path / "out").text.splitlines()[0]
    write(folder, "raw", {"frechet_distance": 3.0}, weights="ema", training={"images_seen": 1, "weights": "last"})
    made = compare(folder, tmp_path / "out")
    assert "weights" in made.text.splitlines()[0]
    with open(made.csv) as file:
        assert {row["run"]: row["weights"] for row in csv.DictReader(file)} == {
            **dict.fromkeys(("mrar", "onestep", "other"), "ema 0.999"),
            "raw": "last",
        }


def test_a_missing_picture_is_named(folder: Path, tmp_path: Path) -> None:
    next((folder / "other").rglob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match="evaluate other again"):
        compare(folder, tmp_path / "out")
