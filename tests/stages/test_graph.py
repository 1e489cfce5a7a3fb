"""Passes as CUDA graphs: on a GPU real ones, else a stand-in that runs the pass on the same fixed memory."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_transdiff.base.randomness import GlobalBatchNormal
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.graph import GraphedObjective, capture
from tests.helpers.small import FAMILIES, small_run

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROWS = 4


def replayed(once: nn.Module, sample: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """As a graph does: every call computes on the memory of ``sample``, and gives the same memory."""
    memory: list[Tensor] = []

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        for mine, given in zip(sample, arguments, strict=True):
            assert mine.shape == given.shape and mine.dtype == given.dtype
            mine.copy_(given)
        rows, t = once(*sample)
        if not memory:
            memory.extend([rows.detach().clone(), t.detach().clone()])
        for mine, given in zip(memory, (rows, t), strict=True):
            mine.copy_(given.detach())
        return rows, memory[1]

    return run


def build(folder: Path, family: str | None = None) -> TransDiffStage:
    torch.manual_seed(0)
    run = small_run(folder, **(FAMILIES[family] if family else {}))
    stage = STAGES[run.stage](run, IdentityAutoencoder(1)).to(DEVICE).train()
    return stage  # type: ignore[no-any-return]


def graphed(stage: TransDiffStage, required: bool = True) -> GraphedObjective:
    return GraphedObjective(stage.losses, stage.model, required, capture if ON_GPU else replayed)


def batches(count: int, rows: int = ROWS) -> list[tuple[Tensor, Tensor, Callable[[], GlobalBatchNormal]]]:
    """Moments, labels and random numbers, other ones each time."""
    generator, positions = torch.Generator().manual_seed(1), torch.arange(rows, device=DEVICE)
    return [
        (
            torch.rand(rows, 1, 1, 32, 32, generator=generator).to(DEVICE),
            torch.randint(10, (rows,), generator=generator).to(DEVICE),
            partial(GlobalBatchNormal, seed, rows, positions),
        )
        for seed in range(count)
    ]


def train(stage: TransDiffStage, passes: Callable[..., tuple[Tensor, Tensor]], given: list) -> list[Tensor]:
    """Losses and noise levels of steps of plain gradient descent."""
    optimizer, kept = torch.optim.SGD(stage.model.parameters(), 0.1), []
    for i, batch in enumerate(given):
        torch.manual_seed(i)  # of dropout
        rows, t = passes(*batch)
        kept += [rows.detach(), t]
        optimizer.zero_grad()
        rows.mean().backward()
        optimizer.step()
    return kept


@pytest.mark.parametrize("family", [None, "sit", "acdit"])
def test_graphs_compute_what_the_objective_computes(family: str | None, tmp_path: Path):
    """Losses of four steps, kept until the end, with other images, labels, numbers and weights in each."""
    stages = [build(tmp_path, family) for _ in range(2)]
    plain = train(stages[0], lambda x, y, normal: stages[0].losses(x, y, normal()), batches(4))
    mine = train(stages[1], graphed(stages[1]), batches(4))
    for a, b in zip(mine, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4 if ON_GPU else 0, atol=0), family
    assert not any(plain[0].equal(other) for other in plain[2::2])


def test_each_shape_is_captured_once(tmp_path: Path):
    stage, captured = build(tmp_path), []

    def count(once: nn.Module, sample: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        captured.append(sample)
        return (capture if ON_GPU else replayed)(once, sample)

    passes = GraphedObjective(stage.losses, stage.model, True, count)
    train(stage, passes, [*batches(2), *batches(1, rows=2), *batches(1)])
    assert [len(sample[0]) for sample in captured] == [ROWS, 2]


def test_the_capture_leaves_random_numbers_alone(tmp_path: Path):
    """The first step has the dropout of its seed."""
    stage = build(tmp_path)
    moments, labels, normal = batches(1)[0]
    torch.manual_seed(5)
    first = graphed(stage)(moments, labels, normal)[0].detach()
    torch.manual_seed(5)
    assert torch.allclose(
        first, stage.losses(moments, labels, normal())[0], rtol=1e-4 if ON_GPU else 0, atol=0
    )


def test_gradients_of_accumulated_passes_are_kept(tmp_path: Path):
    stages = [build(tmp_path) for _ in range(2)]
    given = batches(3)
    for stage, passes in ((stages[0], None), (stages[1], graphed(stages[1]))):
        for i, (moments, labels, normal) in enumerate(given):
            torch.manual_seed(i)
            if passes is None:
                rows, _ = stage.losses(moments, labels, normal())
            else:
                if i == 1:
                    passes.keep_gradients()
                rows, _ = passes(moments, labels, normal)
            rows.mean().backward()
    for a, b in zip(*(stage.model.parameters() for stage in stages), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_a_family_that_decides_on_the_host_runs_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    stage = build(tmp_path, "mar")
    moments, labels, normal = batches(1)[0]
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        rows = graphed(stage, required=False)(moments, labels, normal)[0]
    torch.manual_seed(0)
    assert rows.equal(stage.losses(moments, labels, normal())[0])
    assert "the passes run without graphs: this family computes other things at every pass" in caplog.text
    with pytest.raises(ValueError, match=r"training\.cuda_graphs: got True; allowed: 'auto' or false, as"):
        graphed(stage)(moments, labels, normal)


def test_after_a_capture_that_fails_everything_works(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Something waits for the device, which no graph can."""
    stage = build(tmp_path)
    losses = stage.losses

    def waits(moments: Tensor, conditions: Tensor, normal) -> tuple[Tensor, Tensor]:
        rows, t = losses(moments, conditions, normal)
        assert rows.isfinite().all().item()
        return rows, t

    def refused(once: nn.Module, sample: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    passes = GraphedObjective(waits, stage.model, False, capture if ON_GPU else refused)
    given = batches(3)
    plain = train(build(tmp_path), lambda x, y, normal: build(tmp_path).losses(x, y, normal()), given[:1])
    with caplog.at_level(logging.WARNING):
        mine = train(stage, passes, given)
    assert "the passes run without graphs" in caplog.text
    assert torch.allclose(mine[0], plain[0], rtol=1e-4 if ON_GPU else 0, atol=0)
    assert all(rows.isfinite().all() for rows in train(build(tmp_path), graphed(build(tmp_path)), given))
