"""How the parts of a model are run: compiled, computed again in the backward pass, cut, in bfloat16, as CUDA graphs.

Each replaces the ``forward`` of single modules or the weights of linear layers. The names of the weights stay, and so do hooks,
such as those by which strategies gather weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lit_transdiff.models.paradigm import Paradigm, build_model

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

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


def shard_blocks(model: Paradigm, mesh: DeviceMesh) -> None:
    """Cut the weights by rows over the devices of ``mesh`` (FSDP2), unit by unit and the rest, unless they are cut already."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return
    for unit in [*model.units(), model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for method in model.methods:
        register_fsdp_forward_method(model, method)


def twin(model: Paradigm) -> Paradigm:
    """Modules of their own around the weights of ``model``, for evaluation: how they run may be changed, and ``model`` stays."""
    with torch.device("meta"):  # the weights are there
        other = build_model(model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # some are not in the state dict
        path, _, key = name.rpartition(".")
        setattr(other.get_submodule(path), key, buffer)
    return other


def round_linear(model: nn.Module) -> None:
    """Keep the weights of linear layers in bfloat16: what autocast computes with, without casting them at each call."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def replay(model: Paradigm) -> None:
    """Run what a solver evaluates as CUDA graphs where no gradients are wanted."""
    model.evaluated.forward = Replayed(model.evaluated.forward)


class Replayed:
    """A network's ``forward`` (see ``Paradigm.evaluated``) as CUDA graphs, which leave the host almost nothing to do at a step.

    A graph is captured for each memory and shape at its first call and replayed at the others; graphs of two memories are kept
    (guided and unguided steps). On CPUs, or where gradients are wanted, the network runs as before.
    """

    KEPT = 2

    def __init__(self, forward: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self.forward = forward
        self.graphs: dict[tuple[int, torch.Size], Graph] = {}

    def __call__(self, x_t: Tensor, t: Tensor, memory: Any) -> Tensor:
        if x_t.device.type != "cuda" or torch.is_grad_enabled():
            return self.forward(x_t, t, memory)
        key = (id(memory), x_t.shape)
        if key not in self.graphs:
            while len(self.graphs) >= self.KEPT:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = Graph(self.forward, x_t, t, memory)
        return self.graphs[key].replay(x_t, t)


class Graph:
    """One captured call; it keeps ``memory``, so that its number stays its own."""

    def __init__(self, forward: Callable[[Tensor, Tensor, Any], Tensor], x_t: Tensor, t: Tensor, memory: Any) -> None:
        self.x_t, self.t, self.memory = x_t.clone(), t.clone(), memory
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up at the first calls, which cannot be captured
            for _ in range(2):
                forward(self.x_t, self.t, memory)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = forward(self.x_t, self.t, memory)

    def replay(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.x_t.copy_(x_t)
        self.t.copy_(t)
        self.graph.replay()
        return self.output.clone()
