"""The base of every part of the benchmark on a GPU: the place of results, the time left, and clocks."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.base.hardware import wait_for


@dataclass
class Bench:
    """The device, the sizes, the time that is left, and where results go."""

    device: torch.device
    tiny: bool
    end: float
    output: Path | None

    def say(self, line: str) -> None:
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(line + "\n")

    def table(self, *heads: str) -> None:
        self.say("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")

    def row(self, *cells: object) -> None:
        self.say("| " + " | ".join(map(str, cells)) + " |")

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do ``work`` if there is time; an error ends this piece of work alone."""
        if time.perf_counter() > self.end:
            return self.say(f"{name}: left out, no time")
        try:
            work()
        except Exception as error:  # any failure of one measurement must leave the others
            traceback.print_exc()
            self.say(f"{name}: failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def median_ms(work: Callable[[], Any], device: torch.device, rounds: int, warm: int = 3) -> float:
    """The median time of ``work`` in ms, queued one after the other, by the events of the device."""
    for _ in range(warm):
        work()
    wait_for(device)
    if device.type != "cuda":
        return 1e3 * statistics.median(seconds(work) for _ in range(min(rounds, 2)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    wait_for(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def graph_of(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``work`` as a CUDA graph, which leaves the host's part out; on CPUs ``work`` itself."""
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        work()
    return graph.replay
