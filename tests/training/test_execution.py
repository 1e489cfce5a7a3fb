"""The record of a run about its computation, and the settings behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_transdiff.config import RunConfig
from lit_transdiff.models import execution as execution_of_models
from lit_transdiff.stages import STAGES
from lit_transdiff.training import execution
from lit_transdiff.training.execution import FirstStep, execution_of, matmul_precision
from tests.helpers.small import NO_DROPOUT, small_run


def said(folder: Path, **changes: Any) -> dict[str, Any]:
    run = small_run(folder, **changes)
    return execution_of(run, STAGES[run.stage](run))


def test_on_a_cpu_nothing_of_a_gpu_is_used(tmp_path: Path):
    found = said(tmp_path, model=NO_DROPOUT, training={"matmul_precision": "high"})
    assert found == {
        "dtype": "float32",
        "matmul_precision": "high",
        "kernels": False,
        "compile": False,
        "cuda_graphs": False,
        "attention": ["flash_attention"],
    }
    assert said(tmp_path)["attention"] == ["math"]  # torch has no fused one with dropout there


def test_in_bfloat16_a_cpu_has_its_own_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    half = {"precision": "bf16-mixed", "compile": True}
    for able, kernel in ((True, "cpu_bf16"), (False, "math")):
        monkeypatch.setattr(execution, "multiplies_bfloat16", lambda able=able: able)
        found = said(tmp_path, training=half)
        assert found["attention"] == [kernel] and found["dtype"] == "bfloat16" and found["compile"]


@pytest.mark.parametrize(
    ("changes", "kernels", "graphs", "attention"),
    [
        ({}, True, True, ["triton"]),
        ({"kernels": False, "activation_checkpointing": "all"}, False, False, ["asked"]),
        ({"precision": "fp32"}, False, True, ["asked"]),
    ],
)
def test_on_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kernels: bool,
    graphs: bool,
    attention: list[str],
):
    def gpu(run: RunConfig) -> tuple[str, int]:
        return "gpu", 1

    monkeypatch.setattr(execution, "accelerator_and_devices", gpu)
    dtype = torch.float32 if changes.get("precision") else torch.bfloat16
    monkeypatch.setattr(execution, "compute_dtype", lambda run: dtype)
    monkeypatch.setattr(execution, "attention_of", lambda *args: "triton" if args[-1] else "asked")
    found = said(tmp_path, training=changes)
    assert (found["kernels"], found["cuda_graphs"], found["attention"]) == (kernels, graphs, attention)
    assert found["compile"] is not kernels


def test_the_precision_of_products_is_that_of_the_run_alone():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_compiled_code_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, "elsewhere")
    execution_of_models.keep_compiled()
    assert execution_of_models.os.environ[name] == "elsewhere"
    monkeypatch.delenv(name)
    execution_of_models.keep_compiled()
    assert execution_of_models.os.environ[name] == str(tmp_path / "lit-transdiff" / "compiled")
    monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    execution_of_models.keep_compiled()
    assert name not in execution_of_models.os.environ


def test_the_time_of_the_first_step_is_said_once(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(execution, "rank_zero_info", lines.append)
    first = FirstStep()
    first.on_train_start(None, None)  # type: ignore[arg-type]
    first.on_train_batch_end()
    first.on_train_batch_end()
    assert len(lines) == 1 and first.seconds is not None and f"{first.seconds:.1f} s" in lines[0]
