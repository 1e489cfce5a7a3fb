"""Every family, however it is run: batches, recomputation, tracing and bfloat16 change only roundings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import merge
from lit_transdiff.flow.process import Process
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models.execution import recompute_blocks
from lit_transdiff.models.paradigm import Paradigm, build_model
from lit_transdiff.stages.objective import losses_of
from tests.helpers.small import FAMILIES, small_run

pytestmark = pytest.mark.numeric
RUNS = {"transdiff": {}, **FAMILIES}
SMALL = {"model": {"latent_size": 8, "patch_size": 2}}
PARTS = FAMILIES["transdiff_parts"]
# The same families with other parts or another order of them.
FORMS = {
    **RUNS,
    "references": {"stage": "mrar_finetune", "model": {"num_references": 4}},
    "cells in raster order": merge(PARTS, {"model": {"order": "raster"}}),
    "scales": merge(PARTS, {"model": {"order": "raster", "parts": "scales"}}),
    "tokens in raster order": merge(FAMILIES["ardiff"], {"model": {"order": "raster"}}),
}
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


def parts_of(model: Paradigm) -> Tensor:
    """The part of each token, [N]."""
    return torch.arange(len(model.part_sizes)).repeat_interleave(torch.tensor(model.part_sizes))


def with_a_changed_part(model: Paradigm, x: Tensor) -> Tensor:
    """Copies [K, R, C, H, W] of an image ``x`` [1, R, C, H, W], each with another part changed; as scales are
    made of the same numbers, a change of one leaves only the coarser ones.
    """
    tokens = model.parts(torch.eye(x.numel()).view(-1, *x.shape[1:])).flatten(2)  # of each number of an image
    part, found = parts_of(model), []
    for j in range(len(model.part_sizes)):
        kept = tokens[:, part != j if tokens[0].numel() == x.numel() else part < j].flatten(1).T
        noise = torch.randn(x.numel())
        found.append(x + (noise - torch.linalg.pinv(kept) @ (kept @ noise)).view_as(x))
    return torch.cat(found)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_part_sees_those_before_it_and_no_other(tmp_path: Path, form: str):
    """Clean or noisy, and never its own clean tokens: the numbers of parts that each sees make an order.

    Where masks hide tokens, each hidden one sees all that are known, and none that is hidden.
    """
    run = small_run(tmp_path, **merge(FORMS[form], SMALL))
    model = model_of(run)
    part, number = parts_of(model), len(model.part_sizes)
    rows, same = number + 1, [0] * (number + 1)  # each part is changed in a row of its own, in the same order
    name, prediction = model.process_of(run.model)
    t = PROCESSES[name](run.flow, prediction).times(PerImageNormal(same)(number))
    x = torch.randn(1, number if form == "references" else 1, 1, 8, 8)
    x_t = torch.randn(1, len(part), *model.token).repeat_interleave(rows, dim=0)
    noisy = x_t.clone()
    for j in range(number):
        noisy[j + 1, part == j] += 1

    def memory_of(x: Tensor) -> Any:
        return model.condition(LABELS[1:2].repeat(rows), DROP[1:2].repeat(rows), x, PerImageNormal(same))

    def sees(memory: Any, x_t: Tensor) -> Tensor:
        """Whether the prediction of part k is another in row j + 1 than in the first, [K, K]."""
        output = model.predict(x_t, t, memory).flatten(2)
        changes = ((output[1:] - output[:1]).abs() > 1e-9).any(dim=2)
        return torch.stack([changes[:, part == k].any(dim=1) for k in range(number)])

    memory = memory_of(x.repeat_interleave(rows, dim=0))
    of_noisy = sees(memory, noisy)
    of_clean = sees(memory_of(torch.cat([x, with_a_changed_part(model, x)])), x_t)
    assert of_noisy.diagonal().all()
    seen, weights = of_clean | of_noisy.fill_diagonal_(False), model.weights(memory)
    counts = torch.ones(number) > 0 if weights is None else weights.view(-1, number)[0] > 0
    rank = seen.sum(dim=1).where(counts, -1)
    assert torch.equal(seen[counts], (rank < rank[:, None])[counts])
    assert len(rank.unique()) == (number if counts.all() else 2)
