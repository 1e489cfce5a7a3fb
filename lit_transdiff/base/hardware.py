"""What devices can do: from their makers' data sheets, or measured where there is none."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

GB = 1e9
MEASURE_SECONDS = 0.5


@dataclass(frozen=True)
class Device:
    """A GPU: memory in bytes, dense bfloat16 operations a second, and the bytes a second that collectives move."""

    memory: float
    flops: float
    link: float  # of a GPU to the others of its node, one direction
    network: float  # of a node of eight to the others, one direction
    name: str  # a part of the name that the driver gives

    def collective_rate(self, gpus: int) -> float:
        """Bytes a second at which a ring over so many GPUs sends; its hops between nodes are shared by all cards of a node."""
        return self.link if gpus <= 8 else min(self.link, self.network)


# Data sheets of the makers; network: eight 400 Gb/s cards a node for H100 and later, eight of 200 Gb/s for A100, else one of 100.
DEVICES: dict[str, Device] = {
    "b200": Device(180 * GB, 2250e12, 900 * GB, 400 * GB, "B200"),
    "h200": Device(141 * GB, 989e12, 450 * GB, 400 * GB, "H200"),
    "h100": Device(80 * GB, 989e12, 450 * GB, 400 * GB, "H100"),
    "h100-pcie": Device(80 * GB, 756e12, 64 * GB, 400 * GB, "H100 PCIe"),  # link: PCIe 5; NVLink joins two of them only
    "a100-80gb": Device(80 * GB, 312e12, 300 * GB, 200 * GB, "A100"),
    "a100-40gb": Device(40 * GB, 312e12, 300 * GB, 200 * GB, "A100"),
    "l40s": Device(48 * GB, 362e12, 32 * GB, 12.5 * GB, "L40S"),
    "rtx4090": Device(24 * GB, 165e12, 32 * GB, 12.5 * GB, "RTX 4090"),
}


@dataclass(frozen=True)
class Peak:
    """Operations a second of a device at its best, and where the number is from."""

    flops: float
    source: str
    measured: bool


@lru_cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """What a device does at its best: as its data sheet says, or measured in the ``dtype`` that is computed in."""
    known = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        return Peak(known.flops, f"dense bfloat16 of the {known.name}'s data sheet", measured=False)
    return Peak(measure_flops(device, dtype), f"measured on products of {str(dtype).removeprefix('torch.')}", measured=True)


def data_sheet(name: str) -> Device | None:
    """The row of the GPU to which the driver gives ``name``; of several that fit, the one that says most."""
    return max((known for known in DEVICES.values() if known.name in name), key=lambda known: len(known.name), default=None)


@torch.no_grad()
def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of some square products, which take ``MEASURE_SECONDS`` or little more."""
    on_gpu = device.type == "cuda"
    best, at_once, start = 0.0, 10 if on_gpu else 1, time.perf_counter()
    for size in (4096, 8192) if on_gpu else (512, 1024):
        matrix = torch.linspace(-1, 1, size**2, device=device).reshape(size, size).to(dtype)
        for product in products(device):
            product(matrix, matrix)  # kernels are chosen and loaded
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
    """The ways in which torch multiplies matrices on a device: on CPUs by MKL, and by oneDNN as ``models.linear`` does."""
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if device.type != "cpu" or onednn is None or not torch.backends.mkldnn.enabled:
        return [torch.matmul]
    return [torch.matmul, lambda a, b: onednn(a, b, None, "none", [], "none")]


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache
def mkl_lags() -> bool:
    """Whether this CPU has AVX-512 that MKL does not use, since the processor is not its maker's, and oneDNN does."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has held: on its GPU, or in main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


@lru_cache
def memory_here(device: str) -> float:
    """All bytes of this machine's main memory (``device`` "cpu"), or of its largest GPU."""
    if device != "cpu":
        return float(max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())))
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
