"""Profiles of a stretch of work: which operations take the time and the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 40  # operations in a table
ALLOCATIONS = 100_000  # the most in a memory snapshot


class Profile:
    """Records every operation between ``start`` and ``stop``, on the CPU and on the GPU if there is one.

    ``stop`` writes ``trace.json.gz``, which https://ui.perfetto.dev opens; ``operations.txt``, the operations
    that take most time and most memory; and on a GPU ``memory.pickle``, which https://pytorch.org/memory_viz
    opens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.recorder = profile(activities=activities, record_shapes=True, profile_memory=True)

    def __enter__(self) -> Profile:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def start(self) -> None:
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self.recorder.start()

    def stop(self) -> None:
        """Stop recording and write the files."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.recorder.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recorder.export_chrome_trace(str(self.folder / "trace.json.gz"))
        (self.folder / "operations.txt").write_text(self.tables())
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def tables(self) -> str:
        """The operations by their own time and memory, without the operations inside them."""
        operations = self.recorder.key_averages()
        device = "cuda" if self.on_gpu else "cpu"
        by_time = operations.table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        by_memory = operations.table(sort_by=f"self_{device}_memory_usage", row_limit=ROWS)
        return f"By time\n{by_time}\n\nBy memory\n{by_memory}\n"
