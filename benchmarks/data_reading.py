"""Samples a second that training reads, from each kind of store, on synthetic data of real shapes.

    python benchmarks/data_reading.py

The baseline is one .npz a file, as the TransDiff reference caches latents: ``moments`` and ``moments_flip``,
float32 (32, 16, 16) each. Kinds and worker counts take turns in several rounds; the table gives medians.
Files are read from the page cache, so the disk does not count. Below it stands what the machine allows at
most for latents: how often their bytes can be copied in memory, read from the page cache, and read from the
disk (after asking the system to forget them). The last lines say what comparing samples with their checksums
costs: latents the first time and later, from the page cache and from the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import PlannedDataset, loader_options
from lit_transdiff.data.index import LatentInfo, ShardIndex, index_shards, read_index
from lit_transdiff.data.order import TrainPlan
from lit_transdiff.data.processes import clean_context
from lit_transdiff.data.shards import ShardWriter

torch.set_num_threads(1)
SHAPE = (32, 16, 16)  # moments of a 256-pixel image
SHARDS = 8
BASELINE, LATENTS = "latents, one .npz a file", "latents, shards"


class NpzFiles(Dataset):
    """One of the two arrays of a file, drawn anew at each access, and the class: the reference's layout."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*/*.npz"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        name = "moments" if torch.rand(1) < 0.5 else "moments_flip"
        with np.load(self.paths[i]) as arrays:
            return arrays[name], int(self.paths[i].parent.name)


