"""Whether anything in training grows with the length of a run: a small real run on the bundled images,
quarter by quarter.

    python benchmarks/long_run.py --steps 4000

The run is tracked as any other (metrics.csv and an offline W&B log), shuffles anew every epoch and saves
checkpoints. The table gives, for each quarter of its steps, medians of what the run logged of itself; the
last line is the ratio of the last quarter to the second (the first warms up).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.model_speed import machine
from lit_transdiff.config.loading import load_run
from lit_transdiff.study.runs import runs
from lit_transdiff.training.trainer import train

ROOT = Path(__file__).parents[1]
SHOWN = {
    "ms per step": lambda logged, batch: 1000 * batch / logged["throughput/images_per_second"],
    "data wait, %": lambda logged, batch: 100 * logged["throughput/data_wait_fraction"],
    "peak memory, GB": lambda logged, batch: logged["throughput/peak_memory_gb"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    with tempfile.TemporaryDirectory() as folder:
        sizes = [
            "size=test",
            "width=32",
            "num_heads=2",
            "encoder_blocks=2",
            "decoder_blocks=2",
            "patch_size=8",
            "latent_size=32",
        ]
        model = [
            f"model.{item}"
            for item in (*sizes, "latent_channels=1", "num_context_tokens=16", "num_class_tokens=2")
        ]
        rhythm = [
            f"max_steps={args.steps}",
            "global_batch_size=32",
            "log_every=20",
            f"checkpoint_every={args.steps // 20}",
        ]
        training = [f"training.{item}" for item in rhythm]
        data = [f"data.{part}={ROOT / 'data' / 'fashion' / part}" for part in ("train", "evaluation")]
        place = [f"output_dir={folder}", "name=long", "autoencoder.kind=identity", "autoencoder.path=null"]
        run = load_run(ROOT / "experiments/fashion/ar_pretrain.yaml", [*model, *training, *data, *place])
        train(run, say=lambda text: None)
        columns = [
            "throughput/images_per_second",
            "throughput/data_wait_fraction",
            "throughput/peak_memory_gb",
        ]
        history = runs(folder)[0].history(columns).dropna()
        log = sum(file.stat().st_size for file in run.folder.rglob("*.wandb"))
    print(machine(torch.device("cpu")))
    print(
        f"{args.steps:,} steps of {run.training.global_batch_size} images; the W&B log has "
        f"{log / args.steps:,.0f} bytes a step\n"
    )
    print("| steps | " + " | ".join(SHOWN) + " |\n|---|" + "---|" * len(SHOWN))
    quarters = []
    for i in range(4):
        first, last = (args.steps * k // 4 for k in (i, i + 1))
        part = history[(history["step"] > first) & (history["step"] <= last)]
        quarters.append([statistics.median(take(part, run.images_per_step)) for take in SHOWN.values()])
        print(f"| {first:,} to {last:,} | " + " | ".join(f"{value:.3f}" for value in quarters[-1]) + " |")
    ratios = [
        late / early if early else float("nan") for early, late in zip(quarters[1], quarters[3], strict=True)
    ]
    print("| last / second | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
