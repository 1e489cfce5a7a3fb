"""The tests of what only a GPU runs: kernels, blocks and graphs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.on_gpu.bench import Bench

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/kernels/test_kernels.py",
    "tests/models/test_kernel_blocks.py",
    "tests/models/test_drawing_blocks.py",
    "tests/stages/test_graph.py",
    "tests/sampling/test_graphs.py",
)


def tests(bench: Bench) -> None:
    """Each file in a process of its own, so that one that hangs leaves the others alone."""
    bench.table("tests on this device", "result")
    for file in TESTS[:1] if bench.tiny else TESTS:
        left = max(1.0, bench.end - time.perf_counter() - 5)
        more = ["-k", "seeds"] if bench.tiny else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, *more]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
            lines = (done.stdout + done.stderr).strip().splitlines()
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            bench.row(file, "; ".join([*failed, *lines[-1:]])[:300].replace("|", "/"))
        except subprocess.TimeoutExpired:
            bench.row(file, f"stopped after {left:.0f} s")
