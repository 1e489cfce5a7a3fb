"""Latents per CPU second that training reads through the cache of shards, relative to a local folder.

    python benchmarks/remote_reading.py

The URL is ``file://``, so that the cost of the path itself is measured: downloads, checksums, locks and
links, without a network. ``first epoch`` begins with an empty cache; ``later epochs`` find the shards in it.
``range requests`` is the way of validation, which reads a few samples of many shards. All take turns in
several rounds; the table gives medians and ratios to the folder. CPU seconds, of all threads, hardly depend
on what else the machine does.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.data_reading import SHAPE, latent, write_shards
from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.index import LatentInfo, read_index
from lit_transdiff.data.order import TrainPlan
from lit_transdiff.data.remote_shards import ShardsAhead

torch.set_num_threads(1)
BATCH = 256


def epoch(place: str, cache: Path, few: bool = False) -> float:
    """Latents per CPU second of one pass in the order of training."""
    index = read_index(place)
    data = DataConfig(train=place, image_size=256, cache_dir=str(cache))
    dataset = PlannedDataset(index, data, training=True, few=few)
    plan = TrainPlan(index, seed=0)
    ahead = ShardsAhead(plan, limit=sum(shard.bytes for shard in index.shards))
    ahead.uses(0)  # the order itself is not measured
    start = time.process_time()
    for first in range(0, len(index) - BATCH + 1, BATCH):
        dataset[plan.rows(first, first + BATCH)._replace(ahead=ahead(first))]
    return (len(index) // BATCH * BATCH) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=16384, help="samples of the 8 shards")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        folder, cache = Path(root, "latents"), Path(root, "cache")
        write_shards(folder, args.latents, "bin", latent, LatentInfo(SHAPE, 2, "synthetic", 256))
        url = f"file://{folder}"
        for _ in range(args.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            found.setdefault("folder", []).append(epoch(str(folder), cache))
            found.setdefault("URL, first epoch", []).append(epoch(url, cache))
            found.setdefault("URL, later epochs", []).append(epoch(url, cache))
            found.setdefault("URL, range requests", []).append(epoch(url, cache, few=True))
    base = statistics.median(found["folder"])
    print("| | latents per CPU second | relative to the folder |\n|---|---|---|")
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"| {name} | {rate:,.0f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