def write_npz(folder: Path, num: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(num):
        path = folder / str(i % 10) / f"{i}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments, flipped = rng.standard_normal((2, *SHAPE), np.float32)
        np.savez(path, moments=moments, moments_flip=flipped)


def write_shards(
    folder: Path,
    num: int,
    extension: str,
    make: Callable[[int], bytes],
    latents: LatentInfo | None,
    classes: int = 10,
) -> None:
    folder.mkdir()
    for shard in range(SHARDS):
        with ShardWriter(folder / f"{shard:06d}.tar") as writer:
            for i in range(shard, num, SHARDS):
                writer.write(f"{i:08d}", i % classes, extension, make(i))
    index_shards(folder, latents=latents, progress=False)


def latent(i: int) -> bytes:
    return np.random.default_rng(i).standard_normal((2, *SHAPE), np.float32).astype(np.float16).tobytes()


def photo(i: int, width: int, height: int) -> bytes:
    """A JPEG of about the detail, and so the size, of a photograph."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)).resize(
        (width, height)
    )
    pixels = np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def planned(folder: Path, batch_size: int, workers: int, **settings: object) -> DataLoader:
    """The loader over which training iterates."""
    index: ShardIndex = read_index(folder)
    plan = TrainPlan(index, seed=0)
    batches = [plan.rows(start, start + batch_size) for start in range(0, 400 * batch_size, batch_size)]
    data = DataConfig(train=str(folder), image_size=256, num_workers=workers, **settings)  # type: ignore[arg-type]
    return DataLoader(PlannedDataset(index, data, training=True), sampler=batches, **loader_options(workers))


def npz_loader(folder: Path, batch_size: int, workers: int) -> DataLoader:
    context = clean_context() if workers else None
    return DataLoader(
        NpzFiles(folder), batch_size, shuffle=True, num_workers=workers, multiprocessing_context=context
    )


def endless(loader: DataLoader) -> Iterator[int]:
    """The number of samples of each batch."""
    while True:
        for batch in loader:
            yield len(batch.values if hasattr(batch, "values") else batch[0])


def samples_per_second(loader: DataLoader, seconds: float) -> float:
    """After a warm-up, in which workers start and fill their queues."""
    batches = endless(loader)
    warm_up, count = time.perf_counter() + seconds / 2, 0
    next(batches)
    while time.perf_counter() < warm_up:
        next(batches)
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        count += next(batches)
    return count / (time.perf_counter() - start)


def make_stores(root: Path, num_latents: int, num_images: int) -> dict[str, Callable[[int], DataLoader]]:
    """Write all stores below ``root``; what is measured, by name: number of workers -> loader."""
    info = LatentInfo(SHAPE, 2, "synthetic", 256)
    write_npz(root / "npz", num_latents)
    write_shards(root / "latents", num_latents, "bin", latent, info)
    write_shards(root / "cropped", num_images, "jpg", lambda i: photo(i, 256, 256), None)
    write_shards(root / "original", num_images, "jpg", lambda i: photo(i, 500, 375), None)
    cropped, original = ((read_index(root / name).size.mean() / 1000) for name in ("cropped", "original"))
    return {
        BASELINE: lambda workers: npz_loader(root / "npz", 256, workers),
        LATENTS: lambda workers: planned(root / "latents", 256, workers),
        f"JPEG of 256 px ({cropped:.0f} kB), shards": lambda workers: planned(root / "cropped", 64, workers),
        f"JPEG of 500 x 375 ({original:.0f} kB), shards, crop center": lambda workers: planned(
            root / "original", 64, workers
        ),
        f"JPEG of 500 x 375 ({original:.0f} kB), shards, crop random-square": lambda workers: planned(
            root / "original", 64, workers, crop="random-square"
        ),
    }


def limits(folder: Path) -> dict[str, float]:
    """Bytes a second at which this machine copies memory and reads the shards below ``folder``, cached and
    not.
    """
    shards = sorted(folder.glob("*.tar"))
    total = sum(shard.stat().st_size for shard in shards)
    source, target = np.ones(total, np.uint8), np.ones(total, np.uint8)
    start = time.perf_counter()
    np.copyto(target, source)
    copied = time.perf_counter() - start
    read = {}
    for uncached in (False, True):
        if uncached:
            forget(folder)
        files = [os.open(shard, os.O_RDONLY) for shard in shards]
        views = np.array_split(target, len(files))
        start = time.perf_counter()
        got = sum(os.readv(file, [view]) for file, view in zip(files, views, strict=True))
        read[uncached] = (time.perf_counter() - start) * total / got
        for file in files:
            os.close(file)
    return {"memory copy": total / copied, "page cache": total / read[False], "disk": total / read[True]}


def forget(folder: Path) -> None:
    """Ask the system to drop the shards below ``folder`` from its page cache."""
    for shard in folder.glob("*.tar"):
        file = os.open(shard, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def seconds_of_a_pass(index: ShardIndex, batch_size: int, again: bool = False, cached: bool = True) -> float:
    """Seconds in which this process reads every sample once; with ``again`` it has compared them with their
    checksums before.
    """
    dataset = PlannedDataset(index, DataConfig(train=str(index.folder), image_size=256), training=True)
    if again and index.checksum is not None:
        dataset.reader.unread[:] = False
    plan = TrainPlan(index, seed=0)
    batches = [plan.rows(start, start + batch_size) for start in range(0, len(index), batch_size)]
    if not cached:
        forget(index.folder)
    start = time.perf_counter()
    for rows in batches:
        dataset[rows]
    return time.perf_counter() - start


def cost_of_checksums(folder: Path, batch_size: int, passes: int) -> dict[str, float]:
    """By how much of its rate reading is slower with checksums; medians of passes that take turns."""
    index = read_index(folder)
    without = dataclasses.replace(index, checksum=None)
    found: dict[str, list[float]] = {}
    for cached, again in ((True, False), (True, True), (False, False)):
        name = f"{'page cache' if cached else 'disk'}, {'later' if again else 'first time'}"
        for _ in range(passes):
            plain = seconds_of_a_pass(without, batch_size, cached=cached)
            checked = seconds_of_a_pass(index, batch_size, again, cached)
            found.setdefault(name, []).append(1 - plain / checked)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=4096, help="samples of a store of latents")
    parser.add_argument("--images", type=int, default=512, help="samples of a store of images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    args = parser.parse_args()
    measured: dict[tuple[str, int], list[float]] = {}
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(Path(folder), args.latents, args.images)
        for _ in range(args.rounds):
            for workers in args.workers:
                for name, loader in stores.items():
                    measured.setdefault((name, workers), []).append(
                        samples_per_second(loader(workers), args.seconds)
                    )
            rounds.append(limits(Path(folder) / "latents"))
        costs = {"latents": cost_of_checksums(Path(folder) / "latents", 256, 10 * args.rounds)}
        costs["JPEG of 256 px"] = cost_of_checksums(Path(folder) / "cropped", 64, args.rounds)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )
    print("| samples/s (ratio) | " + " | ".join(f"{w} workers" for w in args.workers) + " |")
    print("|---|" + "---|" * len(args.workers))
    for name in stores:
        found = {workers: statistics.median(measured[name, workers]) for workers in args.workers}
        base = {workers: statistics.median(measured[BASELINE, workers]) for workers in args.workers}
        print(
            f"| {name} | "
            + " | ".join(f"{found[w]:,.0f} ({found[w] / base[w]:.2f})" for w in args.workers)
            + " |"
        )
    best, each = (
        max(statistics.median(measured[LATENTS, workers]) for workers in args.workers),
        int(np.prod(SHAPE)) * 2,
    )
    for name in rounds[0]:
        rate = statistics.median(found[name] for found in rounds)
        size = f"{each / 1024:.0f} KiB"
        print(
            f"{name}: {rate / 1e9:.1f} GB/s, {rate / each:,.0f} latents of {size} a second; shards reach "
            f"{best / rate * each:.0%}"
        )
    for store, found in costs.items():
        print(
            f"checksums of {store} cost: " + "; ".join(f"{name} {cost:.1%}" for name, cost in found.items())
        )


if __name__ == "__main__":
    main()
