"""The doctor finds problems between nodes, and none on a healthy machine."""

from pathlib import Path
from typing import Any

import pytest

from lit_transdiff.distributed import build_fabric
from lit_transdiff.planning import doctor
from lit_transdiff.planning.doctor import CHECKS, check_clocks, check_devices, check_versions, examine
from tests.helpers.small import FASHION


def test_a_machine_is_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "MIN_FREE", 0)
    assert examine(tmp_path / "shared", FASHION / "train") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) + 1 and all(line.startswith("ok") for line in lines)
    assert "images/s" in lines[-1] and not list((tmp_path / "shared").iterdir())


@pytest.mark.parametrize(
    "check, other, problem",
    [
        (check_clocks, lambda value: value + 5, "more than 1.0 s"),
        (check_versions, lambda value: {**value, "torch": "2.5.0"}, "'2.5.0'"),
        (check_devices, lambda value: "another GPU", "different devices"),
    ],
)
def test_nodes_that_differ_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Any, other: Any, problem: str
):
    fabric = build_fabric()
    assert check(fabric, tmp_path).problem == ""
    monkeypatch.setattr(doctor, "gather", lambda fabric, value: [value, other(value)])
    assert problem in check(fabric, tmp_path).problem


def test_little_space_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "MIN_FREE", 1e18)
    assert examine(tmp_path, None) == 1
    assert "checkpoints will not fit" in capsys.readouterr().out
