"""The plan's numbers against what PyTorch really allocates and computes on the CPU."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.allocations import Allocations
from lit_transdiff.base.hardware import DEVICES
from lit_transdiff.config import FlowConfig, ModelConfig, RunConfig, TrainingConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.distributed.strategies import STRATEGIES
from lit_transdiff.models import cpu_bf16, kernel_blocks
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.flops import row_cost
from lit_transdiff.planning.advice import Choice, choices
from lit_transdiff.planning.memory import (
    PassCost,
    Standard,
    count_pass,
    counts_of,
    kept_tensors,
    model_cost,
    pass_cost,
    without_kernels,
)
from lit_transdiff.planning.planner import about_kernels, plan
from lit_transdiff.planning.rows import OVERHEAD, USABLE, communication, memory_of
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.optim import build_optimizer
from tests.helpers.kinds import KINDS, kind_run
from tests.helpers.small import ROOT

ROWS = 8


def batch_of(config: ModelConfig) -> Batch:
    shape = (ROWS, config.num_references, config.latent_channels, config.latent_size, config.latent_size)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    return Batch(torch.randn(shape), labels, torch.zeros(shape[:2], dtype=torch.int64), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_pytorch_allocates(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """A real step: parameters, gradients, moments and averages to the byte; the passes' peak within 5%."""
    monkeypatch.setattr(cpu_bf16, "multiplies_bfloat16", lambda: False)  # attention as on a GPU
    run = without_kernels(kind_run(tmp_path, kind))
    bf16 = run.training.precision == "bf16-mixed"
    model, cost = model_cost(run), pass_cost(run, bf16)
    planned = memory_of(run, "single", 1, ROWS, model, cost, images=False)

    stage = STAGES[run.stage](run, IdentityAutoencoder(run.model.latent_channels))
    optimizer = build_optimizer(stage.model, run.optimizer)
    batch = batch_of(run.model)
    gc.collect()
    with Allocations() as allocations:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = stage.objective(batch, Standard(ROWS))[0].mean()
        loss.backward()
    trained = [p for p in stage.parameters() if p.requires_grad]
    gradients = sum(p.grad.numel() * 4 for p in trained)
    assert gradients == planned.gradients
    assert sum(p.numel() * 4 for p in stage.parameters()) == planned.weights
    optimizer.step()
    states = [optimizer.state[p] for p in trained]
    moments = {"exp_avg", "exp_avg_sq", "momentum"}
    assert sum(s[name].numel() * 4 for s in states for name in moments & s.keys()) == planned.optimizer
    assert sum(s["ema"].numel() * 4 for s in states) == planned.averages
    assert 0.95 * (allocations.peak - gradients) < planned.activations < 1.05 * allocations.peak


def half_precision(**model: Any) -> RunConfig:
    several = model.get("num_references", 1) > 1
    return RunConfig(
        name="planned",
        stage="mrar_finetune" if several else "ar_pretrain",
        model=ModelConfig(**model),
        flow=FlowConfig(num_noise_draws=2 if several else 4),
        training=TrainingConfig(precision="bf16-mixed", residual_dtype="bf16", global_batch_size=96),
    )


@pytest.mark.parametrize(("references", "measured"), [(1, {32: 23.4, 96: 63.4}), (4, {16: 20.5, 32: 37.9})])
def test_memory_with_kernels_is_what_an_h100_took(references: int, measured: dict[int, float]):
    """The peaks in GB that benchmarks/README.md has for base: their growth by rows, and the whole."""
    pytest.importorskip("triton")
    run = half_precision(size="base", num_references=references)
    model, cost = model_cost(run), pass_cost(run, bf16=True)
    (few, low), (many, high) = measured.items()
    growth = (high - low) / (many - few) * 1e9
    assert cost.row_bytes == pytest.approx(growth, rel=0.05)
    for rows, gb in measured.items():  # the plan adds all gradients to the peak of the passes
        whole = memory_of(run, "single", 1, rows, model, cost, images=False).total
        assert 1 < whole / gb / 1e9 < 1.15
    plain = memory_of(run, "zero3", 1, many, model, cost, images=False).activations
    assert cost.plain is not None and plain == cost.plain.kept(many) > 1.4 * cost.kept(many)
    assert PassCost(1, 1, 1, 1, 1).under("zero3").plain is None


@pytest.mark.slow
@pytest.mark.parametrize("references", [1, 3])
def test_what_kernels_keep_is_counted(references: int, monkeypatch: pytest.MonkeyPatch):
    """Against the kernels themselves, run by Triton's interpreter, which multiplies no bfloat16."""
    pytest.importorskip("triton")
    from lit_transdiff.kernels import gelu, norm

    for module, name in ((gelu, "GELU_ROWS"), (norm, "NORM_TOKENS")):  # it takes long for each tile
        monkeypatch.setattr(module, name, 16)
    sizes = dict(width=32, num_heads=2, encoder_blocks=1, decoder_blocks=1, latent_channels=2, latent_size=4)
    tokens = dict(num_classes=3, num_class_tokens=3, num_context_tokens=4 * references)
    run = half_precision(num_references=references, **sizes, **tokens)
    rows = 2
    expected = count_pass(run, rows, bf16=True)
    monkeypatch.setattr(kernel_blocks, "takes_kernels", lambda x: torch.is_grad_enabled())
    stage = STAGES[run.stage](run, IdentityAutoencoder(2)).train()
    labels = torch.zeros(rows, dtype=torch.int64)
    shape = (rows, references, 2, 4, 4)
    batch = Batch(torch.zeros(shape), labels, torch.zeros(shape[:2], dtype=torch.int64), labels)
    with kept_tensors(stage.model) as kept, torch.autocast("cpu", torch.float16):
        stage.objective(batch, Standard(rows))
    assert float(expected[0]) == pytest.approx(sum(kept.bytes.values()), rel=1e-3)
    assert float(expected[2]) == sum(kept.inputs.values())


