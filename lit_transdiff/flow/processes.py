"""The table of noise processes, by the name that a family of models uses."""

from __future__ import annotations

from lit_transdiff.config import require_known
from lit_transdiff.flow.diffusion import CosineDiffusion, LinearDiffusion
from lit_transdiff.flow.process import Process
from lit_transdiff.flow.straight import Flow

PROCESSES: dict[str, type[Process]] = {
    "flow": Flow,
    "cosine_diffusion": CosineDiffusion,
    "linear_diffusion": LinearDiffusion,
}


def process_class(name: str) -> type[Process]:
    """The process of that name. Raises ``ValueError`` for one that is not in the table."""
    require_known("process", name, PROCESSES)
    return PROCESSES[name]
