"""The time that images take: families, sizes, batches, solver steps, with and without graphs and compilation.

    python benchmarks/latency.py --output latency.jsonl          # on a GPU, about 4 minutes
    python benchmarks/latency.py --tables latency.jsonl > benchmarks/latency.md    # of all that was measured

Latents of 256 pixels (16 x 16 x 16) from random weights, bfloat16, guidance 1.3. The first calls of a
shape compile and record graphs: ``first, s`` is the time of three. Of the calls after them, the table has the
median. ``difference`` is the largest one of the latents from those without graphs and
compilation, as a share of their largest value.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.model_speed import machine, seconds
from lit_transdiff.config import ModelConfig, RunConfig, SamplingConfig
from lit_transdiff.config.acdit import ACDiTConfig
from lit_transdiff.config.flowar import FlowARConfig
from lit_transdiff.config.mar import MARConfig
from lit_transdiff.config.sit import DiTConfig, SiTConfig
from lit_transdiff.config.xar import XARConfig
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.sampling.generator import Generator

FLOW: dict[str, Any] = {"solver": "euler_maruyama", "guidance_scale": 1.3}
CHAIN: dict[str, Any] = {"solver": "ancestral", "guidance_scale": 1.3}
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "TransDiff": (ModelConfig, FLOW),
    "MRAR, 4 images": (lambda **size: ModelConfig(**size, num_references=4), FLOW),
    "SiT": (SiTConfig, FLOW),
    "DiT": (DiTConfig, CHAIN),
    "ACDiT": (ACDiTConfig, {**CHAIN, "grid": "nonzero"}),
    "xAR": (XARConfig, FLOW),
    "FlowAR": (FlowARConfig, FLOW),
    "MAR, 16 parts": (MARConfig, {**CHAIN, "num_parts": 16}),
}
WAYS = ("eager", "graphs", "compiled", "compiled, graphs", "kernels", "kernels, graphs")
KEYS = ("family", "size", "batch", "steps")
QUALITY = Path(__file__).parent / "latency_quality.md"  # the end of the page


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    family: str
    size: str
    batch: int
    steps: int
    ways: tuple[str, ...] = ("eager", "graphs")


ALL = ("kernels, graphs", "graphs", "compiled, graphs")
# The most important first: what is left when the time is over is not measured.
PLAN = (
    Case("TransDiff", "base", 1, 12, ("eager", *ALL)),
    Case("TransDiff", "base", 64, 12, ("eager", *ALL, "compiled", "kernels")),
    Case("MRAR, 4 images", "base", 1, 12, ("eager", *ALL)),
    Case("MRAR, 4 images", "base", 64, 12, ("eager", *ALL)),
    Case("TransDiff", "base", 8, 12, ("eager", *ALL)),
    Case("TransDiff", "base", 1, 50, ("eager", "kernels, graphs")),
    Case("TransDiff", "base", 1, 100, ("eager", "kernels, graphs")),
    Case("TransDiff", "small", 1, 12, ("eager", "kernels, graphs")),
    Case("TransDiff", "small", 64, 12, ("eager", "kernels, graphs")),
    Case("TransDiff", "large", 1, 12, ("eager", "kernels, graphs")),
    Case("TransDiff", "large", 64, 12, ("eager", "kernels, graphs")),
    Case("SiT", "base", 1, 12),
    Case("SiT", "base", 64, 12),
    Case("DiT", "base", 1, 12),
    Case("ACDiT", "base", 1, 12),
    Case("xAR", "base", 1, 12),
    Case("FlowAR", "small", 1, 12),
    Case("MAR, 16 parts", "base", 1, 12),
    Case("MAR, 16 parts", "base", 64, 12),
)
TINY = tuple(Case(family, "test", 2, 2, ("eager", "compiled", "graphs")) for family in FAMILIES)


def generator_of(case: Case, device: torch.device, precision: str) -> Generator:
    """A generator of random weights, none of which is zero."""
    config = FAMILIES[case.family][0](size=case.size)
    torch.manual_seed(0)
    with device:
        model = build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    autoencoder = IdentityAutoencoder(config.latent_channels)
    return Generator(model, autoencoder, RunConfig(model=config), []).at(precision)  # type: ignore[arg-type]


def made(plain: Generator, way: str) -> Generator:
    """The generator that draws in this way."""
    compile, graphs, kernels = (word in way for word in ("compiled", "graphs", "kernels"))
    return replace(plain, compile=compile, cuda_graphs=graphs, kernels=kernels)


def settings_of(case: Case, precision: str) -> SamplingConfig:
    return SamplingConfig(num_steps=case.steps, precision=precision, **FAMILIES[case.family][1])  # type: ignore[arg-type]


def measured(
    case: Case, ways: Iterable[str], device: torch.device, precision: str, rounds: int
) -> Iterable[dict[str, Any]]:
    """A row for each way to draw the same latents."""
    plain, sampling = generator_of(case, device, precision), settings_of(case, precision)
    labels = torch.arange(case.batch, device=device) % 10
    seeds = list(range(case.batch))
    expected: Tensor | None = None
    for way in ways:
        free(device)
        generator = made(plain, way)

        def draw(generator: Generator = generator) -> Tensor:
            return generator.latents(labels, seeds, sampling)

        first = sum(seconds(draw, device) for _ in range(3))
        times = [seconds(draw, device) for _ in range(rounds)]
        found = draw()
        expected = found if expected is None else expected
        yield {
            **{key: value for key, value in asdict(case).items() if key != "ways"},
            "way": way,
            "ms": 1e3 * statistics.median(times),
            "first_s": first,
            "difference": float((found - expected).abs().max() / expected.abs().max()),
            "graphs": generator.graphs.number if generator.graphs else 0,
            "memory_gb": torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None,
        }


def free(device: torch.device) -> None:
    """Forget compiled code and the memory of the way before."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(case: Case, way: str, device: torch.device, precision: str, most: int = 25) -> str:
    """The kernels of one call that take the most time."""
    plain = generator_of(case, device, precision)
    generator = made(plain, way)
    labels, seeds = torch.arange(case.batch, device=device) % 10, list(range(case.batch))
    for _ in range(4):
        generator.latents(labels, seeds, settings_of(case, precision))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
        generator.latents(labels, seeds, settings_of(case, precision))
        torch.cuda.synchronize()
    kernels = sorted(watch.key_averages(), key=lambda k: -k.self_device_time_total)
    whole = sum(k.self_device_time_total for k in kernels) / 1e3
    count = sum(k.count for k in kernels)
    lines = [
        f"{case.family} {case.size}, {case.batch} images, {case.steps} steps, {way}: {whole:.1f} ms on the "
        f"device, {count} kernels"
    ]
    lines += [
        f"{k.self_device_time_total / 1e3:10.3f} ms {k.count:6d}  {k.key[:150]}" for k in kernels[:most]
    ]
    return "\n".join(lines)


