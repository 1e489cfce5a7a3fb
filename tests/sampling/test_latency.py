"""The benchmark of the time that images take, and its page."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import latency


def test_a_page_has_what_was_measured_and_says_what_was_not(tmp_path: Path):
    (row,) = latency.measured(latency.TINY[0], ["eager"], torch.device("cpu"), "fp32", 1)
    assert row["ms"] > 0 and row["difference"] == 0 and row["family"] == "TransDiff" and row["way"] == "eager"
    case, about = latency.PLAN[1], {"machine": "a card", "precision": "bf16", "date": "today"}
    rows = [{**row, **asdict(case), **about, "ms": ms} for ms in (128.0, 640.0)]  # the later one counts
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    page = latency.tables(file)
    assert "- a card, bf16, today" in page and "## Quality by steps" in page
    lines = [line for line in page.splitlines() if line.startswith(f"| {case.family} | {case.size} | ")]
    assert f"| {case.batch} | {case.steps} | 640 ({640 / case.batch:.2f}) | not measured |" in lines[1]
    assert "not measured" in lines[0] and "640" not in lines[0]


def test_the_page_in_the_repository_is_of_the_measurements_in_it():
    folder = Path(latency.__file__).parent
    assert latency.tables(folder / "latency.jsonl") + "\n" == (folder / "latency.md").read_text()


def test_each_way_is_a_generator_of_its_own():
    plain = latency.generator_of(replace(latency.TINY[0]), torch.device("cpu"), "bf16")
    assert plain.precision == "bf16" and all(p.any() for p in plain.model.parameters())
