"""Every family, however it is run: batches, recomputation, tracing and bfloat16 change only roundings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import RunConfig
from lit_transdiff.flow.process import Process
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models.execution import recompute_blocks
from lit_transdiff.models.paradigm import Paradigm, build_model
from lit_transdiff.stages.objective import losses_of
from tests.helpers.small import FAMILIES, small_run

pytestmark = pytest.mark.numeric
RUNS = {"transdiff": {}, **FAMILIES}
LABELS, DROP = torch.tensor([0, 7, 3]), torch.tensor([True, False, False])


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunConfig:
    return small_run(tmp_path, **RUNS[request.param])


def model_of(run: RunConfig) -> Paradigm:
    """A model whose weights are all random, without dropout."""
    torch.manual_seed(0)
    model = build_model(run.model).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def losses(run: RunConfig, model: Paradigm, rows: Sequence[int] = (0, 1, 2)) -> Tensor:
    """The losses [K M, B] of some of three images, of fixed numbers."""
    name, prediction = model.process_of(run.model)
    process: Process = PROCESSES[name](run.flow, prediction)
    x = torch.randn(3, 1, 1, 32, 32, generator=torch.Generator().manual_seed(1))[list(rows)]
    normal: Any = PerImageNormal([*rows])
    result, _ = losses_of(model, process, LABELS[list(rows)], DROP[list(rows)], x, normal, 2)
    return result.unflatten(0, (-1, len(rows)))


def test_a_batch_is_its_images_one_by_one(run: RunConfig):
    model = model_of(run)
    alone = torch.cat([losses(run, model, [i]) for i in range(3)], dim=1)
    torch.testing.assert_close(losses(run, model), alone, rtol=1e-4, atol=1e-5)


def test_recomputed_and_traced_blocks_give_the_same_numbers(run: RunConfig):
    """A block of each kind is traced as torch.compile does, as one graph, but not compiled."""
    found = []
    for how in ("plain", "recomputed", "traced"):
        model = model_of(run)
        stacks = model.block_lists().values()
        if how == "recomputed":
            for blocks in stacks:
                recompute_blocks(blocks)
        elif how == "traced":
            for block in {type(block): block for blocks in stacks for block in blocks}.values():
                block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
        losses(run, model).mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len([p for p in model_of(run).parameters() if p.requires_grad])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_bfloat16_changes_little(run: RunConfig):
    """By autocast, and with weights in bfloat16."""
    model = model_of(run)
    exact = losses(run, model).mean()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses(run, model).mean()
    true = losses(run, model.to(torch.bfloat16)).mean()
    for rounded in (mixed, true):
        assert 0 < abs(rounded.item() - exact.item()) < 0.05 * exact.item()
