"""Training on one GPU: steps, where their time goes, the whole loop, equality; and the time that images take.

    python benchmarks/gpu.py                                # all parts, at most 7 minutes on one GPU
    python benchmarks/gpu.py --budget 200 --output gpu.md   # the first ones, the most wanted
    python benchmarks/gpu.py profile                        # the kernels of a step that take the most time
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny      # the same code at sizes for a CPU

Steps are those of the stage ``ar_pretrain`` (objective, backward pass, clipping, AdamW, average) in bfloat16;
``loop`` is the run's own training loop on synthetic latents. MFU is the share of the data sheet's bfloat16
rate. Times are medians. Every part is a process of its own with a time limit: one that fails or hangs says so
and leaves the others alone. benchmarks/latency.py measures sampling; ``sampling`` is the beginning of it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA cannot be forked
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import data_wait, latency
from lit_transdiff.base.hardware import GB, measure_flops, peak_flops, peak_memory, wait_for
from lit_transdiff.base.randomness import GlobalBatchNormal, mix
from lit_transdiff.config import FlowConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.flops import row_cost
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.adamw import AveragedAdamW
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.graph import GraphedObjective
from lit_transdiff.stages.optim import build_optimizer

DRAWS = {1: 4, 4: 2}  # noise draws per image, by the number of references
CLIP = 3.0
MINIMUM = 5  # seconds, without which no part begins
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
    one_pass: bool = True  # over memory, for clipping, AdamW and average

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
        with device:
            autoencoder = IdentityAutoencoder(run.model.latent_channels)
            self.stage: TransDiffStage = STAGES[run.stage](run, autoencoder)
        torch.nn.init.normal_(self.stage.model.get_parameter("decoder.final.linear.weight"), std=0.02)
        self.stage.to(device).train()
        self.optimizer = build_optimizer(self.stage.model, run.optimizer)
        self.one_pass = case.one_pass and device.type == "cuda"
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
        self.update()
        self.count += 1
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, and move weights and average."""
        assert isinstance(self.optimizer, AveragedAdamW)
        self.optimizer.kernels = self.one_pass
        if not self.optimizer.clips(CLIP, "norm"):
            torch.nn.utils.clip_grad_norm_(self.stage.model.parameters(), CLIP)
        self.optimizer.step()


def step(bench: Bench) -> None:
    """Steps of base, whose update is one pass over memory or torch's, in one process."""
    measure_cases(bench, [Case("base", 1, rows, training=STREAM) for rows in (96, 32)], updates=True)


def large(bench: Bench) -> None:
    measure_cases(bench, [Case("large", 1, 48, training=STREAM)])


def mrar(bench: Bench) -> None:
    measure_cases(bench, [Case("base", 4, 32, training=STREAM)])


def steps(bench: Bench) -> None:
    """What else the page of results compares."""
    kernels = TrainingConfig(compile=False)
    plain, compiled = (TrainingConfig(kernels=False, compile=on) for on in (False, True))
    more = [
        Case("base", 1, 32, training=kernels),
        Case("base", 1, 32, training=plain, graphs=False),
        Case("base", 1, 64, training=STREAM),
        Case("base", 4, 16, training=STREAM),
        Case("base", 4, 16, training=plain, graphs=False),
        Case("large", 1, 32, training=STREAM),
        Case("base", 1, 64, dropout=0.0, training=STREAM),
        Case("large", 1, 32, training=plain, graphs=False),
        Case("base", 1, 32, training=compiled),
    ]
    measure_cases(bench, more)


def measure_cases(bench: Bench, cases: list[Case], updates: bool = False) -> None:
    """A table of training steps; with ``updates`` also of those with torch's update."""
    if bench.tiny:
        cases = [Case("test", case.references, 2, training=case.training, graphs=False) for case in cases[:1]]
    peak = peak_flops(bench.device, torch.bfloat16)
    bench.table(
        "model", "rows", "dropout", "how", "update", "ms per step", "of it update", "images/s", "MFU",
        "peak GB", "first step, s", "loss",
    )  # fmt: skip
    for case in cases:
        bench.attempt(
            f"{case.size}, {case.rows} rows, {case.label}",
            partial(measure_case, bench, case, peak.flops, updates),
        )


def measure_case(bench: Bench, case: Case, peak: float, updates: bool) -> None:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
    start = time.perf_counter()
    step = Steps(case, bench.device)
    loss = float(step())
    first = time.perf_counter() - start
    work = case.rows * row_cost(case.run.model, DRAWS[case.references]).flops
    name = f"{case.size}, {'one-step' if case.references == 1 else f'MRAR (R={case.references})'}"
    for one_pass in (step.one_pass, False) if updates else (step.one_pass,):
        step.one_pass = one_pass
        ms, update = (median_ms(what, bench.device, 8) for what in (step, step.update))
        memory = peak_memory(bench.device) / GB
        bench.row(
            name, case.rows, case.dropout, case.label, "one pass" if one_pass else "torch's",
            f"{ms:.1f}", f"{update:.2f}", f"{case.rows * case.references * 1e3 / ms:.0f}",
            f"{work / ms / peak * 1e5:.1f}%", f"{memory:.1f}", f"{first:.1f}", f"{loss:.4f}",
        )  # fmt: skip


