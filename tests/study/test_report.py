"""The page of a report: one file that needs nothing else, and works in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks import report_page
from lit_transdiff.__main__ import main
from lit_transdiff.study.page import (
    ALL_POINTS,
    MAX_POINTS,
    NARROWEST,
    Limits,
    as_json,
    content_of,
    limits_for,
)
from lit_transdiff.study.records import Run
from lit_transdiff.study.report import RunSet, page_data, read_sets, report_file, write_report
from lit_transdiff.study.runs import archive, runs
from lit_transdiff.tracking.loggers import MetricsCSV
from tests.helpers.run_folders import make_run, on_the_page, write_long

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    for seed in (0, 1):
        make_run(tmp_path / "runs", f"slow{seed}", 2.0 + seed, seed=seed, group="other" if seed else "g")
        make_run(tmp_path / "runs", f"fast{seed} <b>", 3.0 + seed, seed=seed, lr=0.1)
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "report.html")]) == 0
    return tmp_path / "report.html"


def test_the_page_of_an_archive_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs", "a", 1.0)
    packed = archive(tmp_path / "runs", tmp_path / "packed.zip")
    assert main(["report", str(packed)]) == 0
    assert f"<h1>{packed}</h1>" in (tmp_path / "packed.html").read_text()
    monkeypatch.chdir(tmp_path)
    # a folder of the project's name would hide the project
    assert report_file("entity/project") == Path("entity-project.html")
    assert report_file("runs") == Path("runs/report.html")


def test_the_file_holds_everything_and_names_nothing_outside(report: Path) -> None:
    page = report.read_text()
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(|fetch\(|https?://(?!www\.w3\.org)""", page
    )
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [run["name"] for run in data["runs"]] == ["fast0 <b>", "fast1 <b>", "slow0", "slow1"]
    assert data["views"][0]["differing"] == ["optimizer.lr"] and "val/loss" in data["metrics"]
    run = data["runs"][2]
    assert run["curves"]["train/loss"]["value"] == pytest.approx([1.0, 0.5, 1 / 3])
    assert [sample["step"] for sample in run["samples"]] == [2, 6]
    assert data["views"][0]["rows"][2]["scores"]["eval/frechet_distance"] == 2.0
    assert run["evaluations"][0]["manifest"]["run"] == "slow0"


@pytest.mark.parametrize("name", ["x<!--<script>", "</script>", "<b>b & 'c'\"", "_hidden", "a$x_{$b$^"])
def test_every_name_stands_in_the_page_as_it_is(tmp_path: Path, name: str) -> None:
    (run,) = runs(make_run(tmp_path, "a", 1.0))
    page = write_report([RunSet([dataclasses.replace(run, name=name)])], tmp_path / "page.html").read_text()
    (embedded,) = re.findall(r'type="application/json">(.*?)</script>', page, re.DOTALL)
    assert "<" not in embedded and json.loads(embedded)["runs"][0]["name"] == name


def test_a_huge_picture_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_run(tmp_path, "a", 2.0)
    # Pillow warns of the first and refuses the second
    for name, side in (("step-00000004", 10_000), ("step-00000006", 16_000)):
        Image.new("1", (side, side)).save(folder / "samples" / f"{name}.png")
    (run,) = on_the_page(runs(tmp_path))
    assert [sample["step"] for sample in run["samples"]] == [2]
    assert caplog.text.count("is too large to be shown") == 2


