"""Profiles of training steps and of sampling: they can be read, and change nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.__main__ import main
from lit_transdiff.config import RunConfig
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

STEPS = {"max_steps": 4, "checkpoint_every": 2, "sample_every": 0}


def quietly(run: RunConfig) -> Path:
    return train(run, say=lambda text: None).folder


def operations(folder: Path) -> list[str]:
    """The names of the operations in a trace, as Perfetto reads them."""
    with gzip.open(folder / "trace.json.gz") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]


def test_a_profile_of_steps_changes_no_bit(tmp_path: Path):
    plain = quietly(small_run(tmp_path, name="plain", training=STEPS))
    profiled = quietly(small_run(tmp_path, name="profiled", training={**STEPS, "profile_steps": [2, 3]}))
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (plain, profiled))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (folder,) = (profiled / "profile").iterdir()
    assert folder.name == "steps-2-3"
    names = operations(folder)
    assert "aten::scaled_dot_product_attention" in names and "aten::copy_" in names
    tables = (folder / "operations.txt").read_text()
    assert tables.startswith("By time") and "By memory" in tables and "aten::" in tables


def test_every_step_is_recorded_once(tmp_path: Path):
    def updates(first: int, last: int) -> int:
        run = small_run(
            tmp_path, name=f"from-{first}-to-{last}", training={**STEPS, "profile_steps": [first, last]}
        )
        return operations(quietly(run) / "profile" / f"steps-{first}-{last}").count("aten::_fused_adamw_")

    assert updates(2, 3) == 2 * updates(2, 2) > 0


def test_steps_beyond_the_end_are_cut_there(tmp_path: Path):
    folder = quietly(small_run(tmp_path, training={**STEPS, "profile_steps": [4, 9]}))
    assert operations(folder / "profile" / "steps-4-9")


@pytest.mark.parametrize("steps", [[3], [5, 4], [0, 2], [1, 101], [1, 2, 3]])
def test_other_steps_are_refused(tmp_path: Path, steps: list[int]):
    with pytest.raises(
        ValueError, match=r"training\.profile_steps: got .*; allowed: \[\], or the first and last of"
    ):
        small_run(tmp_path, training={"profile_steps": steps})


def test_sampling_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = quietly(small_run(tmp_path, training=STEPS))
    command = [
        "sample",
        "--checkpoint",
        str(folder),
        "--per-class",
        "1",
        "--classes",
        "0",
        "--output",
        str(tmp_path / "drawn"),
    ]
    assert main([*command, "--profile", "sampling.num_steps=1"]) == 0
    assert "aten::scaled_dot_product_attention" in operations(tmp_path / "drawn" / "profile")
    assert f"profile: {tmp_path / 'drawn' / 'profile'}\n" in capsys.readouterr().out
    assert (tmp_path / "drawn" / "grid.png").is_file()
