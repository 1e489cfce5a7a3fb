"""Checks of a machine or an allocation before a run. Under torchrun all ranks check and the first reports."""

from __future__ import annotations

import os
import platform
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from lit_transdiff.base.files import free_bytes
from lit_transdiff.checkpoints.run_folder import git_commit, package_versions
from lit_transdiff.config import DataConfig
from lit_transdiff.data.index import read_index
from lit_transdiff.data.remote_shards import reader_of
from lit_transdiff.distributed import build_fabric

BYTES = 64 << 20  # size of the message in the all-reduce benchmark
MAX_SKEW = 1.0  # seconds by which the clocks of nodes may differ
MIN_FREE = 20e9  # bytes that should be free in the shared folder
READ_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``problem`` describes a fault and its remedy; it is empty if all is well."""

    what: str
    found: str
    problem: str = ""


def gather(fabric: Fabric, value: Any) -> list[Any]:
    """Gather the values of all ranks on every rank."""
    values: list[Any] = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def check_devices(fabric: Fabric, folder: Path) -> Finding:
    """The device of each rank."""
    name = "CPU"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(fabric.device)
        name = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    names = Counter(gather(fabric, name))
    found = ", ".join(f"{count} x {device}" for device, count in names.items())
    problem = "ranks have different devices; the slowest decides" if len(names) > 1 else ""
    return Finding("devices", f"{fabric.world_size} rank(s): {found}", problem)


def check_bandwidth(fabric: Fabric, folder: Path) -> Finding:
    """The bus bandwidth of an all-reduce: message size over time, times 2 (n - 1) / n."""
    if fabric.world_size == 1:
        return Finding("all-reduce", "one rank: nothing to send")
    message, times = torch.ones(BYTES // 4, device=fabric.device), []
    for _ in range(5):
        fabric.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(message)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rate = 2 * (fabric.world_size - 1) / fabric.world_size * BYTES / statistics.median(times[1:])
    slowest = min(gather(fabric, rate))
    backend = torch.distributed.get_backend()
    problem = "gloo between GPUs: NCCL is missing" if backend == "gloo" and torch.cuda.is_available() else ""
    return Finding(
        "all-reduce", f"{slowest / 1e9:.2f} GB/s over {backend} ({BYTES >> 20} MiB, median of 4)", problem
    )


def check_shared_folder(fabric: Fabric, folder: Path) -> Finding:
    """Whether all ranks see a file that the first rank writes, and the free space."""
    token = gather(fabric, secrets.token_hex(8))[0]
    file = folder / f".doctor-{token}"
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
    fabric.barrier()
    deadline, seen = time.monotonic() + 30, False
    while not seen and time.monotonic() < deadline:
        seen = file.exists() and file.read_text() == token
        time.sleep(0 if seen else 0.2)
    blind = sorted({host for host, ok in gather(fabric, (platform.node(), seen)) if not ok})
    fabric.barrier()
    if fabric.is_global_zero:
        file.unlink()
        free = free_bytes(folder)
    else:
        free = 0
    problem = f"{', '.join(blind)}: do not see what the first rank writes" if blind else ""
    if fabric.is_global_zero and free < MIN_FREE and not problem:
        problem = f"less than {MIN_FREE / 1e9:.0f} GB free: checkpoints will not fit for long"
    return Finding("shared folder", f"{folder}: {free / 1e9:.0f} GB free", problem)


def check_clocks(fabric: Fabric, folder: Path) -> Finding:
    """The skew between the clocks, which must be small for shared file systems and logs."""
    fabric.barrier()
    clocks = gather(fabric, time.time())
    skew = max(clocks) - min(clocks)
    return Finding(
        "clocks", f"{skew:.3f} s apart", f"more than {MAX_SKEW} s: set them (NTP)" if skew > MAX_SKEW else ""
    )


def check_versions(fabric: Fabric, folder: Path) -> Finding:
    """Whether Python, the packages and the commit of this code are the same on every rank."""
    versions = {"python": platform.python_version(), "commit": str(git_commit()), **package_versions()}
    everywhere = gather(fabric, versions)
    by_name = {name: {node[name] for node in everywhere} for name in versions}
    different = [f"{name}: {sorted(several)}" for name, several in by_name.items() if len(several) > 1]
    found = f"Python {versions['python']}, torch {versions['torch']}, lightning {versions['lightning']}"
    return Finding("versions", found, "; ".join(different))


def check_threads(fabric: Fabric, folder: Path) -> Finding:
    """The CPU cores for the ranks of this node and their data workers."""
    cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    problem = f"{ranks} ranks share {cores} cores; leave OMP_NUM_THREADS=1" if ranks > cores else ""
    threads = f"{torch.get_num_threads()} thread(s) per rank"
    return Finding("cores", f"{cores} per node for {ranks} rank(s), {threads}", problem)


def check_shards(fabric: Fabric, shards: str) -> Finding:
    """The rate at which all ranks together read undecoded samples of a folder of shards in random order."""
    index = read_index(shards)
    reader = reader_of(index, DataConfig(), max_open=64)
    generator = torch.Generator().manual_seed(fabric.global_rank)
    fabric.barrier()
    count, size, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < READ_SECONDS:
        size += len(reader.read(int(torch.randint(len(index), (1,), generator=generator))))
        count += 1
    both = gather(fabric, (count / READ_SECONDS, size / READ_SECONDS))
    samples, rate = sum(c for c, _ in both), sum(s for _, s in both)
    speed = f"{samples:,.0f} {index.kind}/s, {rate / 1e6:,.0f} MB/s, all ranks together, undecoded"
    return Finding("shards", f"{shards}: {speed}")


CHECKS: dict[str, Callable[[Fabric, Path], Finding]] = {
    "devices": check_devices,
    "threads": check_threads,
    "bandwidth": check_bandwidth,
    "shared folder": check_shared_folder,
    "clocks": check_clocks,
    "versions": check_versions,
}


def examine(folder: Path, shards: str | None) -> int:
    """Run all checks and print the report; return 0 if there is no problem, else 1."""
    fabric = build_fabric()
    findings = [check(fabric, folder) for check in CHECKS.values()]
    if shards is not None:
        findings.append(check_shards(fabric, shards))
    for finding in findings:
        fabric.print(f"{'PROBLEM' if finding.problem else 'ok':8}{finding.what:15}{finding.found}")
        if finding.problem:
            fabric.print(f"{'':23}{finding.problem}")
    bad = any(finding.problem for finding in findings)
    if fabric.is_global_zero:
        sys.stdout.flush()
    fabric.barrier()
    return int(bad)
