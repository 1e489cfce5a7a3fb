"""Execution of a model: compilation, recomputation, sharding and bfloat16 weights.

Each replaces the ``forward`` of single modules or the weights of linear layers. The names of the weights are
unchanged, and so are hooks, such as those by which strategies gather weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lit_transdiff.base.files import user_cache
from lit_transdiff.models.paradigm import Paradigm, build_model

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

log = logging.getLogger(__name__)


def compile_blocks(blocks: Iterable[nn.Module], devices: Sequence[str] = ("cpu", "cuda")) -> None:
    """Compile each block for types of ``devices``; blocks of one class share one compilation.

    If compilation is impossible (no C++ compiler on a CPU, no Triton on a GPU), they run eagerly with a
    warning. ``forward`` is compiled, not the module (``nn.Module.compile``): hooks, by which strategies
    gather weights, and recomputation stay outside the graph.
    """
    for block in blocks:
        block.forward = compiled(block.forward, devices)  # type: ignore[method-assign]


def compile_evaluated(model: Paradigm) -> None:
    """Compile the blocks that a solver evaluates, and the layers around them that are more than a product."""
    blocks = {block for stack in model.block_lists().values() for block in stack}
    simple = (nn.Linear, nn.ModuleList, nn.ModuleDict)
    around = {part for part in model.evaluated.children() if not isinstance(part, simple)}
    whole = {part for part in around if not blocks & {*part.modules()}}
    compile_blocks(part for part in model.evaluated.modules() if part in blocks | whole)


def compiled(function: Callable[..., Tensor], devices: Sequence[str]) -> Callable[..., Tensor]:
    """``function`` of a tensor and more, compiled for a tensor on one of ``devices`` that supports it."""
    fast = torch.compile(function)

    @wraps(function)
    def run(x: Tensor, *more: Any, **settings: Any) -> Tensor:
        kind = x.device.type
        return (fast if kind in devices and can_compile(kind) else function)(x, *more, **settings)

    return run


def keep_compiled() -> None:
    """Let torch keep compiled code where later runs find it, unless the environment names a folder."""
    folder = user_cache("compiled")
    with suppress(OSError):  # then torch takes a temporary folder
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@lru_cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works on a type of device, tested on a small function; if not, log why."""
    keep_compiled()
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device_type))
    except Exception as error:  # compilers and their tools have no common error class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        log.warning("torch.compile does not work here, the blocks run eagerly: %s", reason)
        return False
    return True


def recompute_blocks(blocks: Iterable[nn.Module], every: int = 1) -> None:
    """Keep only the input of every ``every``-th block; the backward pass recomputes it with equal dropout."""
    for i, block in enumerate(blocks):
        if i % every == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def round_stream(blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Give each block its input, the residual stream, in ``dtype`` where autocast is on."""
    for block in blocks:
        block.forward = partial(forward_rounded, block.forward, dtype)  # type: ignore[method-assign]


def forward_rounded(
    forward: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, *more: Any, **settings: Any
) -> Tensor:
    return forward(x.to(dtype) if torch.is_autocast_enabled(x.device.type) else x, *more, **settings)


def check_cpus(mesh: DeviceMesh) -> None:
    """Refuse CPUs whose gradients torch cannot average under FSDP (2.6) or adds up instead (2.7)."""
    if mesh.device_type != "cpu":
        return
    problem = f"torch {torch.__version__} cannot average the gradients of CPUs"
    average = torch.ones(1)
    able = hasattr(torch.cpu.Stream, "record_event")
    if able and mesh.size() > 1:
        dist.reduce_scatter_tensor(average, torch.ones(mesh.size()), dist.ReduceOp.AVG, mesh.get_group())
    if not able or average.item() != 1:
        raise ValueError(f"distributed.strategy: got 'fsdp'; allowed: another one, as {problem}.")


def shard_blocks(model: Paradigm, mesh: DeviceMesh) -> None:
    """Shard the weights by rows over the devices of ``mesh`` (FSDP2), unit by unit, if they are whole."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return
    check_cpus(mesh)
    for unit in [*model.units(), model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for method in model.methods:
        register_fsdp_forward_method(model, method)


def twin(model: Paradigm) -> Paradigm:
    """New modules with the weights of ``model``, whose execution can be changed without affecting it."""
    with torch.device("meta"):  # the weights already exist
        other = build_model(model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # some are missing in the state dict
        path, _, key = name.rpartition(".")
        setattr(other.get_submodule(path), key, buffer)
    return other


def round_linear(model: nn.Module) -> None:
    """Convert the weights of linear layers to bfloat16, as autocast would at each call."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
