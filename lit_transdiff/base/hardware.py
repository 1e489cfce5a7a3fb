"""The memory and speed of devices: from their data sheets, or measured."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

GB = 1e9
MEASURE_SECONDS = 0.5


@dataclass(frozen=True)
class Device:
    """A GPU: memory in bytes, dense bfloat16 FLOP/s, and bandwidths in bytes per second."""

    memory: float
    flops: float
    bandwidth: float  # bandwidth of the memory
    link: float  # between GPUs of a node, per GPU and direction
    network: float  # between nodes of eight GPUs, per node and direction
    name: str  # part of the driver's name for it

    def collective_rate(self, gpus: int) -> float:
        """Bytes per second of a ring over ``gpus`` GPUs, which share the network cards of their node."""
        return self.link if gpus <= 8 else min(self.link, self.network)


# From data sheets. Network cards of a node: 8 x 400 Gb/s (H100 and later), 8 x 200 Gb/s (A100), else 1 x 100.
DEVICES: dict[str, Device] = {
    "b200": Device(180 * GB, 2250e12, 8000 * GB, 900 * GB, 400 * GB, "B200"),
    "h200": Device(141 * GB, 989e12, 4800 * GB, 450 * GB, 400 * GB, "H200"),
    "h100": Device(80 * GB, 989e12, 3350 * GB, 450 * GB, 400 * GB, "H100"),
    # link: PCIe 5; NVLink joins two of them only
    "h100-pcie": Device(80 * GB, 756e12, 2000 * GB, 64 * GB, 400 * GB, "H100 PCIe"),
    "a100-80gb": Device(80 * GB, 312e12, 2039 * GB, 300 * GB, 200 * GB, "A100"),
    "a100-40gb": Device(40 * GB, 312e12, 1555 * GB, 300 * GB, 200 * GB, "A100"),
    "l40s": Device(48 * GB, 362e12, 864 * GB, 32 * GB, 12.5 * GB, "L40S"),
    "rtx4090": Device(24 * GB, 165e12, 1008 * GB, 32 * GB, 12.5 * GB, "RTX 4090"),
}


@dataclass(frozen=True)
class Peak:
    """The peak FLOP/s of a device, and the source of the number."""

    flops: float
    source: str
    measured: bool


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of a device from its data sheet or, if it has none here, measured in ``dtype``."""
    known = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        return Peak(known.flops, f"dense bfloat16 of the {known.name}'s data sheet", measured=False)
    source = f"measured on products of {str(dtype).removeprefix('torch.')}"
    return Peak(measure_flops(device, dtype), source, measured=True)


def data_sheet(name: str) -> Device | None:
    """The data sheet of the GPU with the driver's ``name``; the longest match wins."""
    known = (sheet for sheet in DEVICES.values() if sheet.name in name)
    return max(known, key=lambda sheet: len(sheet.name), default=None)


@torch.no_grad()
def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of the fastest square matrix product, measured in about ``MEASURE_SECONDS``."""
    on_gpu = device.type == "cuda"
    best, at_once, start = 0.0, 10 if on_gpu else 1, time.perf_counter()
    for size in (4096, 8192) if on_gpu else (512, 1024):
        matrix = torch.linspace(-1, 1, size**2, device=device).reshape(size, size).to(dtype)
        for product in products(device):
            product(matrix, matrix)  # warm-up: kernels are chosen and loaded
            for _ in range(5):
                if best and time.perf_counter() - start > MEASURE_SECONDS:
                    return best
                wait_for(device)
                before = time.perf_counter()
                for _ in range(at_once):
                    product(matrix, matrix)
                wait_for(device)
                best = max(best, at_once * 2 * size**3 / (time.perf_counter() - before))
    return best


def products(device: torch.device) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """The matrix products of torch on a device: on CPUs by MKL, and by oneDNN as in ``models.linear``."""
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if device.type != "cpu" or onednn is None or not torch.backends.mkldnn.enabled:
        return [torch.matmul]
    return [torch.matmul, lambda a, b: onednn(a, b, None, "none", [], "none")]


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has completed all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache
def mkl_lags() -> bool:
    """Whether this CPU has AVX-512 that oneDNN uses and MKL does not, because it is not Intel's."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return bool(words := words_of_cpu()) and "GenuineIntel" not in words


@lru_cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices several times as fast as float32 ones: by instructions
    for tiles of matrices (AMX), which oneDNN's settings can forbid.

    This is not measured: on a busy machine the next start, or the next rank, might then choose otherwise.
    """
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or "DEFAULT").upper()
    allowed = limit in ("ALL", "DEFAULT") or "AMX" in limit
    return allowed and torch.backends.mkldnn.is_available() and "amx_bf16" in words_of_cpu()


def words_of_cpu() -> set[str]:
    """The words with which Linux describes the processor, among them its maker and its flags."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def fast_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision in which a device is fastest, at little cost of accuracy."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_fast_bfloat16()
    return "bf16" if fast else "fp32"


def peak_memory(device: torch.device) -> float:
    """The peak memory of this process in bytes: on its GPU, or in main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


@lru_cache
def memory_here(device: str) -> float:
    """The size in bytes of the main memory (``device`` "cpu") or of the largest GPU."""
    if device != "cpu":
        return float(
            max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        )
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
