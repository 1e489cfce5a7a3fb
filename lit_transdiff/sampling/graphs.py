"""CUDA graphs for sampling: the kernels of a call, recorded once, and replayed without work of the host.

A graph reads and writes fixed memory. So the tensors among the arguments of a call are copied into buffers,
and one graph serves all calls whose arguments have one form (see ``forms``), such as all batches of a size.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow.process import Process
from lit_transdiff.flow.solvers import ADAPTIVE
from lit_transdiff.models.paradigm import Paradigm, Problem
from lit_transdiff.sampling.forms import FormlessError, put_together, take_apart

log = logging.getLogger(__name__)

MOST_FORMS = 1000  # forms of calls with their graphs; the one that was not used for longest goes
MOST_STEPS_OF_A_GRAPH = 50  # steps of a fixed solver in one graph; else each evaluation is a graph

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
Call = tuple[Callable[..., Any], Hashable, tuple[bool, bool]]  # function, form of arguments, mode


@dataclass(frozen=True)
class Task:
    """A part that is to be solved: its problem, with the initial noise and the source of further noise."""

    process: Process
    problem: Problem
    noise: Tensor
    draw: Any  # a PerImageNormal, or one whose calls are counted
    sampling: SamplingConfig

    def solve(self) -> Tensor:
        """``process.solve``, whose further noise is drawn when it is needed."""
        more = partial(self.draw, *self.problem.shape)
        return self.process.solve(self.problem, self.noise, more, self.sampling)


class CUDARecorder:
    """Records what a function does on the GPU: gives what plays it again, and its result, in fixed memory.

    All graphs share one pool of memory, as they are played one after the other and their results are copied.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()

        def play() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            random = torch.cuda.default_generators[torch.cuda.current_device()]
            try:
                # Threads that load data or pin memory go on meanwhile.
                aside, mode = stream_of_graphs(self.device), "thread_local"
                with torch.cuda.graph(graph, self.pool, aside, capture_error_mode=mode):
                    result = function()
            except RuntimeError:  # after which torch keeps its stream, and its generator for graphs
                torch.cuda.set_stream(stream)
                random.graphsafe_set_state(random.clone_state())
                raise
        return play, result


