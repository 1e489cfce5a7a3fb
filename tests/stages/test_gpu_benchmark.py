"""The benchmark of training on a GPU, at sizes for a CPU."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_gpu.several import communication
from benchmarks.on_gpu.steps import kind_of


def bench_of(tmp_path: Path, seconds: float = 60) -> gpu.Bench:
    return gpu.Bench(torch.device("cpu"), True, time.perf_counter() + seconds, tmp_path / "gpu.md")


def test_steps(tmp_path: Path):
    gpu.run(bench_of(tmp_path), ["mrar"], here=True)
    text = (tmp_path / "gpu.md").read_text()
    assert "| test, MRAR (R=4) | 2 | 0.1 | kernels, bf16 stream | torch's |" in text and "failed" not in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "matrix products"),
        ("attention_of_keys", "attention"),
        ("add_norm_backward", "residual stream"),
        ("gelu_forward", "GELU"),
        ("adamw_update", "optimizer and averages"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>", "sums"),
        ("void at::native::bfloat16_copy_kernel_cuda", "copies and casts"),
        ("triton_poi_fused_0", "other"),
    ],
)
def test_kernels_have_kinds(kernel: str, kind: str):
    assert kind_of(kernel) == kind


@pytest.mark.slow
def test_the_command_runs_tiny(tmp_path: Path):
    """All parts but those that take minutes: Triton's interpreter, other tests, several processes."""
    parts = [name for name in gpu.PARTS if name not in ("kernels", "attention", "tests", "several")]
    output = tmp_path / "gpu.md"
    command = [sys.executable, gpu.__file__, *parts, "--tiny", "--budget", "900", "--output", str(output)]
    subprocess.run(command, check=True, timeout=1000, env={**os.environ, "TRITON_INTERPRET": "1"})
    text = output.read_text()
    assert [name for name in parts if f"\n{name}: done after " not in text] == []
    assert not [line for line in text.splitlines() if "failed" in line or "left out" in line]


def hang(bench: gpu.Bench) -> None:
    time.sleep(60)


def fail(bench: gpu.Bench) -> None:
    raise RuntimeError("no memory")


def test_a_part_that_hangs_or_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {"step": (hang, 0.2), "loop": (fail, 9), "large": (gpu.about, 9), "mrar": (hang, 9)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "MINIMUM", 2)
    bench = bench_of(tmp_path, 9)
    gpu.run(bench, ["step", "loop", "large"], here=False)
    bench.end = time.perf_counter() + 1
    gpu.run(bench, ["mrar"], here=False)
    text = (tmp_path / "gpu.md").read_text()
    for line in ("step: stopped after", "loop: failed with 1", "large: done", "mrar: left out, "):
        assert line in text


@pytest.mark.parametrize(("kinds", "ms"), [(("kernel", "user_annotation"), 3.0), (("cpu_op", "cpu_op"), 5.0)])
def test_communication_is_that_of_the_device_if_there_is_one(
    tmp_path: Path, kinds: tuple[str, str], ms: float
):
    events = [
        {"name": "ncclDevKernel_AllReduce", "cat": kinds[0], "dur": 3000},
        {"name": "nccl:all_reduce", "cat": kinds[1], "dur": 2000},
        {"name": "gemm", "cat": "kernel", "dur": 7000},
        {"name": "nccl", "ph": "M"},
    ]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert communication(tmp_path / "trace.json.gz") == ms
