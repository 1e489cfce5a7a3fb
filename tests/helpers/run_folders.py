"""Run folders as training leaves them, written without training."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lit_transdiff.config.loading import save_yaml
from lit_transdiff.study.records import Run
from lit_transdiff.study.report import RunSet, page_data
from lit_transdiff.tracking.loggers import MetricsCSV
from lit_transdiff.tracking.metrics_file import COLUMNS
from tests.helpers.small import small_run

OLD_COLUMNS = COLUMNS[:5]  # of earlier versions
HEAD = ",".join(OLD_COLUMNS) + "\n"


def make_run(
    root: Path, name: str, score: float, *, seed: int = 0, lr: float = 1e-3, group: str = "g", **more: Any
) -> Path:
    """A run folder with three logged steps, a picture and a result, written without training."""
    changes: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "optimizer": {"lr": lr},
        "evaluation": {"num_images": 20},
    }
    changes["tracking"] = {"wandb": False, "group": group, "tags": ["a"]}
    run = small_run(root, **changes, **more)
    for part in ("samples/final", "evaluations", "export"):
        (run.folder / part).mkdir(parents=True)
    (run.folder / "export" / "export.json").write_text(json.dumps({"step": 6}))
    save_yaml(run, run.folder / "config.yaml")
    log = MetricsCSV(run.folder / "metrics.csv", run.images_per_step)
    for step in (2, 4, 6):
        log.log_metrics({"train/loss": score / step}, step)
    log.log_metrics({"val/loss": score}, 6)
    for file in (
        "samples/step-00000002.png",
        "samples/step-00000006.png",
        "samples/final/grid.png",
        "evaluations/r.png",
    ):
        Image.new("RGB", (8, 8), (color(file), 0, 0)).save(run.folder / file)
    manifest = {"run": name, "sampling": vars(run.sampling), "date": "2026", "num_images": 20, "seed": 0}
    manifest["decoder_evaluations_per_image"] = 4
    scores = {"frechet_distance": score, "precision": 1 / score, "inception_score": {"mean": 2.0, "std": 0.1}}
    scores |= {"feature_diversity": 0.3, "class_accuracy": 0.5}
    log.log_metrics({f"eval/{key}": scores[key] for key in ("frechet_distance", "class_accuracy")}, 6)
    (run.folder / "evaluations" / "r.json").write_text(json.dumps({"scores": scores, "manifest": manifest}))
    return run.folder


def color(file: str) -> int:
    """The red of a picture, by its place in the run folder."""
    return zlib.crc32(file.encode()) % 256


def write_long(folder: Path, steps: int) -> Path:
    """A run that logged eight metrics in each step."""
    folder = make_run(folder, "long", 1.0)
    log = [[step, step * 8, step / 10, name, 1 / step] for step in range(1, steps + 1) for name in "abcdefgh"]
    with open(folder / "metrics.csv", "w", newline="") as out:
        csv.writer(out).writerows([OLD_COLUMNS, *log])
    return folder


def evaluate_again(
    folder: Path, score: float, date: str, sampling: dict[str, Any] | None = None, **manifest: Any
) -> None:
    """Another result in a run folder."""
    content = json.loads((folder / "evaluations" / "r.json").read_text())
    content["scores"]["frechet_distance"] = score
    content["manifest"] |= {
        "date": date,
        "sampling": content["manifest"]["sampling"] | (sampling or {}),
        **manifest,
    }
    (folder / "evaluations" / f"{date}.json").write_text(json.dumps(content))


def on_the_page(found: Sequence[Run]) -> list[dict[str, Any]]:
    """The entries of the page about these runs, one for each run."""
    page = page_data([RunSet(found)])
    return [run | row for run, row in zip(page["runs"], page["views"][0]["rows"], strict=True)]