def test_repeats_are_one_entry_and_evaluations_say_what_tells_them_apart(tmp_path: Path) -> None:
    """The luckiest of three seeds is no score of the run, and neither is one of fewer images."""
    folder = make_run(tmp_path, "a", 2.0)
    make_run(tmp_path, "b", 1.9, lr=0.1)
    content = json.loads((folder / "evaluations" / "r.json").read_text())
    for name, seed, images, distance in (("s", 1, 20, 1.0), ("t", 2, 20, 3.6), ("u", 0, 5, 0.1)):
        content["manifest"] |= {"seed": seed, "num_images": images}
        content["scores"]["frechet_distance"] = distance
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(content))
    a, b = on_the_page(runs(tmp_path))
    assert (
        a["scores"]["eval/frechet_distance"] == pytest.approx(2.2)
        and b["scores"]["eval/frechet_distance"] == 1.9
    )
    assert a["spreads"]["eval/frechet_distance"] == "± 1.3 (n=3)" and b["spreads"] == {}
    assert (a["verdicts"]["eval/frechet_distance"], b["verdicts"]["eval/frechet_distance"]) == (
        "unknown",
        "best",
    )
    pooled, few = a["evaluations"]
    assert (pooled["shown"], few["shown"]) == (True, False) and pooled["label"] != few["label"]
    assert "20 images, seeds 0, 1, 2" in pooled["label"] and "5 images, seed 0" in few["label"]
    by_title = {score["title"]: score for score in pooled["scores"]}
    assert by_title["Frechet distance"]["n"] == 3 and by_title["Frechet distance"]["std"] == pytest.approx(
        1.3115, rel=1e-3
    )
    assert all(score["n"] == 1 for score in few["scores"])


