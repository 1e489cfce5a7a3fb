"""Every block of docs/extending.md runs, and what it adds is used in a run."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_transdiff
from lit_transdiff.evaluation.statistics import reference_statistics, save_statistics
from tests.helpers.small import ROOT, small_run

TEXT = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", TEXT, flags=re.MULTILINE | re.DOTALL)


pytestmark = pytest.mark.usefixtures("fresh_tables")


def test_there_is_a_block_for_every_table():
    added = {name for _, code in BLOCKS for name in re.findall(r"^([A-Z_]+)\[", code, flags=re.MULTILINE)}
    assert added == {*lit_transdiff.TABLES}
    listed = {name for name in re.findall(r"^\| \[?`([A-Z_]+)`", TEXT, flags=re.MULTILINE)}
    assert listed == {*lit_transdiff.TABLES}


def test_a_run_of_all_the_examples(tmp_path: Path):
    for _, code in BLOCKS:
        exec(code, {})
    changes: dict[str, Any] = {
        "autoencoder": {"kind": "halves"},
        "flow": {"objective": "absolute", "loss_terms": {"energy": 0.01}, "density": "towards_noise"},
        "optimizer": {"name": "nadam", "schedule": "linear"},
        "sampling": {"solver": "midpoint", "grid": "square", "guidance": "late", "guidance_scale": 2.0, "num_steps": 2},
        "evaluation": {"extractor": "brightness", "extractor_weights": __file__, "num_images": 4, "batch_size": 4},
        "training": {"max_steps": 3, "callbacks": ["milestones"]},
    }
    run = small_run(tmp_path, **changes)
    assert lit_transdiff.train(run, say=lambda text: None).step == 3
    reference = reference_statistics([torch.rand(20, 1, 32, 32)], lit_transdiff.EXTRACTORS["brightness"](""))
    save_statistics(reference, tmp_path / "reference.npz")
    settings = replace(run.evaluation, metrics=["mean_distance", "frechet_distance"], reference=str(tmp_path / "reference.npz"))
    found = lit_transdiff.evaluate(lit_transdiff.load_generator(run.folder), settings, run.sampling, output=tmp_path / "scores")
    assert 0 < found["scores"]["mean_distance"] ** 2 <= found["scores"]["frechet_distance"]


def test_the_midpoint_rule_of_the_page_is_of_second_order():
    exec(dict(BLOCKS)["Solvers, grids and guidance"], {})
    solver = lit_transdiff.SOLVERS["midpoint"]
    errors = []
    for steps in (10, 20):  # dx/dt = x from t = 1 to 0: x(0) = x(1) / e
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        x = solver(lambda x, t: x, torch.ones(1, dtype=torch.float64), times, None, None)
        errors.append(abs(x.item() - math.exp(-1)))
    assert 3.5 < errors[0] / errors[1] < 4.5
