"""PyTorch's flight recorder: the last collectives of every rank, for the time when one of them does not end.

NCCL's own watchdog writes them to a file when a collective exceeds its time limit, and so does ours when a
step stalls. Where one rank waits in a collective that another has not reached, the other is to blame.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed

ENTRIES = "2000"  # collectives that are kept
LAST_TOLD = 5  # collectives that are told in words, the last ones
# The names of PyTorch up to 2.9, and the present ones.
BUFFER_SIZES = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE")
DUMP_FILES = ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE")
TRACES = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # the functions for NCCL and for all other backends
TRACE_FOLDER = "collectives"  # in the run folder


def record_collectives(folder: Path) -> None:
    """Switch the recorder on, with NCCL's files ``rank-0``, ``rank-1``, ... below ``folder``, which PyTorch's
    ``torchfrtrace`` reads; before the process group is made.

    Variables that are set already stay.
    """
    place = folder / TRACE_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    settings = {name: ENTRIES for name in BUFFER_SIZES} | {name: str(place / "rank-") for name in DUMP_FILES}
    for name, value in (settings | {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}).items():
        os.environ.setdefault(name, value)


def last_collectives(folder: Path, rank: int) -> str:
    """Write this rank's collectives to a file, and tell the last ones and where it is; empty without any."""
    trace = recorded()
    if not trace:
        return ""
    file = folder / TRACE_FOLDER / f"last-{rank}.json"
    told = "; ".join(map(collective_in_words, trace["entries"][-LAST_TOLD:]))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(trace))
        place = f"All are in {file}"
    except OSError as error:  # such as a file system that has gone, too
        place = f"{file} could not be written ({error.strerror})"
    others = os.environ.get(DUMP_FILES[-1], os.environ.get(DUMP_FILES[0]))
    nccl = f", and NCCL's own dumps, after its time limit, in {others}*, for torchfrtrace" if others else ""
    return f"The last collectives of this rank: {told}. {place}{nccl}."


def recorded() -> dict[str, Any]:
    """The recorder's content; empty without any collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    for name in TRACES:
        dump = getattr(torch._C._distributed_c10d, name, None)  # older versions lack the second
        trace = json.loads(dump()) if dump is not None else {}
        if trace.get("entries"):
            return dict(trace)
    return {}


def collective_in_words(entry: dict[str, Any]) -> str:
    """A collective: its name and number, shapes, and how far it has come."""
    shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in entry.get("input_sizes", []))
    done = entry.get("retired") or entry.get("state") == "completed"
    state = "completed" if done else entry.get("state", "unknown")
    number = entry.get("collective_seq_id", "?")
    return " ".join(word for word in (str(entry.get("profiling_name")), f"#{number}", shapes, state) if word)
