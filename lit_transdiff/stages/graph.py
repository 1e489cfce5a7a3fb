"""The objective of a stage as one CUDA graph of its forward pass and one of its backward pass.

A graph replays kernels on fixed memory without any work of the host in between. What changes from pass to
pass are the batch and the random numbers, which are copied to that memory; dropout reads the device's
generator, whose seed is read at each replay.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal

log = logging.getLogger(__name__)
PassFn = Callable[..., tuple[Tensor, Tensor]]
Capture = Callable[[nn.Module, tuple[Tensor, ...]], PassFn]


class ObjectiveFn(Protocol):
    """Losses and noise levels [K M B] of moments [B, R, 2c, h, w] and labels [B] or other conditions."""

    def __call__(self, moments: Tensor, conditions: Tensor, normal: Normal) -> tuple[Tensor, Tensor]: ...


class HostDecides(Exception):
    """A pass computes other things depending on random numbers of the host."""

    def __init__(self) -> None:
        super().__init__("this family computes other things at every pass")


class Asked:
    """A ``Normal`` that remembers what it was asked for."""

    def __init__(self, normal: Normal) -> None:
        self.normal = normal
        self.given: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        self.given.append(self.normal(*shape))
        return self.given[-1]

    def shared(self) -> float:
        raise HostDecides


class Given:
    """A ``Normal`` that gives known ``numbers`` in order."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self.numbers = iter(numbers)

    def __call__(self, *shape: int) -> Tensor:
        return next(self.numbers)

    def shared(self) -> float:
        raise HostDecides


class Pass(nn.Module):
    """The objective as a function of tensors; ``model`` has its parameters."""

    def __init__(self, objective: ObjectiveFn, model: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.model = model

    def forward(self, moments: Tensor, conditions: Tensor, *numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective(moments, conditions, Given(numbers))


def capture(once: nn.Module, sample: tuple[Tensor, ...]) -> PassFn:
    """``once`` as CUDA graphs on the memory of ``sample``."""
    with warnings.catch_warnings():  # the warm-up passes, on a stream of their own, are alive at the capture
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        return torch.cuda.make_graphed_callables(once, sample, allow_unused_input=True)  # type: ignore[return-value]


@contextmanager
def nothing_cached(device: torch.device) -> Iterator[None]:
    """Autocast as it is, without copies of weights that were made outside of a graph."""
    kind = device.type
    torch.clear_autocast_cache()
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype, on, cache_enabled=False):
        yield


@contextmanager
def waits_refused(device: torch.device) -> Iterator[None]:
    """Raise ``RuntimeError`` where the host waits for the device, which no graph can contain."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def forget_capture(device: torch.device) -> None:
    """Give the device's generator a new state: a capture that failed leaves the old one as if captured."""
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(
            torch.Generator(device)
        )


@dataclass(frozen=True)
class Replay:
    """A captured pass, and the shapes of the random numbers that it reads."""

    run: PassFn
    shapes: list[tuple[int, ...]]


class GraphedObjective:
    """``objective``, replayed as CUDA graphs if that is possible and gradients are needed.

    Graphs are captured before the first pass of each shape. Where a pass cannot be repeated, because the host
    decides what it computes or something in it cannot be captured, ``objective`` runs as it is, and the log
    says why; with ``required``, that is an error.
    """

    def __init__(
        self, objective: ObjectiveFn, model: nn.Module, required: bool, capture: Capture = capture
    ) -> None:
        self.objective, self.model, self.required, self.capture = objective, model, required, capture
        self.replays: dict[tuple[torch.Size, ...], Replay | None] = {}

    def __call__(
        self, moments: Tensor, conditions: Tensor, make_normal: Callable[[], Normal]
    ) -> tuple[Tensor, Tensor]:
        """Losses and noise levels [K M B]; ``make_normal`` makes the same source of numbers at every call."""
        shapes = (moments.shape, conditions.shape)
        if shapes not in self.replays:
            self.replays[shapes] = self.attempt(moments, conditions, make_normal)
        replay = self.replays[shapes]
        if replay is None:
            return self.objective(moments, conditions, make_normal())
        normal = make_normal()
        rows, t = replay.run(moments, conditions, *(normal(*shape) for shape in replay.shapes))
        return rows.clone(), t.clone()  # the next replay writes to the same memory

    def attempt(
        self, moments: Tensor, conditions: Tensor, make_normal: Callable[[], Normal]
    ) -> Replay | None:
        """The captured pass, or None if it cannot be captured."""
        devices = [moments.device] if moments.device.type == "cuda" else []
        with torch.random.fork_rng(devices), nothing_cached(moments.device):
            try:
                return self.record(moments, conditions, make_normal)
            except (HostDecides, RuntimeError) as error:
                forget_capture(moments.device)
                if self.required:
                    allowed = f"'auto' or false, as {error}"
                    raise ValueError(f"training.cuda_graphs: got True; allowed: {allowed}") from error
                reason = str(error).splitlines()[0]
                log.warning("training.cuda_graphs: the passes run without graphs: %s", reason)
                return None

    def record(self, moments: Tensor, conditions: Tensor, make_normal: Callable[[], Normal]) -> Replay:
        self.objective(moments, conditions, make_normal())  # makes what is made once, such as masks
        asked = Asked(make_normal())
        with waits_refused(moments.device):
            self.objective(moments, conditions, asked)
        numbers = [torch.zeros_like(number) for number in asked.given]
        sample = (moments.clone(), conditions.clone(), *numbers)
        run = self.capture(Pass(self.objective, self.model), sample)
        return Replay(run, [tuple(number.shape[1:]) for number in numbers])

    def keep_gradients(self) -> None:
        """Move the gradients out of the graph's memory, to which the next pass of a step will write."""
        if any(self.replays.values()):
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad = p.grad.clone()
