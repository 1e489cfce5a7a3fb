"""Training steps on one GPU: their time, and where it goes."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.on_gpu.bench import Bench, median_ms
from lit_transdiff.base.hardware import GB, peak_flops, peak_memory, wait_for
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
STREAM = TrainingConfig(compile=False, residual_dtype="bf16")


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
        how += [f"{t.activation_checkpointing} recomputed"] * (t.activation_checkpointing != "none")
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
    measure_cases(bench, [Case("large", 1, rows, training=STREAM) for rows in (48, 32)])


def mrar(bench: Bench) -> None:
    measure_cases(bench, [Case("base", 4, rows, training=STREAM) for rows in (32, 16)])


def recompute(bench: Bench) -> None:
    """The decoder recomputed, for more rows; all without graphs, which recomputed blocks do not have."""
    again = replace(STREAM, activation_checkpointing="decoder")
    cases = [Case("base", 1, rows, training=again, graphs=False) for rows in (96, 192)]
    measure_cases(bench, [Case("base", 1, 96, training=STREAM, graphs=False), *cases])


def steps(bench: Bench) -> None:
    """The other comparisons on the page of results."""
    kernels = TrainingConfig(compile=False)
    plain, compiled = (TrainingConfig(kernels=False, compile=on) for on in (False, True))
    more = [
        Case("base", 1, 32, training=kernels),
        Case("base", 1, 32, training=plain, graphs=False),
        Case("base", 1, 64, training=STREAM),
        Case("base", 4, 16, training=plain, graphs=False),
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
