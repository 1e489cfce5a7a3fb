"""Training on one GPU: ceilings of the card, each kernel against its floor, steps, equality, the whole loop.

    python benchmarks/gpu.py                          # at most 7 minutes on one GPU
    python benchmarks/gpu.py kernels steps --output gpu.md
    python benchmarks/gpu.py --tiny                   # the same code at sizes for a CPU

Steps are those of the stage ``ar_pretrain`` (objective, backward pass, clipping, AdamW, average) in bfloat16;
``loop`` is the run's own training loop on synthetic latents. MFU is the share of the data sheet's bfloat16
rate. Times are medians. A part that fails says so and leaves the others alone. benchmarks/latency.py measures
sampling.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import data_wait
from lit_transdiff.base.hardware import GB, measure_flops, peak_flops, peak_memory, wait_for
from lit_transdiff.base.randomness import GlobalBatchNormal, mix
from lit_transdiff.config import FlowConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.flops import row_cost
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.graph import GraphedObjective
from lit_transdiff.stages.optim import build_optimizer

DRAWS = {1: 4, 4: 2}  # noise draws per image, by the number of references
CLIP = 3.0
STREAM = TrainingConfig(compile=False, residual_dtype="bf16")


@dataclass
class Bench:
    """The device, the sizes, the time that is left, and where results go."""

    device: torch.device
    tiny: bool
    end: float
    output: Path | None

    def say(self, line: str) -> None:
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(line + "\n")

    def table(self, *heads: str) -> None:
        self.say("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")

    def row(self, *cells: object) -> None:
        self.say("| " + " | ".join(map(str, cells)) + " |")

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do ``work`` if there is time; an error ends this piece of work alone."""
        if time.perf_counter() > self.end:
            return self.say(f"{name}: left out, no time")
        try:
            work()
        except Exception as error:  # any failure of one measurement must leave the others
            traceback.print_exc()
            self.say(f"{name}: failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def median_ms(work: Callable[[], Any], device: torch.device, rounds: int, warm: int = 3) -> float:
    """The median time of ``work`` in ms, queued one after the other, by the events of the device."""
    for _ in range(warm):
        work()
    wait_for(device)
    if device.type != "cuda":
        return 1e3 * statistics.median(seconds(work) for _ in range(min(rounds, 2)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    wait_for(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- ceilings and kernels --------------------------------------------------------------------------------


def copy_rate(device: torch.device, tiny: bool) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(2**18 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    return 8e3 * source.numel() / median_ms(lambda: target.copy_(source), device, 10)


def ceilings(bench: Bench) -> None:
    """What the card reaches at best."""
    rate = measure_flops(bench.device, torch.bfloat16)
    bench.say(
        f"\ncopy {copy_rate(bench.device, bench.tiny) / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s"
    )


def kernels(bench: Bench) -> None:
    """Each kernel at the shapes of 32 rows of base, with dropout 0.1, and the time to move its bytes."""
    from lit_transdiff.kernels.attention import cross_attention, self_attention
    from lit_transdiff.kernels.gelu import gelu_dropout
    from lit_transdiff.kernels.norm import LayerOutput, Norm, add_norm

    rows, tokens, width, heads, rate = 128, 256, 768, 12, copy_rate(bench.device, bench.tiny)
    if bench.tiny:
        rows, tokens, width, heads = 4, 8, 32, 2
    # Triton's interpreter multiplies bfloat16 matrices as integers.
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float16
    seed = torch.randint(2**62, (1,), device=bench.device)

    def numbers(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=like).requires_grad_()

    x, y, h = (numbers(rows, tokens, n * width) for n in (1, 1, 4))
    vectors = [numbers(width, like=torch.float32) for _ in range(3)]
    modulation = [numbers(rows, width, like=torch.float32) for _ in range(3)]
    stream = partial(
        add_norm, x, LayerOutput(y, vectors[0], modulation[0], 0.1, seed), Norm(*vectors[1:], *modulation[1:])
    )
    bias = numbers(4 * width, like=torch.float32)
    qkv, query = ((numbers(n * width, width), numbers(n * width, like=torch.float32)) for n in (3, 1))
    keys = [numbers(rows // 4, tokens, width) for _ in range(2)]
    scores, product = 14.0 * rows * tokens**2 * width, 6.0 * rows * tokens * width**2  # FLOPs of both passes
    # bytes of the forward and the backward pass, in units of x; FLOPs of both
    cases: dict[str, tuple[Callable[[], Tensor], float, float, float]] = {
        "GELU with dropout": (lambda: gelu_dropout(h, bias, seed, 0.1), 8, 12, 0),
        "residual stream and norm": (lambda: stream()[1], 4, 6, 0),
        "self-attention and its projection": (
            lambda: self_attention(y, *qkv, heads, seed, 0.1), 0, 0, scores + 3 * product
        ),
        "cross-attention and its projection": (
            lambda: cross_attention(y, *query, *keys, heads, seed, 0.1), 0, 0, scores + product
        ),
    }  # fmt: skip
    bench.table("kernel", "forward, ms", "floor, ms", "backward, ms", "floor, ms", "TFLOP/s")
    inputs = [x, y, h, *qkv, *query, *keys, bias, *vectors, *modulation]

    def measure(name: str, forward: Callable[[], Tensor], read: float, back: float, flops: float) -> None:
        with torch.no_grad():
            gradient = torch.randn_like(forward())

        def both() -> None:
            torch.autograd.grad(forward(), inputs, gradient, allow_unused=True)

        one, two = (median_ms(graph_of(work, bench.device), bench.device, 20) for work in (forward, both))
        times = [units * rows * tokens * width * 2e3 / rate for units in (read, back)]
        floors = ["" if flops else f"{ms:.3f}" for ms in times]
        speed = f"{flops / two / 1e9:.0f}" if flops else ""
        bench.row(name, f"{one:.3f}", floors[0], f"{two - one:.3f}", floors[1], speed)

    for name, case in cases.items():
        bench.attempt(name, partial(measure, name, *case))


def graph_of(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``work`` as a CUDA graph, which leaves the host's part out; on CPUs ``work`` itself."""
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        work()
    return graph.replay


# --- steps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, the rows of a step, and how they are computed."""

    size: str
    references: int
    rows: int
    dropout: float = 0.1
    training: TrainingConfig = TrainingConfig()  # noqa: RUF009 (it is frozen)
    graphs: bool = True

    @property
    def run(self) -> RunConfig:
        model = ModelConfig(
            size=self.size,
            num_references=self.references,
            attention_dropout=self.dropout,
            projection_dropout=self.dropout,
            **(dict(latent_size=4, num_context_tokens=16, num_class_tokens=4) if self.size == "test" else {}),
        )
        return RunConfig(
            name="gpu",
            stage="ar_pretrain" if self.references == 1 else "mrar_finetune",
            model=model,
            flow=FlowConfig(num_noise_draws=DRAWS[self.references]),
            optimizer=OptimizerConfig(lr=1e-4),
            training=replace(self.training, global_batch_size=self.rows),
        )

    @property
    def label(self) -> str:
        t = self.training
        plain = [] if t.kernels is not False else ["plain" if t.compile is False else "compiled"]
        how = [*plain, *["graph"] * self.graphs, *["bf16 stream"] * (t.residual_dtype == "bf16")]
        return ", ".join(how if plain else ["kernels", *how])


class Steps:
    """Training steps of a case, on random latents."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        run, self.device, self.count = case.run, device, 0
        self.stage: TransDiffStage = STAGES[run.stage](run, IdentityAutoencoder(run.model.latent_channels))
        torch.nn.init.normal_(self.stage.model.get_parameter("decoder.final.linear.weight"), std=0.02)
        self.stage.to(device).train()
        self.optimizer = build_optimizer(self.stage.model, run.optimizer)
        size = run.model.latent_size
        generator = torch.Generator().manual_seed(1)
        shape = (case.rows, case.references, run.model.latent_channels, size, size)
        values = torch.randn(shape, generator=generator)
        numbers = torch.arange(case.rows)
        batch = Batch(values, numbers % run.model.num_classes, numbers, numbers)
        self.batch = Batch(
            *(z.to(device) for z in (batch.values, batch.labels, batch.samples, batch.positions))
        )
        self.graphs = (
            GraphedObjective(self.stage.losses, self.stage.model, required=True) if case.graphs else None
        )

    def __call__(self) -> Tensor:
        """One step; its loss."""
        torch.manual_seed(mix("dropout", self.count))
        numbers = partial(
            GlobalBatchNormal, mix("training", self.count), len(self.batch.labels), self.batch.positions
        )
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float16
        with torch.autocast(self.device.type, dtype):
            if self.graphs is None:
                rows, _ = self.stage.objective(self.batch, numbers())
            else:
                rows, _ = self.graphs(self.batch.values, self.batch.labels, numbers)
            loss = rows.mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.stage.model.parameters(), CLIP)
        self.optimizer.step()
        self.count += 1
        return loss.detach()


def cases(tiny: bool, on_gpu: bool) -> Iterator[Case]:
    """The steps that are measured, the most telling first."""
    plain, compiled = (
        TrainingConfig(kernels=False, compile=False),
        TrainingConfig(kernels=False, compile=True),
    )
    kernels, stream = TrainingConfig(compile=False), STREAM
    if tiny:
        yield Case("test", 1, 2, training=plain, graphs=on_gpu)
        yield Case("test", 4, 2, training=stream, graphs=on_gpu)
        return
    yield Case("base", 1, 96, training=stream)
    yield Case("base", 1, 32, training=stream)
    yield Case("base", 1, 32, training=kernels)
    yield Case("base", 1, 32, training=plain, graphs=False)
    yield Case("base", 4, 32, training=stream)
    yield Case("large", 1, 64, training=stream)
    yield Case("base", 1, 64, training=stream)
    yield Case("base", 4, 16, training=stream)
    yield Case("base", 4, 16, training=plain, graphs=False)
    yield Case("large", 1, 32, training=stream)
    yield Case("base", 1, 32, training=compiled, graphs=False)
    yield Case("base", 1, 32, training=kernels, graphs=False)
    yield Case("base", 1, 64, dropout=0.0, training=stream)
    yield Case("large", 1, 32, training=plain, graphs=False)
    yield Case("base", 1, 32, training=compiled)


def steps(bench: Bench) -> None:
    """Training steps of the paper's models."""
    peak = peak_flops(bench.device, torch.bfloat16)
    bench.table(
        "model",
        "rows",
        "dropout",
        "how",
        "ms per step",
        "images/s",
        "MFU",
        "peak GB",
        "first step, s",
        "loss",
    )
    for case in cases(bench.tiny, bench.device.type == "cuda"):
        bench.attempt(f"{case.size}, {case.label}", partial(measure_case, bench, case, peak.flops))


def measure_case(bench: Bench, case: Case, peak: float) -> None:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
    step = Steps(case, bench.device)
    start = time.perf_counter()
    loss = float(step())
    first = time.perf_counter() - start
    ms = median_ms(step, bench.device, 8)
    work = case.rows * row_cost(case.run.model, DRAWS[case.references]).flops
    name = f"{case.size}, {'one-step' if case.references == 1 else f'MRAR (R={case.references})'}"
    images = case.rows * case.references * 1e3 / ms
    memory = peak_memory(bench.device) / GB
    bench.row(
        name, case.rows, case.dropout, case.label, f"{ms:.1f}", f"{images:.0f}",
        f"{work / ms / peak * 1e5:.1f}%",
        f"{memory:.1f}", f"{first:.1f}", f"{loss:.4f}",
    )  # fmt: skip


def profile(bench: Bench) -> None:
    """Where a step of base spends the card's time: kernels by name."""
    case = Case("test", 1, 2, graphs=False) if bench.tiny else Case("base", 1, 64, training=STREAM)
    step = Steps(case, bench.device)
    for _ in range(3):
        step()
    on_gpu = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        step()
        wait_for(bench.device)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(found.key_averages(), key=lambda e: -getattr(e, time_of))
    total = sum(getattr(e, time_of) for e in kernels)
    bench.table(
        f"kernel ({case.size}, {case.rows} rows, {case.label}: {total / 1e3:.1f} ms in all)", "calls", "ms"
    )
    for e in kernels[: 5 if bench.tiny else 60]:
        bench.row(e.key[:110].replace("|", "/"), e.count, f"{getattr(e, time_of) / 1e3:.2f}")


# --- equality --------------------------------------------------------------------------------------------


def equality(bench: Bench) -> None:
    """Losses of 50 steps of a small model, relative to the same steps computed in another way."""
    size, steps, rows = ("test", 2, 2) if bench.tiny else ("small", 50, 16)
    on_gpu = bench.device.type == "cuda"
    kernels = TrainingConfig(compile=False)
    plain, stream = replace(kernels, kernels=False), STREAM
    bench.table(
        "compared", "against", "references", "dropout", "largest difference of losses", "of the last weights"
    )
    for references in (1, 4):
        case = partial(Case, size, references, rows)
        for name, against, one, other in (
            (
                "kernels, graph",
                "kernels",
                case(training=kernels, graphs=on_gpu),
                case(training=kernels, graphs=False),
            ),
            ("kernels", "plain", *(case(0.0, training, False) for training in (kernels, plain))),
            ("kernels, bf16 stream", "plain", *(case(0.0, training, False) for training in (stream, plain))),
        ):
            (first, weights), (second, others) = (
                losses_of(case, bench.device, steps) for case in (one, other)
            )
            error = max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))
            distance = float((weights - others).norm() / others.norm())
            bench.row(name, against, references, one.dropout, f"{error:.1e}", f"{distance:.1e}")


def losses_of(case: Case, device: torch.device, steps: int) -> tuple[list[float], Tensor]:
    """The losses of the first steps of a case, and its weights after them."""
    step = Steps(case, device)
    losses = [float(step()) for _ in range(steps)]
    return losses, torch.cat([p.detach().flatten() for p in step.stage.model.parameters()])


# --- the whole loop --------------------------------------------------------------------------------------


def loop(bench: Bench) -> None:
    """``lit-transdiff train`` without checkpoints: Lightning, loader, callbacks, log."""
    changes = [
        [],
        ["training.residual_dtype=bf16"],
        ["training.kernels=false", "training.compile=false", "training.cuda_graphs=false"],
    ]
    bench.table("the run's loop, base, 32 rows", "ms per step", "images/s", "data wait", "peak GB")
    steps, workers = (3, 0) if bench.tiny else (30, 2)
    small = [f"model.{name}=2" for name in ("num_heads", "encoder_blocks", "decoder_blocks")]
    more = ["training.micro_batch_size=32", *(["model.width=32", *small] if bench.tiny else [])]
    for change in changes:
        with tempfile.TemporaryDirectory() as folder:
            data_wait.make_data(Path(folder))
            run = data_wait.run_of(
                Path(folder), "imagenet256/ar_base.yaml", workers, steps, 32, [*change, *more]
            )
            found = data_wait.measure(run)
        middle = {name: statistics.median(values[len(values) // 2 :]) for name, values in found.items()}
        ms = 32e3 / middle["images_per_second"]
        bench.row(
            " ".join(change) or "as it is",
            f"{ms:.1f}",
            f"{32e3 / ms:.0f}",
            f"{middle['data_wait_fraction']:.2%}",
            f"{middle['peak_memory_gb']:.1f}",
        )


PARTS = {
    "ceilings": ceilings,
    "kernels": kernels,
    "steps": steps,
    "equality": equality,
    "loop": loop,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all, in this order")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seconds", type=float, default=400, help="after which no new measurement begins")
    parser.add_argument("--output", type=Path, help="a Markdown file to which the tables are also written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    bench = Bench(device, args.tiny, time.perf_counter() + args.seconds, args.output)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    bench.say(f"{datetime.date.today()}, {card}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name in args.parts or PARTS:
        bench.attempt(name, partial(PARTS[name], bench))


if __name__ == "__main__":
    main()
