"""The share of training time that is spent waiting for cached latents, at a size of the paper.

    OMP_NUM_THREADS=1 python benchmarks/data_wait.py
    OMP_NUM_THREADS=1 python benchmarks/data_wait.py --rate 2000 --steps 120   # a stand-in for a fast GPU
    OMP_NUM_THREADS=1 python benchmarks/data_wait.py --rate 2000 --steps 120 --workers 0 --busy

The training loop of a run, with the callback that measures, on synthetic latents of real shapes; without
checkpoints and sample grids. The numbers are those that every run logs. With ``--busy``, for a machine with
other work, time is that of this process on a processor, and the stand-in's: what an idle core would take.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.data_reading import SHAPE, latent, write_shards
from lit_transdiff.checkpoints.run_folder import open_folder
from lit_transdiff.config import AutoencoderTraining, RunConfig
from lit_transdiff.config.loading import load_run
from lit_transdiff.data.index import LatentInfo
from lit_transdiff.distributed import compute_dtype
from lit_transdiff.models.autoencoder import KLAutoencoder
from lit_transdiff.tracking.loggers import MetricsCSV
from lit_transdiff.training.build import build
from lit_transdiff.training.callbacks import LogTraining
from lit_transdiff.training.execution import FirstStep
from lit_transdiff.training.profiling import ProfileSteps
from lit_transdiff.training.rhythm import Rhythm
from lit_transdiff.training.trainer import build_trainer

ROOT = Path(__file__).parent.parent
LATENTS = 2048
SMALL = [f"model.{name}" for name in ("width=32", "num_heads=2", "encoder_blocks=2", "decoder_blocks=2")]
METRICS = ("images_per_second", "data_wait_fraction", "peak_memory_gb")
STARTS = (
    "seconds_to_make",
    "seconds_to_first_step",
)  # the model and its data; of the first step


def make_data(root: Path) -> None:
    """Latent shards, and a small autoencoder of the same latents to which they belong; it is not called."""
    settings = AutoencoderTraining(block_channels=[8] * 5, latent_channels=SHAPE[0] // 2)
    autoencoder = KLAutoencoder.new(settings, image_channels=3, image_size=256)
    autoencoder.save(root / "autoencoder")
    info = LatentInfo(SHAPE, 2, autoencoder.fingerprint, 256)
    write_shards(root / "latents", LATENTS, "bin", latent, info, classes=1000)


def run_of(
    root: Path, recipe: str, workers: int, steps: int, batch: int, more: Sequence[str] = ()
) -> RunConfig:
    changes = [
        f"output_dir={root}",
        f"name=workers-{workers}",
        f"data.train={root / 'latents'}",
        "data.crop=center",
    ]
    changes += [
        f"data.num_workers={workers}",
        f"autoencoder.path={root / 'autoencoder'}",
        "training.log_every=1",
    ]
    changes += [
        f"training.max_steps={steps}",
        f"training.global_batch_size={batch}",
        "training.micro_batch_size=1",
    ]
    changes += ["optimizer.warmup_steps=0", "training.sample_every=0", "evaluation.every=0"]
    precision = [] if torch.cuda.is_available() else ["training.precision=fp32"]
    return load_run(ROOT / "experiments" / recipe, [*changes, *precision, *more])


class StandIn:
    """An objective without a network, which ends when a device of ``rate`` images per second would.

    As that would, it works on while the host prepares the next batch; the host can be ahead by one step.
    """

    def __init__(self, model: torch.nn.Module, rate: float) -> None:
        self.rate, self.parameters = rate, [*model.parameters()]
        self.begin = self.free = 0.0  # when the second step began, and when all work will be done
        self.idle = -1.0  # seconds without work since the second step

    def __call__(self, moments: Tensor, *more: object) -> tuple[Tensor, Tensor]:
        now = time.perf_counter()
        if self.begin == 0.0 and self.free > 0.0:
            self.begin, self.idle, self.free = now, 0.0, now
        self.idle += max(0.0, now - self.free) if self.begin else 0.0
        if now < self.free:
            time.sleep(self.free - now)
        self.free = max(now, self.free) + len(moments) / self.rate
        loss = sum(p.flatten()[0] for p in self.parameters) * torch.ones(len(moments))
        return loss, torch.zeros(len(moments))


class ProcessorClock:
    """A clock that stands still while other processes run, and goes forward when someone sleeps."""

    def __init__(self) -> None:
        self.slept = 0.0

    def now(self) -> float:
        return time.process_time() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def __enter__(self) -> None:
        self.patches = [mock.patch("time.perf_counter", self.now), mock.patch("time.sleep", self.sleep)]
        for patch in self.patches:
            patch.start()

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def measure(run: RunConfig, rate: float | None = None) -> dict[str, list[float]]:
    """Metric -> its value in every logged step but the first, in which workers start; and the times of
    ``STARTS``. With ``rate``, the device is a stand-in that computes so many images per second, and
    ``device_idle`` is the share of the time in which it has no work.
    """
    start = time.perf_counter()
    parts = build(run)
    device = None if rate is None else StandIn(parts.stage.model, rate)
    if device is not None:
        parts.stage.losses = device  # type: ignore[assignment]
    rank_zero_only(open_folder)(run)
    steps = run.training.profile_steps
    profile = [ProfileSteps(steps, run.folder / "profile")] if steps else []
    rhythm = Rhythm(run, [LogTraining(run, compute_dtype(run)), *profile])
    first, made = FirstStep(), time.perf_counter()
    trainer = build_trainer(
        parts, [*rhythm.callbacks, first], [MetricsCSV(run.folder / "metrics.csv", run.images_per_step)]
    )
    trainer.fit(parts.stage, datamodule=parts.data)
    assert first.seconds is not None
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    with open(run.folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            name = row["metric"].removeprefix("throughput/")
            if name in found and int(row["step"]) > 1:
                found[name].append(float(row["value"]))
    found |= dict(zip(STARTS, ([made - start], [first.seconds]), strict=True))
    if device is not None:
        found["device_idle"] = [device.idle / (device.free - device.begin)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="imagenet256/ar_base.yaml", help="below experiments/")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, help="images of a step (default: 2, in passes of one)")
    parser.add_argument("--busy", action="store_true", help="count the time on a processor, without workers")
    parser.add_argument("--rate", type=float, help="images per second of a stand-in for the device")
    args = parser.parse_args()
    if args.busy and args.workers != [0]:
        parser.error("--busy needs --workers 0: the time of other processes is not known")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}"
    )
    heads = ("workers", "images/s", "data wait fraction (highest)", "device without work", "peak memory, GB")
    print("| " + " | ".join(heads) + " | load |\n" + "|---" * (len(heads) + 1) + "|")
    batch = args.batch or (2 if args.rate is None else 256)
    more = [f"training.micro_batch_size={batch}", "training.log_every=10"]
    more = [] if args.rate is None else [*SMALL, *more]
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for workers in args.workers:
            run = run_of(Path(folder), args.recipe, workers, args.steps, batch, more)
            with ProcessorClock() if args.busy else nullcontext():
                found = measure(run, args.rate)
            speed, wait, memory = (statistics.median(found[name]) for name in METRICS)
            highest = max(found["data_wait_fraction"])
            idle = "not asked" if args.rate is None else f"{found['device_idle'][0]:.2e}"
            cells = (f"{speed:.4g}", f"{wait:.2e} ({highest:.2e})", idle, f"{memory:.1f}")
            print(f"| {workers} | " + " | ".join(cells) + f" | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
