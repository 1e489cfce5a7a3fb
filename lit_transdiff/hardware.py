"""What devices can do: from their makers' data sheets, or measured where there is none."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

GB = 1e9


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
    "a100-80gb": Device(80 * GB, 312e12, 300 * GB, 200 * GB, "A100"),
    "a100-40gb": Device(40 * GB, 312e12, 300 * GB, 200 * GB, "A100"),
    "l40s": Device(48 * GB, 362e12, 32 * GB, 12.5 * GB, "L40S"),
    "rtx4090": Device(24 * GB, 165e12, 32 * GB, 12.5 * GB, "RTX 4090"),
}


@lru_cache
def peak_flops(device: torch.device) -> float:
    """Operations a second of a device at its best: the data sheet's, or those of the fastest of some matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known in DEVICES.values():
            if known.name in name:
                return known.flops
    size, times = 1024, []
    matrix = torch.ones(size, size, device=device)
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


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
