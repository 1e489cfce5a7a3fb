"""Everything that is measured on GPUs: training steps and their kernels, the run's loop, equality, sampling.

    python benchmarks/gpu.py                               # the most wanted parts, at most 7 minutes on a GPU
    python benchmarks/gpu.py --budget 900 --output gpu.md  # all parts, which fills every column
    python benchmarks/gpu.py profile several               # these
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny     # the same code at sizes for a CPU

Steps are those of the stage ``ar_pretrain`` (objective, backward pass, clipping, AdamW, average) in bfloat16;
``loop`` is the run's own training loop on synthetic latents, ``several`` the same on all GPUs of the machine.
MFU is the share of the data sheet's bfloat16 rate. Times are medians. Every part is a process of its own with
a time limit: one that fails or hangs says so and leaves the others alone.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA cannot be forked
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import latency
from benchmarks.on_gpu import kernels, steps
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.equality import equality
from benchmarks.on_gpu.loop import loop
from benchmarks.on_gpu.on_card import tests
from benchmarks.on_gpu.several import several

MINIMUM = 5  # seconds, without which no part begins
SLOWER = 4  # how much longer than on a GPU a part may take at a tiny size on a CPU, which may be busy


def sampling(bench: Bench, rest: bool = False) -> None:
    """The first rows of benchmarks/latency.py, with and without Triton's kernels; or the ``rest``."""
    output = Path("latency.jsonl") if bench.output is None else bench.output.with_suffix(".jsonl")
    arguments = ["--output", str(output), "--device", str(bench.device)]
    arguments += ["--after", "3"] if rest else ["--cases", "3", "--ways", "graphs", "kernels, graphs"]
    if bench.tiny:
        arguments += ["--tiny", "--cases", "3" if not rest else "4", "--ways", "eager"]
    latency.run(latency.parser().parse_args(arguments), bench.say)


# Each with the longest time that it takes, in seconds; the most wanted first.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "step": (steps.step, 50),
    "tests": (tests, 90),
    "loop": (loop, 75),
    "equality": (equality, 40),
    "large": (steps.large, 35),
    "mrar": (steps.mrar, 35),
    "sampling": (sampling, 45),
    "profile": (steps.profile, 25),
    "several": (several, 240),
    "ceilings": (kernels.ceilings, 10),
    "kernels": (kernels.kernels, 30),
    "attention": (kernels.attention, 40),
    "recompute": (steps.recompute, 60),
    "steps": (steps.steps, 120),
    "latency": (partial(sampling, rest=True), 180),
}


def about(bench: Bench) -> None:
    """The machine; in a process of its own, this also tells whether one that is forked can use the device."""
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "no GPU"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    bench.say(f"{datetime.date.today()}, {card}, {versions}, Python {sys.version.split()[0]}")


def forked(work: Callable[[Bench], None], bench: Bench, limit: float) -> int | None:
    """Do ``work`` in a process with what is imported here; its exit status, None if it was stopped."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(bench,))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def started(name: str, bench: Bench, limit: float) -> int | None:
    """A part in a new process, which imports everything again; its exit status, None if it was stopped."""
    command = [sys.executable, __file__, name, "--here", "--device", str(bench.device)]
    command += ["--tiny"] * bench.tiny + ["--budget", str(limit)]
    command += [] if bench.output is None else ["--output", str(bench.output)]
    try:
        return subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return None


def run(bench: Bench, names: list[str], here: bool) -> None:
    """The parts, each in a process of its own unless ``here``."""
    forks = not here and forked(about, bench, 30) == 0
    for name in names:
        work, limit = PARTS[name]
        left = bench.end - time.perf_counter()
        if left < MINIMUM:
            bench.say(f"\n{name}: left out, {left:.0f} s left")
            continue
        begin, limit = time.perf_counter(), min(limit * (SLOWER if bench.tiny else 1), left)
        bench.end, end = bench.end if here else begin + limit - 1, bench.end
        if here:
            bench.attempt(name, partial(work, bench))
        else:
            status = forked(work, bench, limit) if forks else started(name, bench, limit)
            ended = "stopped" if status is None else "done" if status == 0 else f"failed with {status}"
            bench.say(f"\n{name}: {ended} after {time.perf_counter() - begin:.0f} s")
        bench.end = end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all, in this order")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--budget", type=float, default=400, help="seconds for all parts")
    parser.add_argument("--here", action="store_true", help="in this process, without limits of a part")
    parser.add_argument("--output", type=Path, help="a Markdown file to which the tables are also written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), args.tiny, time.perf_counter() + args.budget, args.output)
    run(bench, args.parts or list(PARTS), args.here)


if __name__ == "__main__":
    main()
