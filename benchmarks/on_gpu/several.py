"""The run's loop on several GPUs, by strategy, with the share of the time that is spent in communication.

Started by ``benchmarks/gpu.py several`` through torchrun; on CPUs of a tiny size with two processes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import data_wait
from benchmarks.on_gpu.bench import Bench

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ddp", "zero1", "zero2", "fsdp")
PROFILED = 2  # steps
COLLECTIVE = ("nccl", "gloo:")  # beginnings of the names of what communicates, in a trace


def several(bench: Bench) -> None:
    """One GPU, then each strategy on all of them, with equal rows a GPU."""
    gpus = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    if gpus < 2:
        return bench.say("\nseveral GPUs: not measured, there is one")
    bench.table("strategy", "GPUs", "ms per step", "images/s", "slower than one", "in communication")
    with tempfile.TemporaryDirectory() as folder:
        data_wait.make_data(Path(folder))
        alone: float | None = None
        counts = [1, 2, *([gpus] if gpus > 2 else [])]
        for number in counts:
            for strategy in ("single",) if number == 1 else STRATEGIES[: 1 if bench.tiny else None]:
                found = started(bench, Path(folder), strategy, number)
                if found is None:
                    bench.row(strategy, number, "failed or out of time", "", "", "")
                    continue
                ms, share = found["ms"], found["communication"]
                alone = alone or ms
                rate = number * found["rows"] * 1e3 / ms
                bench.row(
                    strategy, number, f"{ms:.1f}", f"{rate:.0f}", f"{ms / alone - 1:.1%}", f"{share:.1%}"
                )


def started(bench: Bench, folder: Path, strategy: str, number: int) -> dict[str, float] | None:
    """The measurements of the first rank; None if the processes failed."""
    result = folder / f"{strategy}-{number}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command += ["-m", __name__, str(folder), strategy, str(result), *["--tiny"] * bench.tiny]
    try:
        subprocess.run(command, cwd=ROOT, timeout=max(1.0, bench.end - time.perf_counter()), check=True)
    except subprocess.SubprocessError:
        return None
    return json.loads(result.read_text()) if result.exists() else None


def measure(folder: Path, strategy: str, result: Path, tiny: bool) -> None:
    """The loop of one rank, of which the last steps are profiled."""
    number, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    steps, every, rows = (4, 1, 2) if tiny else (40, 10, 32)
    more = [
        f"distributed.strategy={strategy}",
        f"training.micro_batch_size={rows}",
        f"name={strategy}-{number}",
    ]
    more += [f"training.log_every={every}", f"training.profile_steps=[{steps + 1 - PROFILED},{steps}]"]
    more += data_wait.SMALL if tiny else ["training.residual_dtype=bf16"]
    run = data_wait.run_of(folder, "imagenet256/ar_base.yaml", 0, steps, rows * number, more)
    found = data_wait.measure(run)
    if rank == 0:
        rate = statistics.median(found["images_per_second"][1 : -1 if not tiny else None])  # not profiled
        ms = rows * number * 1e3 / rate
        (trace,) = run.folder.glob("profile/*/trace.json.gz")
        apart = communication(trace) / PROFILED
        result.write_text(json.dumps({"ms": ms, "communication": apart / ms, "rows": rows}))


def communication(trace: Path) -> float:
    """The ms of all collective operations in a trace: kernels of NCCL, or operations of gloo."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("name", "").startswith(COLLECTIVE) and "dur" in event]
    kernels = [event for event in found if event.get("cat") == "kernel"]
    return sum(event["dur"] for event in kernels or found) / 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("strategy")
    parser.add_argument("result", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    measure(args.folder, args.strategy, args.result, args.tiny)
