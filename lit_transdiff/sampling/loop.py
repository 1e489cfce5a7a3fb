"""The loop over the parts of images, which knows the problem of each part and no family.

Shapes: B rows, R references of a row, c h w a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import FlowConfig, ModelSettings, SamplingConfig, require, require_known
from lit_transdiff.flow.guidance import PART_GUIDANCE
from lit_transdiff.flow.process import Process
from lit_transdiff.flow.processes import process_class
from lit_transdiff.models.paradigm import Paradigm, Problem, network_class
from lit_transdiff.sampling.graphs import Task


def check_sampling(
    sampling: SamplingConfig, model: ModelSettings, recorded: SamplingConfig | None = None
) -> None:
    """Refuse an unknown sampler, or one that does not fit such a model.

    A setting without effect may be the ``recorded`` one of a trained run, which may be from before the rule.
    """
    kind = network_class(model)
    process = process_class(kind.process_of(model)[0])
    process.check_sampling(sampling)
    model.check_sampling(sampling)
    require_known("sampling.part_guidance", sampling.part_guidance, PART_GUIDANCE)
    allowed = f"null with model.paradigm {model.paradigm}, whose parts are given"
    require(
        sampling.num_parts is None or kind.parts_are_free, "sampling.num_parts", sampling.num_parts, allowed
    )
    allowed = f"null with model.paradigm {model.paradigm}, which has no references"
    for name in ("reference_guidance", "reference_steps"):
        value = getattr(sampling, name)
        require(value is None or model.has_references(), f"sampling.{name}", value, allowed)
    unread = dict(process.unread(sampling))
    if model.is_drawn_at_once:
        unread["part_guidance"] = f"with model.paradigm {model.paradigm}, as an image is drawn at once"
    if not model.has_references():
        unread["reuse_noise"] = f"with model.paradigm {model.paradigm}, as rows have no references"
    for name, why in unread.items():
        value, default = getattr(sampling, name), getattr(SamplingConfig(), name)
        known = value == default or (recorded is not None and value == getattr(recorded, name))
        require(known, f"sampling.{name}", value, f"{default!r} {why}")


class Solving(Protocol):
    """A solver of the parts, one after the other, in place of ``Task.solve``."""

    def solve(self, task: Task) -> Tensor: ...


@torch.no_grad()
def generate(
    model: Paradigm,
    labels: Tensor,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    contexts: Any = None,
    kept: Any = None,
    solving: Solving | None = None,
) -> Tensor:
    """Sample latents [B, R, c, h, w] for rows of ``labels`` [B] part by part, each given the parts before it.

    All random numbers of a row come from its own seed, so that it does not depend on the rest of the batch.
    ``contexts`` replace the model's encoding of the labels (see ``Paradigm.fusion``), and ``kept`` is its
    cache (see ``Paradigm.keep``). ``solving`` solves the parts in another way, as by graphs.
    """
    process = process_of(*model.process_of(model.config))
    solve = Task.solve if solving is None else solving.solve
    draw = PerImageNormal(seeds, labels.device)
    decoding = model.decode(labels, sampling, draw, kept, contexts)
    noise: Tensor | None = None
    try:
        problem = next(decoding)
        while True:
            if noise is None or not problem.reuses_noise:
                noise = draw(*problem.shape)
            problem = decoding.send(solve(Task(process, problem, noise, draw, sampler_of(problem, sampling))))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


@lru_cache
def process_of(name: str, prediction: str) -> Process:
    """The process of a family, one object for all batches."""
    return process_class(name)(FlowConfig(), prediction)


def sampler_of(problem: Problem, sampling: SamplingConfig) -> SamplingConfig:
    """The sampler of a part, with its guidance and number of steps."""
    grown = PART_GUIDANCE[sampling.part_guidance](sampling.guidance_scale, problem.progress)
    scale, steps = problem.scale, problem.num_steps
    return replace(
        sampling, guidance_scale=grown if scale is None else scale, num_steps=steps or sampling.num_steps
    )