def test_an_odd_file_takes_only_itself_from_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", 2.0)
    content = json.loads((folder / "evaluations" / "r.json").read_text())
    content["scores"]["inception_score"]["std"] = math.nan
    content["manifest"]["images_per_second"] = math.inf
    (folder / "evaluations" / "r.json").write_text(json.dumps(content))
    for picture in ("evaluations/r.png", "samples/final/grid.png"):
        (folder / picture).write_bytes(b"")
    whole = (folder / "samples" / "step-00000006.png").read_bytes()
    (folder / "samples" / "step-00000006.png").write_bytes(whole[: len(whole) // 2])
    (run,) = on_the_page(runs(tmp_path))
    assert [sample["step"] for sample in run["samples"]] == [2] and run["pictures"] == []
    (evaluation,) = run["evaluations"]
    assert evaluation["picture"] is None and evaluation["manifest"]["images_per_second"] is None
    assert [score["std"] for score in evaluation["scores"] if "nception" in score["title"]] == [None]


def test_what_does_not_compare_has_other_judges(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 2.0)
    folder = make_run(tmp_path, "b", 1.0)
    content = json.loads((folder / "evaluations" / "r.json").read_text())
    content["manifest"]["num_images"] = 5
    (folder / "evaluations" / "r.json").write_text(json.dumps(content))
    MetricsCSV(folder / "metrics.csv", 8).log_metrics({"train/loss": math.nan}, 6)
    a, b = on_the_page(runs(tmp_path))
    assert (a["verdicts"]["eval/frechet_distance"], b["verdicts"]["eval/frechet_distance"]) == (
        "alone",
        "diverged",
    )
    assert (a["verdicts"]["val/loss"], b["verdicts"]["val/loss"], b["state"]) == ("alone", "", "diverged")
    assert a["judge"].startswith("20 images") and "not the run's own: num_images 5" in b["judge"]


def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    found = runs(write_long(tmp_path, 10_000))
    assert len(on_the_page(found)[0]["curves"]["a"]["value"]) <= MAX_POINTS
    assert write_report([RunSet(found)], tmp_path / "page.html").stat().st_size < 1_000_000


def test_each_of_500_runs_has_a_bounded_weight(tmp_path: Path) -> None:
    """A page of 31 MB opens in a second (``benchmarks/report_page.py``)."""
    report_page.write_run(tmp_path, 0, 500, report_page.sample_grids(2))
    (run,) = runs(tmp_path)
    content = json.dumps(as_json(content_of(run, limits_for([run] * 500))))
    assert 30_000 < len(content) < 65_000


@pytest.fixture
def sweeps(tmp_path: Path) -> list[str]:
    """Two sweeps that each have a run of the same name; one is a study with a claim."""
    for sweep, lr in (("first", 0.1), ("second", 0.2)):
        make_run(tmp_path / sweep, "same", 2.0, lr=lr)
    make_run(tmp_path / "second", "other", 1.0, lr=0.4, group="h")
    (tmp_path / "second" / "study.md").write_text("- other is better\n")
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_several_sweeps_are_compared_together_and_each_by_itself(sweeps: list[str], tmp_path: Path) -> None:
    data = page_data(read_sets(sweeps))
    assert [run["name"] for run in data["runs"]] == ["same (first)", "same (second)", "other"]
    together, first, second = data["views"]
    assert [view["name"] for view in data["views"]] == ["all", "first", "second"]
    assert [view["runs"] for view in data["views"]] == [[0, 1, 2], [0], [1, 2]]
    assert (first["differing"], second["differing"]) == ([], ["optimizer.lr"])
    assert together["remarks"][0] == "second: other is better" and second["remarks"][0] == "other is better"
    words = [row["verdicts"]["eval/frechet_distance"] for view in data["views"] for row in view["rows"]]
    assert words == ["unknown", "unknown", "best", "alone", "unknown", "best"]
    assert main(["report", *sweeps]) == 0 and (tmp_path / "report.html").is_file()


def test_names_of_sweeps_are_told_apart_and_no_run_counts_twice(sweeps: list[str], tmp_path: Path) -> None:
    again = shutil.copytree(sweeps[0], tmp_path / "more" / "first")
    data = page_data(read_sets([sweeps[0], str(again)]))
    assert [run["set"] for run in data["runs"]] == [sweeps[0], str(again)]
    assert len({run["name"] for run in data["runs"]}) == 2
    with pytest.raises(ValueError, match="first/same is also one of"):
        read_sets([str(tmp_path), sweeps[0]])


def copies(root: Path, count: int) -> list[Run]:
    """Many copies of a run."""
    (run,) = runs(make_run(root, "one", 1.0))
    return [dataclasses.replace(run, name=f"run-{i}", where=f"{run.where}-{i}") for i in range(count)]


def test_a_page_of_many_runs_holds_less_of_each(tmp_path: Path) -> None:
    assert limits_for(copies(tmp_path, 2)) == Limits()
    limits = limits_for(copies(tmp_path / "many", 600))
    assert limits == Limits(ALL_POINTS // (600 * 4), 1, NARROWEST)
    (run,) = runs(write_long(tmp_path / "long", MAX_POINTS))
    Image.new("RGB", (1000, 1000)).save(Path(run.where) / "samples" / "step-00000006.png")
    content = content_of(run, limits)
    (axes,) = content["axes"]  # of all metrics
    assert (
        {len(curve["value"]) for curve in content["curves"].values()}
        == {limits.points}
        == {len(axes["step"])}
    )
    assert (axes["step"][0], axes["step"][-1]) == (1, MAX_POINTS)
    (grid,) = content["samples"]
    assert grid["step"] == 6
    with Image.open(io.BytesIO(base64.b64decode(grid["picture"].partition(",")[2]))) as picture:
        assert picture.width == NARROWEST


@pytest.fixture
def page(report: Path) -> Iterator[Any]:
    """The report in a headless browser, with no network; every error of its script fails the test."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        opened, errors = context.new_page(), []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(report.as_uri())
        yield opened
        assert errors == []
        browser.close()


def test_nothing_of_the_demo_is_outside_a_window_of_1280(page: Any, tmp_path: Path) -> None:
    """Three stages with seven scores, whose settings differ as those of the demo do."""
    for name, at in (("ar_pretrain", 1), ("diffusion_head", 2), ("mrar_finetune", 3)):
        folder = make_run(tmp_path / "demo", name, float(at))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config |= {"stage": name, "init_from": f"runs/fashion/{name}"}
        config["model"] = config.get("model", {}) | {"num_references": at}
        config["flow"] = {"num_noise_draws": at}
        config["optimizer"] = {"lr": at / 1000}
        config["training"] = config.get("training", {}) | {"max_steps": at, "global_batch_size": 8 * at}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        result = json.loads((folder / "evaluations" / "r.json").read_text())
        scores = ["kernel_distance", "precision", "recall", "class_accuracy", "feature_similarity"]
        result["scores"] |= {score: 0.01234 * at for score in scores}
        (folder / "evaluations" / "r.json").write_text(json.dumps(result))
    page.goto(write_report(read_sets([str(tmp_path / "demo")]), tmp_path / "demo.html").as_uri())
    assert page.locator("#runs th").count() == 18  # with the tick
    places = "[document.documentElement, ...document.querySelectorAll('.scroll')]"
    boxes = page.evaluate(f"{places}.map(place => [place.scrollWidth, place.clientWidth])")
    assert all(inside <= window for inside, window in boxes), boxes
    assert "state finished" in page.locator("#alike").inner_text()


def test_it_works_in_a_browser(page: Any, tmp_path: Path) -> None:
    assert page.locator("#runs tr").count() == 5 and page.locator("#plot .curve").count() == 4
    page.screenshot(path=os.environ.get("REPORT_SCREENSHOT") or str(tmp_path / "page.png"), full_page=True)
    page.locator("#runs input").first.uncheck()
    assert page.locator("#plot .curve").count() == 3 and page.locator("#samples .card").count() == 3
    page.locator("#tick").select_option(label="group other")
    assert page.locator("#plot .curve").count() == 1 and page.locator("#runs input:checked").count() == 1
    page.locator("#tick").select_option(label="all")
    assert page.locator("#plot .curve").count() == 4
    page.locator("#runs input").first.uncheck()
    page.locator("th", has_text="optimizer.lr").first.click()
    page.locator("#metric").select_option("train/loss")
    page.locator("#axis").select_option("device_hours")
    page.locator("#log").check()
    box = page.locator("#plot").bounding_box()
    page.mouse.move(box["x"] + 700, box["y"] + 200)
    assert (
        "device-hours" in page.locator("#tip").inner_text() and "slow0" in page.locator("#tip").inner_text()
    )
    before = page.locator("#samples img").first.get_attribute("src")
    page.locator("#when").fill("0")
    assert page.locator("#samples img").first.get_attribute("src") != before
    assert "step 2 of 6" in page.locator("#samples").inner_text()
    page.locator("#left").select_option("0")
    page.locator("#right").select_option("2")
    assert "optimizer.lr" in page.locator("#differences").inner_text()
    page.locator("details summary").first.click()
    assert '"guidance_scale"' in page.locator("details pre").first.inner_text()


def test_a_chooser_shows_one_of_several_sweeps(page: Any, sweeps: list[str], tmp_path: Path) -> None:
    assert not page.locator("#view").is_visible()
    page.goto(write_report(read_sets(sweeps), tmp_path / "sweeps.html").as_uri())
    assert page.locator("#runs tr").count() == 4 and "from" in page.locator("#runs th").all_inner_texts()
    page.locator("#tick").select_option(label="from first")
    assert page.locator("#plot .curve").count() == 1
    page.locator("#view").select_option(label="second")
    assert page.locator("#runs tr").count() == 3 and page.locator("#plot .curve").count() == 2
    assert page.locator("#remarks").inner_text() == "other is better"
    assert page.locator("#scores .evaluation").count() == 2
    assert "from second" in page.locator("#alike").inner_text()


def test_the_page_of_many_runs_draws_only_the_first_of_each_list(page: Any, tmp_path: Path) -> None:
    found = RunSet(copies(tmp_path / "many", 150))
    page.goto(write_report([found], tmp_path / "many.html").as_uri())
    assert page.locator("#runs tr").count() == 101
    assert page.evaluate("document.querySelectorAll('*').length") < 10_000
    page.locator("#tick").select_option(label="all")
    assert page.locator("#plot .curve").count() == 150 and page.locator("#legend span.swatch").count() == 40
    page.locator("#plot").hover()
    assert "and 138 others" in page.locator("#tip").inner_text()
    page.locator("#more-runs button").click()
    assert page.locator("#runs tr").count() == 151 and page.locator("#more-runs button").count() == 0
    page.locator("#more-samples button").click()
    assert page.locator("#samples .card").count() == 48
