"""How the blocks of a model run in training: by kernels, compiled, with a rounded stream, recomputed."""

from __future__ import annotations

import torch

from lit_transdiff.config import RunConfig
from lit_transdiff.models.execution import compile_blocks, recompute_blocks, round_stream
from lit_transdiff.models.kernel_blocks import has_kernels, use_kernels
from lit_transdiff.models.paradigm import Paradigm


def gathers(strategy: str) -> bool:
    """Whether a strategy gathers weights layer by layer, which the kernels do not know."""
    return strategy == "zero3"


def wants_kernels(run: RunConfig) -> bool:
    """Whether blocks use the kernels that they have, where these apply."""
    kernels = run.training.kernels
    return kernels is True or (kernels == "auto" and not gathers(run.distributed.strategy))


def arrange_blocks(model: Paradigm, run: RunConfig) -> None:
    """Let the blocks of a model run as the settings of training say."""
    training, stacks, kernels = run.training, model.block_lists(), wants_kernels(run)
    blocks = [block for stack in stacks.values() for block in stack]
    if training.compile is True:
        compile_blocks(blocks)
    elif training.compile == "auto":
        compile_blocks((block for block in blocks if not (kernels and has_kernels(block))), ["cuda"])
    if kernels:
        use_kernels(model)
    if training.residual_dtype == "bf16":
        round_stream(blocks, torch.bfloat16)
    for name in training.recomputed(stacks):
        recompute_blocks(stacks[name], training.activation_checkpointing_every)