@cache
def stream_of_graphs(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are recorded: libraries keep memory for each."""
    return torch.cuda.Stream(device)


class Graph:
    """A recorded call of a function, with buffers in place of its ``tensors``."""

    def __init__(
        self, function: Callable[..., Any], form: Hashable, tensors: list[Tensor], record: Record
    ) -> None:
        self.buffers = [torch.empty_like(tensor) for tensor in tensors]
        # the tensor and its version in each buffer
        self.held: list[tuple[Callable[[], Tensor | None], int | None]] = [(lambda: None, 0) for _ in tensors]
        self.fill(tensors)
        self.rows = 0  # rows of the evaluations within it
        self.play, result = record(lambda: function(*put_together(form, self.buffers)))
        self.form, self.results = take_apart(result)

    def fill(self, tensors: list[Tensor]) -> None:
        """Copy those tensors that the buffers do not hold already."""
        new = [
            i
            for i, (tensor, (held, version)) in enumerate(zip(tensors, self.held, strict=True))
            if held() is not tensor or version is None or version != version_of(tensor)
        ]
        if new:
            torch._foreach_copy_([self.buffers[i] for i in new], [tensors[i] for i in new])
        self.held = [(ref(tensor), version_of(tensor)) for tensor in tensors]

    def __call__(self, tensors: list[Tensor]) -> Any:
        self.fill(tensors)
        self.play()
        copies = [torch.empty_like(result) for result in self.results]
        torch._foreach_copy_(copies, self.results)
        return put_together(self.form, copies)


def version_of(tensor: Tensor) -> int | None:
    """A number that rises when the tensor is changed in place; tensors of the inference mode have none."""
    return None if tensor.is_inference() else tensor._version


class Graphs:
    """Calls of functions of weights and tensors, each as a graph from its second call of one form on.

    The first call runs as it is, so that nothing is lost on a form that does not return. A call also runs as
    it is within a recorded one, with gradients, or on another device; where its arguments have no form or it
    cannot be recorded; and all do once the memory did not suffice.
    """

    def __init__(self, recorder: Any) -> None:
        self.recorder, self.recording = recorder, False
        self.closed = False  # for good, where the memory does not suffice
        # without a graph: called once, or not to be recorded
        self.known: OrderedDict[Call, Graph | None] = OrderedDict()
        self.refused: set[Call] = set()
        self.rows = 0  # rows through the solver's network so far
        self.draws: dict[Hashable, int] = {}

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(graph is not None for graph in self.known.values())

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``."""
        if self.recording or self.closed or torch.is_grad_enabled():
            return function(*arguments)
        try:
            form, tensors = take_apart(arguments)
        except FormlessError:
            return function(*arguments)
        if {tensor.device.type for tensor in tensors} != {self.recorder.device_type}:
            return function(*arguments)
        mode = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(self.recorder.device_type)
        key = (function, form, mode)
        rows = self.rows
        try:
            graph = self.graph(key, tensors)
            if graph is None:
                return function(*arguments)
            self.rows += graph.rows
            return graph(tensors)
        except torch.OutOfMemoryError:
            if not self.number:
                raise
        self.rows = rows
        self.close()
        return function(*arguments)

    def close(self) -> None:
        """Free the memory of all graphs, and record none from now on."""
        log.warning("the device's memory is too small for the CUDA graphs of sampling, which goes on without")
        self.closed = True
        self.known.clear()
        if self.recorder.device_type == "cuda":
            torch.cuda.empty_cache()

    def graph(self, key: Call, tensors: list[Tensor]) -> Graph | None:
        """The graph of a call, recorded now if it is the second one."""
        if key in self.known:
            self.known.move_to_end(key)
            if self.known[key] is None and key not in self.refused:
                self.known[key] = self.recorded(key, tensors)
        else:
            self.known[key] = None
            while len(self.known) > MOST_FORMS:
                self.refused.discard(self.known.popitem(last=False)[0])
        return self.known[key]

    def recorded(self, key: Call, tensors: list[Tensor]) -> Graph | None:
        """The new graph of a call, or None where it cannot be recorded."""
        self.recording, rows = True, self.rows
        try:
            graph = Graph(key[0], key[1], tensors, self.recorder)
            graph.rows = self.rows - rows
            return graph
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, FormlessError) as error:  # CUDA names no narrower class
            self.refused.add(key)
            reason = str(error).strip().splitlines()[:1]
            log.warning("a part of sampling cannot become a CUDA graph and runs as it is: %s", *reason)
            return None
        finally:
            self.recording, self.rows = False, rows

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls are graphs."""
        return wraps(function)(partial(self, function))

    def counted(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``forward``, whose rows are counted, however often a graph plays it."""

        @wraps(forward)
        def run(*arguments: Any) -> Tensor:
            output = forward(*arguments)
            self.rows += len(output)
            return output

        return run

    def solve(self, task: Task) -> Tensor:
        """``Task.solve``, all steps as one graph where the problem allows it."""
        problem, sampling = task.problem, task.sampling
        explicit = isinstance(problem.predict, partial) and isinstance(problem.pair, partial)
        waits = sampling.solver in ADAPTIVE or sampling.num_steps > MOST_STEPS_OF_A_GRAPH
        if not explicit or waits:
            return task.solve()
        settings = (task.process, take_apart(sampling)[0])
        if settings not in self.draws:
            counted = Counted(task.draw)
            solution = replace(task, draw=counted).solve()
            self.draws[settings] = counted.number
            return solution
        more = task.draw.several(self.draws[settings], *problem.shape)
        alone = Problem(problem.shape, problem.predict, problem.pair)  # the fields that a process reads
        return self(solved, task.process, alone, task.noise, more, sampling)  # type: ignore[no-any-return]


class Counted:
    """A source of numbers whose calls are counted."""

    def __init__(self, draw: Callable[..., Tensor]) -> None:
        self.draw, self.number = draw, 0

    def __call__(self, *shape: int) -> Tensor:
        self.number += 1
        return self.draw(*shape)


def solved(
    process: Process, problem: Problem, noise: Tensor, more: Tensor, sampling: SamplingConfig
) -> Tensor:
    """``process.solve`` with the noise of all steps, [draws, B, ...]."""
    return process.solve(problem, noise, iter(more.unbind()).__next__, sampling)


def replay(network: Paradigm, graphs: Graphs) -> None:
    """Run the solver's network and the functions that a family names as ``static`` as graphs."""
    network.evaluated.forward = graphs.counted(graphs.of(network.evaluated.forward))
    for path in network.static:
        module, _, name = path.rpartition(".")
        owner = network.get_submodule(module)
        setattr(owner, name, graphs.of(getattr(owner, name)))
