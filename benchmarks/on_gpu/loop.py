"""The run's own training loop on synthetic latents."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import data_wait
from benchmarks.on_gpu.bench import Bench
from lit_transdiff.config import RunConfig


def loop(bench: Bench) -> None:
    """``lit-transdiff train`` without checkpoints: Lightning, loader, callbacks, log."""
    changes = [
        ["training.residual_dtype=bf16"],
        ["training.kernels=false", "training.compile=false", "training.cuda_graphs=false"],
        [],
    ]
    bench.table(
        "the run's loop, base, 32 rows", "ms per step", "images/s", "data wait", "peak GB", "made in, s",
        "first step after, s",
    )  # fmt: skip
    steps, every, rows = (4, 2, 2) if bench.tiny else (40, 10, 32)
    more = [f"training.micro_batch_size={rows}", *(data_wait.SMALL if bench.tiny else [])]
    with tempfile.TemporaryDirectory() as folder:
        data_wait.make_data(Path(folder))
        for i, change in enumerate(changes[: 1 if bench.tiny else None]):
            settings = [*more, *change, f"name=loop-{i}", f"training.log_every={every}"]
            run = data_wait.run_of(Path(folder), "imagenet256/ar_base.yaml", 0, steps, rows, settings)
            bench.attempt(f"loop {change}", partial(measure_loop, bench, " ".join(change), run, rows))


def measure_loop(bench: Bench, name: str, run: RunConfig, rows: int) -> None:
    found = data_wait.measure(run)
    middle = {metric: statistics.median(values[1:]) for metric, values in found.items() if len(values) > 1}
    ms = rows * 1e3 / middle["images_per_second"]
    bench.row(
        name or "as it is", f"{ms:.1f}", f"{rows * 1e3 / ms:.0f}", f"{middle['data_wait_fraction']:.2%}",
        f"{middle['peak_memory_gb']:.1f}", *(f"{found[key][0]:.1f}" for key in data_wait.STARTS),
    )  # fmt: skip
