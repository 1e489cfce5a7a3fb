"""The page of many runs: the time to write it, its size, and the time until a browser answers.

    python benchmarks/report_page.py --runs 500 --folder /tmp/many

Makes two sweeps of run folders with histories of seven metrics (3,000 values), sample grids and
scores, writes their page, and opens it in a headless Chromium. ``ready`` is the time from the start of
the navigation until the page has drawn and answers its first click; ``all ticked`` the time to draw every
curve; ``next metric`` the time to change to a metric that was not shown before.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from lit_transdiff.config.loading import run_from, save_yaml
from lit_transdiff.study.report import read_sets, write_report
from lit_transdiff.tracking.metrics_file import COLUMNS, row_checksum

DEMO = Path(__file__).parents[1] / "docs" / "demo.png"
METRICS = (
    "train/loss",
    "train/grad_norm",
    "optimizer/lr",
    "throughput/images_per_second",
    "throughput/data_wait_fraction",
    "throughput/mfu",
)
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "class_accuracy")
BROWSER = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def write_run(folder: Path, index: int, steps: int, pictures: list[bytes]) -> None:
    """A run folder as training leaves it, with ``steps`` logged steps and a sample grid for each picture."""
    rng = np.random.default_rng(index)
    lr = 10 ** rng.uniform(-4, -2)
    changes = {
        "name": f"{index:03d}-lr-{lr:.1e}-seed-{index % 3}",
        "output_dir": str(folder),
        "stage": "ar_pretrain",
        "seed": index % 3,
        "data": {"train": "data/fashion/train"},
        "optimizer": {"lr": float(lr), "warmup_steps": int(rng.choice([10, 100]))},
        "flow": {"num_noise_draws": int(rng.choice([1, 4, 8]))},
        "training": {"max_steps": steps * 10, "global_batch_size": 256},
        "tracking": {"wandb": False, "group": folder.name},
    }
    run = run_from(changes)
    for part in ("samples", "evaluations", "export"):
        (folder / run.name / part).mkdir(parents=True, exist_ok=True)
    save_yaml(run, folder / run.name / "config.yaml")
    (folder / run.name / "export" / "export.json").write_text(json.dumps({"step": steps * 10}))
    (folder / run.name / "metrics.csv").write_text("\n".join(rows(rng, steps)) + "\n")
    for k, content in enumerate(pictures, 1):
        step = k * steps * 10 // len(pictures)
        (folder / run.name / "samples" / f"step-{step:08d}.png").write_bytes(content)
    scores = {name: float(rng.uniform(0.1, 9)) for name in SCORES}
    manifest: dict[str, Any] = {"run": run.name, "sampling": vars(run.sampling), "date": "2026"}
    manifest |= {"num_images": 2000, "seed": 0, "extractor": "classifier", "labels": list(range(100))}
    result = folder / run.name / "evaluations" / "r.json"
    result.write_text(json.dumps({"scores": scores, "manifest": manifest}))
    result.with_suffix(".png").write_bytes(pictures[-1])


def sample_grids(count: int) -> list[bytes]:
    """The README's picture, shifted sideways, as ``count`` PNG files."""
    pixels = np.asarray(Image.open(DEMO).convert("RGB").resize((520, 400)))
    files = [io.BytesIO() for _ in range(count)]
    for k, file in enumerate(files):
        Image.fromarray(np.roll(pixels, 20 * k, 1)).save(file, format="PNG")
    return [file.getvalue() for file in files]


def rows(rng: np.random.Generator, steps: int) -> Iterator[str]:
    """The lines of a ``metrics.csv``."""
    yield ",".join(COLUMNS)
    values = rng.normal(1, 0.05, (steps, len(METRICS))) * (1 + 3 / np.sqrt(np.arange(1, steps + 1)))[:, None]
    for i in range(steps):
        names = [
            *zip(METRICS, values[i], strict=True),
            *([("val/loss", values[i, 0])] if i % 50 == 49 else []),
        ]
        for name, value in names:
            cells = [(i + 1) * 10, (i + 1) * 2560, round(i * 1.7, 2), name, float(value), 0]
            yield ",".join(map(str, [*cells, row_checksum(cells)]))


def opened(page: Any, file: Path, runs: int) -> dict[str, float]:
    """Open the page once; seconds of each action."""
    begin = time.perf_counter()
    page.goto(file.as_uri(), wait_until="commit")
    page.wait_for_selector("#runs tr:nth-child(2)")
    page.wait_for_selector("#plot .curve")
    page.locator("#runs input").first.uncheck()
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    found = {"ready": time.perf_counter() - begin}
    for name, action in (
        ("all ticked", lambda: page.locator("#tick").select_option(label="all")),
        ("next metric", lambda: page.locator("#metric").select_option("train/grad_norm")),
    ):
        begin = time.perf_counter()
        action()
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        found[name] = time.perf_counter() - begin
    curves = page.locator("#plot .curve").count()
    assert curves == runs, f"{curves} curves of {runs} runs"
    found["nodes"] = page.evaluate("document.querySelectorAll('*').length")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=500, help="logged steps of each run")
    parser.add_argument("--grids", type=int, default=10, help="sample grids of each run")
    parser.add_argument(
        "--folder", required=True, help="for the runs; those of an earlier call are used again"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pictures = sample_grids(args.grids)
    sweeps = [Path(args.folder) / name for name in ("first", "second")]
    for i in range(args.runs):
        sweep = sweeps[i % 2]
        if not sweep.is_dir() or len(list(sweep.iterdir())) <= i // 2:
            write_run(sweep, i, args.steps, pictures)

    begin, cpu = time.perf_counter(), time.process_time()
    file = write_report(read_sets([str(sweep) for sweep in sweeps]), Path(args.folder) / "report.html")
    print(
        f"written in {time.perf_counter() - begin:.1f} s ({time.process_time() - cpu:.1f} s of the processor)"
    )
    print(f"{file.stat().st_size / 1e6:.1f} MB")

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = next(found for name in BROWSER if (found := shutil.which(name)))
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        measured = []
        for _ in range(args.rounds):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            measured.append(opened(page, file, args.runs))
            page.close()
        browser.close()
    for name in measured[0]:
        values = [round(each[name], 2) for each in measured]
        print(f"{name}: {median(values)} ({', '.join(map(str, values))})")


if __name__ == "__main__":
    main()
