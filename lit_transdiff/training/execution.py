"""How a run computes on this machine: said in its record, and the time until its first step has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.attention import SDPBackend

from lit_transdiff.config import RunConfig
from lit_transdiff.distributed import STRATEGIES, compute_dtype, strategy_name
from lit_transdiff.distributed.world import accelerator_and_devices
from lit_transdiff.models.cpu_bf16 import multiplies_bfloat16
from lit_transdiff.models.kernel_blocks import has_kernels
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.blocks import wants_kernels


def execution_of(run: RunConfig, stage: nn.Module) -> dict[str, Any]:
    """The values that settings of ``auto`` take for this run on this machine."""
    training, dtype = run.training, compute_dtype(run)
    on_gpu = accelerator_and_devices(run)[0] == "gpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    kernels = on_gpu and dtype != torch.float32 and wants_kernels(run)
    compiles = training.compile is True or (training.compile == "auto" and on_gpu)
    blocks = blocks_of(stage)
    ours = {module for block in blocks if kernels and has_kernels(block) for module in block.modules()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_precision": training.matmul_precision,
        "kernels": bool(ours),
        "compile": compiles and not ours.issuperset(blocks),
        "cuda_graphs": on_gpu and training.takes_graphs and STRATEGIES[strategy_name(run)].whole,
        "attention": sorted({attention_of(m, device, dtype, m in ours) for m in attentions(stage)}),
    }


def blocks_of(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a generator; none of other stages."""
    stacks = stage.model.block_lists().values() if isinstance(stage, TransDiffStage) else ()
    return [block for stack in stacks for block in stack]


def attentions(stage: nn.Module) -> Iterator[nn.Module]:
    """The attention layers of a stage."""
    return (module for module in stage.modules() if hasattr(module, "num_heads") and hasattr(module, "proj"))


def attention_of(module: nn.Module, device: torch.device, dtype: torch.dtype, by_triton: bool) -> str:
    """The kernel of an attention layer in training: ours by Triton or for CPUs, or torch's choice here."""
    if by_triton:
        return "triton"
    if device.type == "cpu" and dtype == torch.bfloat16 and multiplies_bfloat16():
        return "cpu_bf16"
    dimension = int(module.proj.in_features // module.num_heads)  # type: ignore[union-attr, operator]
    p = getattr(module, "attention_dropout", 0.0)
    x = torch.empty(1, 1, 256, dimension, device=device, dtype=dtype, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(x, x, x, dropout_p=p)).name.lower()  # type: ignore[no-any-return]


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Products of float32 matrices in torch's ``precision``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FirstStep(pl.Callback):
    """Say how long the first step took, in which blocks are compiled and graphs captured."""

    seconds: float | None = None

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *arguments: object) -> None:
        if self.seconds is None:
            self.seconds = time.perf_counter() - self.start
            rank_zero_info(f"first step: {self.seconds:.1f} s, with compilation and capture of what is kept")
