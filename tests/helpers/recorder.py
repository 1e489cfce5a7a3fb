"""A stand-in for CUDA graphs on the CPU: it records operations and plays them again, in the same memory.

As in a CUDA graph, numbers of Python are constants, tensors stand where they stood, and what waits for the
device's numbers is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::index.Tensor_mask",
}


class Tape(TorchDispatchMode):
    """The operations of a block of code, with their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in WAITING:
            raise RuntimeError(f"CUDA error: {function.name()} is not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        for function, args, kwargs, result in self.operations:
            aliases = [r.alias_info is not None for r in function._schema.returns]
            if any(aliases) and not function._schema.is_mutable:
                continue  # a view: it shows what is written elsewhere
            again = function(*args, **kwargs)
            if not any(aliases):
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class CPURecorder:
    """``sampling.graphs.CUDARecorder`` for tests on the CPU; it counts what it records and plays."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Tape() as tape:
            result = function()
        self.recorded += 1

        @torch.no_grad()
        def play() -> None:
            self.played += 1
            tape.play()

        return play, result
