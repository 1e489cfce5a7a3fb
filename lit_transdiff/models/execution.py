"""Execution of a model: compilation, recomputation, sharding, bfloat16 weights and CUDA graphs.

Each replaces the ``forward`` of single modules or the weights of linear layers. The names of the weights are
unchanged, and so are hooks, such as those by which strategies gather weights.
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
    """Run each block through ``torch.compile``; blocks of one class share one compilation, so that starting
    remains fast.

    If compilation is impossible (no C++ compiler on a CPU, no Triton on a GPU), they run eagerly with a
    warning. ``forward`` is compiled, not the module (``nn.Module.compile``): hooks, by which strategies
    gather weights, and recomputation stay outside the graph.
    """
    for block in blocks:
        block.forward = compiled(block.forward)  # type: ignore[method-assign]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of a tensor and more, compiled if its device supports that."""
    fast = torch.compile(function)

    @wraps(function)
    def run(x: Tensor, *more: Any, **settings: Any) -> Tensor:
        return (fast if can_compile(x.device.type) else function)(x, *more, **settings)

    return run


@lru_cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works on a type of device, tested on a small function; if not, log why."""
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device_type))
    except Exception as error:  # compilers and their tools have no common error class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        log.warning("torch.compile does not work here, the blocks run eagerly: %s", reason)
        return False
    return True


def recompute_blocks(blocks: Iterable[nn.Module], every: int = 1) -> None:
    """Store only the input of every ``every``-th block; the backward pass recomputes
    it, with equal dropout.
    """
    for i, block in enumerate(blocks):
        if i % every == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def shard_blocks(model: Paradigm, mesh: DeviceMesh) -> None:
    """Shard the weights by rows over the devices of ``mesh`` (FSDP2), unit by unit,
    unless already sharded.
    """
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return
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


def replay(model: Paradigm) -> None:
    """Run the solver's network as CUDA graphs if no gradients are needed."""
    model.evaluated.forward = Replayed(model.evaluated.forward)


class Replayed:
    """A network's ``forward`` (see ``Paradigm.evaluated``) as CUDA graphs, which nearly eliminate the host's
    work per step.

    A graph is captured at the first call for each memory and shape and then replayed; graphs of two memories
    are kept (guided and unguided steps). On CPUs, or if gradients are needed, the network runs as before.
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
    """A captured call; it keeps ``memory`` alive, so that its id remains unique."""

    def __init__(
        self, forward: Callable[[Tensor, Tensor, Any], Tensor], x_t: Tensor, t: Tensor, memory: Any
    ) -> None:
        self.x_t, self.t, self.memory = x_t.clone(), t.clone(), memory
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries initialise at the first calls, which cannot be captured
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
