"""Peak rates of devices: the right row of the table, and measured numbers that training never exceeds."""

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_transdiff.base.hardware import DEVICES, data_sheet, measure_flops, peak_flops
from lit_transdiff.training import callbacks
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, row",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", None),
    ],
)
def test_a_gpu_has_its_own_row(name: str, row: str | None, monkeypatch: pytest.MonkeyPatch):
    known = data_sheet(name)
    assert (known.flops if known else None) == (DEVICES[row].flops if row else None)
    backwards = dict(reversed(DEVICES.items()))
    monkeypatch.setattr("lit_transdiff.base.hardware.DEVICES", backwards)
    assert data_sheet(name) == known  # whatever the order of the rows


def test_a_known_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    peak = peak_flops(torch.device("cuda", 7), torch.bfloat16)
    assert (peak.flops, peak.measured) == (756e12, False) and "H100 PCIe's data sheet" in peak.source


class Seen(TorchDispatchMode):
    """The number types of all matrix products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "mm" in func.name() or "linear" in func.name():
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_in_what_is_computed_in_and_soon(dtype: torch.dtype):
    generator = torch.get_rng_state()
    measure_flops(CPU, dtype)  # the first products load their kernels
    start = time.process_time()
    with Seen() as seen:
        flops = measure_flops(CPU, dtype)
    assert time.process_time() - start < 2 and seen.dtypes == {dtype} and flops > 1e8
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_best_is_no_less_than_a_product_of_another_size():
    a = torch.ones(700, 700)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    assert 2 * 700**3 / min(times) < 2 * measure_flops(CPU, torch.float32)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_run_says_what_its_mfu_is_a_share_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(
        callbacks, "peak_flops", lambda device, dtype: asked.append(dtype) or peak_flops(device, dtype)
    )
    said: list[str] = []
    monkeypatch.setattr(callbacks, "rank_zero_info", said.append)
    run = small_run(tmp_path, training={"precision": precision, "max_steps": 4})
    train(run, say=lambda text: None)
    assert asked == [dtype] and f"measured on products of {str(dtype)[6:]}" in said[0]
    with open(run.folder / "metrics.csv", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["metric"].startswith("throughput/peak_") and row["value"]
        ]
    found = {row["metric"]: float(row["value"]) for row in rows}
    assert found["throughput/peak_tflops"] == pytest.approx(peak_flops(CPU, dtype).flops / 1e12)
    assert found["throughput/peak_is_measured"] == 1 and len(found) == 3  # with the memory's