@pytest.mark.parametrize("kind", ["one-step", "MRAR"])
def test_operations_are_those_of_a_real_pass(tmp_path: Path, kind: str):
    """Also for a stage that trains only the head, without a backward pass through the encoder."""
    run = kind_run(tmp_path, kind)
    stage = STAGES[run.stage](run, IdentityAutoencoder(run.model.latent_channels))
    # Not every release of torch counts the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        stage.objective(batch_of(run.model), Standard(ROWS))
        whole = counter.get_total_flops()
        batch = batch_of(run.model)
        stage.model.encode(batch.labels, batch.values[:, :-1])
    encoder = counter.get_total_flops() - whole
    draws = run.flow.num_noise_draws
    assert row_cost(run.model, draws).flops * ROWS == pytest.approx(3 * whole, rel=1e-9)
    assert row_cost(run.model, draws, head_alone=True).flops * ROWS == pytest.approx(
        3 * whole - 2 * encoder, rel=1e-9
    )
    references, model = run.model.num_references, run.model
    decoded = references * draws * model.num_tokens
    assert row_cost(model, draws).tokens == model.num_class_tokens + model.num_context_tokens + decoded


def test_shares_of_the_strategies(tmp_path: Path):
    """On many GPUs, sharded memory vanishes and the rest stays; more sharding means less memory and more
    traffic.
    """
    run = kind_run(tmp_path, "one-step")
    model, cost = model_cost(run), pass_cost(run, False)
    memory = {name: memory_of(run, name, 1000, 1, model, cost, images=False) for name in STRATEGIES}
    whole = model.parameters * 4
    assert memory["ddp"].optimizer == 2 * whole and memory["zero1"].optimizer == 2 * whole / 1000
    assert memory["zero1"].gradients > memory["zero2"].gradients == whole / 1000
    assert memory["zero2"].weights > whole > memory["zero3"].weights > memory["fsdp"].weights
    sent = [communication(name, 1000, 4, model) for name in ("single", "ddp", "zero1", "zero2", "zero3")]
    assert sent == sorted(sent) and sent[0] == 0
    assert communication("ddp", 2, 1, model) == whole  # half of the gradients there, half of them back


def test_the_fastest_step_has_the_fewest_operations_that_fit(tmp_path: Path):
    """Recomputation only where nothing else fits, or where each pass costs more than its operations."""
    run = kind_run(tmp_path, "one-step")
    size, model, counts = run.training.global_batch_size, model_cost(run), counts_of(run, False)

    def bytes_of(recomputed: str, rows: int) -> float:
        again = replace(run, training=replace(run.training, activation_checkpointing=recomputed))
        cost = pass_cost(again, False, counts)
        return memory_of(again, "single", 1, rows, model, cost, images=False).total

    def fastest(memory: float, **rates: float) -> Choice:
        device = replace(DEVICES["h100"], memory=(memory + OVERHEAD) / USABLE * 1.0001, **rates)
        found = choices(run, 1, device, 0.4, model, counts, images=False)
        return min(found, key=lambda choice: choice.seconds)

    best = fastest(1e12)
    assert (best.recomputed, best.row.rows, best.passes) == ("none", size, 1)
    assert "nothing recomputed" in str(best)
    assert fastest(bytes_of("all", 1)).recomputed == "all" and bytes_of("all", 1) < bytes_of("none", 1)
    enough = bytes_of("all", size)
    assert enough < bytes_of("none", size)
    best = fastest(enough, bandwidth=1e18)
    assert best.recomputed == "none" and best.row.rows < size
    best = fastest(enough, bandwidth=1e3)
    assert best.recomputed != "none" and best.row.rows == size


def test_a_plan_says_what_fits_and_what_does_not():
    from lit_transdiff.config.loading import load_run

    recipe = ROOT / "experiments/imagenet256/mrar_huge.yaml"
    text = plan(load_run(recipe), 64, "a100-40gb", 0.35)
    assert "1,328,033,296" in text and "does not fit" in text and "GPU-hours" in text
    assert "\nfastest        " in text and "Triton kernels" in text
    assert not about_kernels(load_run(recipe, ["training.kernels=false"]), bf16=True)
    text = plan(load_run(recipe), 64, "h200", 0.35)
    assert "zero3, fsdp refuse training.precision=bf16-true" in text  # as the run would
    weights = {
        line.split()[0]: float(line.split()[3]) for line in text.splitlines() if line.endswith("<- the run's")
    }
    # float32 in all that is counted with bf16-mixed
    assert weights["ddp"] == 2.66 and weights["zero1"] > 5.31
    small = plan(load_run(recipe), 64, "rtx4090", 0.35)
    assert "ddp does not fit, whatever the micro-batch." in small
    with pytest.raises(ValueError, match=r"--gpu: 'h20' is not known\. Did you mean 'h200'"):
        plan(load_run(recipe), 64, "h20", 0.35)
    assert "refuse" not in plan(load_run(recipe, ["training.precision=bf16-mixed"]), 64, "h200", 0.35)
    with pytest.raises(ValueError, match="stage: got 'autoencoder'; a plan is made of ar_pretrain"):
        plan(load_run(ROOT / "experiments/fashion/autoencoder.yaml"), 1, "h200", 0.35)
    with pytest.raises(ValueError, match=r"--gpus: got 0; allowed: a divisor"):
        plan(load_run(recipe), 0, "h200", 0.35)
    with pytest.raises(
        ValueError, match=r"--gpus: got 3; allowed: a divisor of training\.global_batch_size=2048"
    ):
        plan(load_run(recipe), 3, "h200", 0.35)