KINDS = {  # of kernels, by parts of their names
    "matrix products": "nvjet|gemm|cutlass|xmma|splitK",
    "attention": "attention_|sdpa|flash|fmha",
    "residual stream": "add_norm|sums_of_rows",
    "GELU": "gelu",
    "optimizer and averages": "adamw|gradient_squares|multi_tensor|lerp|LpNorm",
    "sums": "reduce_kernel|sum",
    "copies and casts": "copy|Memcpy|Memset|CatArray|fill",
    "other": "",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, words in KINDS.items() if re.search(words, kernel))


def profile(bench: Bench) -> None:
    """The kernels of a step of base that take the most time, as the graph replays them."""
    case = Case("test", 1, 2, graphs=False) if bench.tiny else Case("base", 1, 96, training=STREAM)
    step = Steps(case, bench.device)
    for _ in range(4):
        step()
    wait_for(bench.device)
    on_gpu = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        step()
        wait_for(bench.device)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [e for e in found.key_averages() if not e.key.startswith("Optimizer.")]  # a mark, no kernel
    kernels.sort(key=lambda e: -getattr(e, time_of))
    by_kind: Counter[str] = Counter()
    for e in kernels:
        by_kind[kind_of(e.key)] += getattr(e, time_of)
    total = sum(by_kind.values())
    bench.table(f"{case.size}, {case.rows} rows, {case.label}", f"{total / 1e3:.1f} ms", "share")
    for kind, taken in by_kind.most_common():
        bench.row(kind, f"{taken / 1e3:.2f}", f"{taken / total:.1%}")
    bench.table("kernel", "calls", "ms")
    for e in kernels[: 5 if bench.tiny else 40]:
        bench.row(e.key[:110].replace("|", "/"), e.count, f"{getattr(e, time_of) / 1e3:.2f}")


# --- equality --------------------------------------------------------------------------------------------


def equality(bench: Bench) -> None:
    """Losses of 50 steps of a small model, relative to the same steps computed in another way."""
    size, steps, rows = ("test", 2, 2) if bench.tiny else ("small", 50, 8)
    on_gpu = bench.device.type == "cuda"
    kernels = TrainingConfig(compile=False)
    plain = replace(kernels, kernels=False)
    bench.table(
        "compared", "against", "references", "dropout", "largest difference of losses", "of the last weights"
    )
    for references in (4, 1):
        case = partial(Case, size, references, rows)
        graph = case(training=kernels, graphs=on_gpu)
        exact = case(0.0, plain, False, False)
        found: dict[str, tuple[list[float], Tensor]] = {}
        for name, against, one, other in (
            ("kernels, graph", "kernels", graph, replace(graph, graphs=False)),
            ("kernels, graph", "the same with torch's update", graph, replace(graph, one_pass=False)),
            ("kernels", "plain, torch's update", case(0.0, kernels, False), exact),
            ("kernels, bf16 stream", "plain, torch's update", case(0.0, STREAM, False), exact),
        ):
            for each in (one, other):
                if str(each) not in found:
                    found[str(each)] = losses_of(each, bench.device, steps)
            (first, weights), (second, others) = found[str(one)], found[str(other)]
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
        ["training.residual_dtype=bf16"],
        ["training.kernels=false", "training.compile=false", "training.cuda_graphs=false"],
        [],
    ]
    bench.table(
        "the run's loop, base, 32 rows", "ms per step", "images/s", "data wait", "peak GB", "made in, s",
        "first step after, s",
    )  # fmt: skip
    steps, every, rows = (4, 2, 2) if bench.tiny else (40, 10, 32)
    small = [f"model.{name}=2" for name in ("num_heads", "encoder_blocks", "decoder_blocks")]
    more = [f"training.micro_batch_size={rows}", *(["model.width=32", *small] if bench.tiny else [])]
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


# --- sampling, and all parts -----------------------------------------------------------------------------


def sampling(bench: Bench) -> None:
    """The first rows of benchmarks/latency.py, with and without Triton's kernels."""
    output = Path("latency.jsonl") if bench.output is None else bench.output.with_suffix(".jsonl")
    arguments = ["--output", str(output), "--device", str(bench.device), "--cases", "3"]
    arguments += ["--tiny", "--ways", "eager"] if bench.tiny else ["--ways", "graphs", "kernels, graphs"]
    latency.run(latency.parser().parse_args(arguments), bench.say)


# Each with the longest time that it takes, in seconds; the most wanted first.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "step": (step, 60),
    "profile": (profile, 30),
    "loop": (loop, 45),
    "equality": (equality, 40),
    "large": (large, 30),
    "mrar": (mrar, 25),
    "sampling": (sampling, 50),
    "ceilings": (ceilings, 20),
    "kernels": (kernels, 60),
    "steps": (steps, 180),
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
        begin, limit = time.perf_counter(), min(limit, left)
        bench.end, end = begin + limit - 1, bench.end
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
    parser.add_argument("--budget", type=float, default=400, help="seconds after which a part is stopped")
    parser.add_argument("--here", action="store_true", help="in this process, without limits of a part")
    parser.add_argument("--output", type=Path, help="a Markdown file to which the tables are also written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), args.tiny, time.perf_counter() + args.budget, args.output)
    run(bench, args.parts or list(PARTS), args.here)


if __name__ == "__main__":
    main()