def tables(file: Path) -> str:
    """The page of all cases, with what is in a file of measurements; the last one of a row counts."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = {(*(row[key] for key in KEYS), row["way"]): row for row in rows}
    made = dict.fromkeys(f"{row['machine']}, {row['precision']}, {row['date']}" for row in rows)
    lines = [
        "# The time that images take",
        "",
        "`benchmarks/latency.py` makes this page and says how it measures. Measured on:",
        "",
        *(f"- {machine}" for machine in made),
        "",
        "Milliseconds of a batch, with those of an image behind them (for MRAR: of a row of four images):",
        "",
        "| family | size | images | steps | " + " | ".join(WAYS) + " |",
        "|---" * (4 + len(WAYS)) + "|",
    ]
    for case in PLAN:
        key = tuple(getattr(case, name) for name in KEYS)
        cells = [cell(found.get((*key, way)), case.batch) for way in WAYS]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join([*lines, "", *notes(rows), QUALITY.read_text().rstrip()])


def cell(row: dict[str, Any] | None, batch: int) -> str:
    if row is None:
        return "not measured"
    return f"{row['ms']:.1f}" if batch == 1 else f"{row['ms']:.0f} ({row['ms'] / batch:.2f})"


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """The differences between the ways of computing, and other notes on the rows."""
    apart = {way: max((r["difference"] for r in rows if r["way"] == way), default=None) for way in WAYS[1:]}
    said = ", ".join(f"{way} {value:.0e}" for way, value in apart.items() if value is not None)
    most = {way: max((r["memory_gb"] or 0 for r in rows if r["way"] == way), default=0) for way in WAYS}
    memory = ", ".join(f"{way} {value:.0f} GB" for way, value in most.items() if value)
    return [
        f"Largest difference from the eager latents, as a share of their largest value: {said}.",
        "",
        f"Most memory of any row: {memory}.",
        "",
    ]


def run(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    device = torch.device(args.device)
    start, plan = time.monotonic(), TINY if args.tiny else PLAN
    about = {"machine": machine(device), "precision": args.precision, "date": time.strftime("%d %B %Y")}
    say(f"\n{about}\n\n| family | size | images | steps | way | ms | ms an image | first, s | difference | |")
    say("|---" * 10 + "|")
    for case in plan[args.after : args.cases]:
        ways = [way for way in case.ways if device.type == "cuda" or way in ("eager", "compiled")]
        ways = [way for way in ways if args.ways is None or way in args.ways]
        if time.monotonic() - start > args.budget:
            say(f"left out, no time: {case}")
            continue
        try:
            for row in measured(case, ways, device, args.precision, args.rounds):
                with args.output.open("a") as file:
                    file.write(json.dumps({**about, **row}) + "\n")
                numbers = f"{row['ms']:.1f} | {row['ms'] / case.batch:.2f} | {row['first_s']:.1f}"
                say(
                    f"| {case.family} | {case.size} | {case.batch} | {case.steps} | {row['way']} | {numbers} "
                    f"| {row['difference']:.1e} | {row['graphs']} graphs, {row['memory_gb'] or 0:.2f} GB |"
                )
        except Exception as error:  # the next case may do; what failed is said
            say(f"FAILED {case}: {type(error).__name__}: {error}")
    if device.type == "cuda" and args.profile:
        for case in PLAN[:2]:
            for way in ("kernels, graphs", "compiled, graphs"):
                say(profile(case, way, device, args.precision))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("latency.jsonl"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no row is begun")
    parser.add_argument("--profile", action="store_true", help="the kernels of the first two rows")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tables", type=Path, help="print the page of a file of measurements instead")
    parser.add_argument("--cases", type=int, help="only so many rows of the table, from the first")
    parser.add_argument("--after", type=int, default=0, help="without so many rows at its beginning")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="only these")
    return parser


def main() -> None:
    args = parser().parse_args()
    print(tables(args.tables)) if args.tables else run(args, partial(print, flush=True))


if __name__ == "__main__":
    main()
