"""How the blocks of a model are run: compiled, or computed again in the backward pass.

Both replace the ``forward`` of single blocks. The names of the weights stay, and so do the hooks by which strategies gather them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Run each block through ``torch.compile``; blocks of one class share one compilation, so that starting stays short.

    Where nothing can be compiled (no C++ compiler on a CPU, no Triton on a GPU) they run eagerly, and the log says so.
    """
    for block in blocks:
        block.forward = compiled(block.forward)  # type: ignore[method-assign]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of a tensor and more, compiled where its device can."""
    fast = torch.compile(function)

    @wraps(function)
    def run(x: Tensor, *more: Any, **settings: Any) -> Tensor:
        return (fast if can_compile(x.device.type) else function)(x, *more, **settings)

    return run


@lru_cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works on a kind of device: a small function is compiled once. If not, the log says why."""
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device_type))
    except Exception as error:  # of the compiler, of its search for tools, of what they print: they share no class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        log.warning("torch.compile does not work here, the blocks run eagerly: %s", reason)
        return False
    return True


def recompute_blocks(blocks: Iterable[nn.Module], every: int = 1) -> None:
    """Keep only the input of every ``every``-th block; the backward pass computes it again, with the same dropout."""
    for i, block in enumerate(blocks):
        if i % every == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
