"""Muon, against its update written out in float64, against torch's own, and against
AdamW where it is AdamW.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lit_transdiff.config import OptimizerConfig
from lit_transdiff.stages.muon import AveragedMuon, direction, directions_by_shape, orthogonal
from lit_transdiff.stages.optim import build_optimizer, check_optimizer, lr_factor, parameter_groups
from tests.helpers.small_model import build

pytestmark = pytest.mark.numeric
SHAPES = [(6, 6), (12, 4), (4, 12)]
DECAY, RATE = 0.1, 0.05


def plain_orthogonal(matrix: Tensor) -> Tensor:
    """The same polynomial of the singular values, by the singular value decomposition, in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vt


def plain_steps(weight: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    """Nesterov momentum, orthogonal update, decoupled decay, in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    factor = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
    for gradient, rate in zip(gradients, rates, strict=True):
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        update = plain_orthogonal(0.05 * gradient.double() + 0.95 * momentum)
        weight = weight - rate * DECAY * weight - rate * factor * update
    return weight


def optimizer_of(weights: list[nn.Parameter], **settings: float) -> AveragedMuon:
    group = {
        "params": weights,
        "shapes": [tuple(p.shape) for p in weights],
        "weight_decay": DECAY,
        "lr": RATE,
    }
    return AveragedMuon([group], decays={"ema": lambda update: 0.5}, **settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one_and_the_singular_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonal(matrix)
    torch.testing.assert_close(found.double(), plain_orthogonal(matrix), rtol=1e-4, atol=1e-4)
    assert ((values := torch.linalg.svdvals(found)) > 0.6).all() and (values < 1.3).all()
    torch.testing.assert_close(orthogonal(1e3 * matrix), found, rtol=1e-4, atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_matrices_of_one_shape_move_together_as_they_do_alone() -> None:
    torch.manual_seed(9)
    matrices = [torch.randn(shape) for shape in (*SHAPES, *SHAPES)]
    for found, matrix in zip(directions_by_shape(matrices), matrices, strict=True):
        torch.testing.assert_close(found, direction(matrix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_written_out_in_float64(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(shape))
    start, gradients, rates = (
        weight.detach().clone(),
        [torch.randn(shape) for _ in range(4)],
        [RATE * r for r in (0.5, 1, 1, 0.2)],
    )
    optimizer = optimizer_of([weight])
    history = [start]
    for gradient, rate in zip(gradients, rates, strict=True):
        weight.grad, optimizer.param_groups[0]["lr"] = gradient.clone(), rate
        optimizer.step()
        history.append(weight.detach().clone())
    torch.testing.assert_close(weight.double(), plain_steps(start, gradients, rates), rtol=1e-4, atol=1e-4)
    average = start
    for value in history[1:]:
        average = (average + value) / 2
    torch.testing.assert_close(optimizer.state[weight]["ema"], average)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch >= 2.9 has a Muon of its own")
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch_but_for_its_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape))
    theirs.data.copy_(ours)
    pair = optimizer_of([ours]), torch.optim.Muon([theirs], lr=RATE, weight_decay=DECAY)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.04 * RATE * 3)


def test_the_rest_goes_by_adamw_and_each_has_its_own_rate() -> None:
    """Of matrices that are in no block, too; both rates follow the warm-up and the schedule."""
    torch.manual_seed(3)
    config = OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02, warmup_steps=4, schedule="cosine")
    model, other = build(4), build(4)
    other.load_state_dict(model.state_dict())
    optimizer = build_optimizer(model, config)
    reference = build_optimizer(other, OptimizerConfig(lr=1e-3))
    rates = {"shapes" in group: group["lr"] for group in optimizer.param_groups}
    assert rates == {True: 0.02, False: 1e-3}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, 10, config))
    assert {"shapes" in group: group["lr"] for group in optimizer.param_groups} == {
        True: 0.02 / 4,
        False: 1e-3 / 4,
    }
    for group in reference.param_groups:
        group["lr"] /= 4
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    reference.step()
    schedule.step()
    theirs, count = dict(other.named_parameters()), 0
    for name, p in model.named_parameters():
        if ".blocks." in name and p.ndim == 2:
            decay = 0.0 if name.startswith("decoder.") else 0.02
            expected = before[name] * (1 - 0.005 * decay) - 0.005 * direction(p.grad * 0.0975)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)
            count += 1
        else:
            assert torch.equal(p, theirs[name]), name
    assert count == sum(len(group.matrices) for group in parameter_groups(model, 0.02)) > 0


def test_a_loaded_optimizer_goes_on_in_the_same_bits() -> None:
    torch.manual_seed(4)
    model, other = build(4), build(4)
    config = OptimizerConfig(name="muon", lr=1e-3)
    optimizer = build_optimizer(model, config)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=noise)
        optimizer.step()

    for seed in range(3):
        step(model, optimizer, seed)
    other.load_state_dict(model.state_dict())
    loaded = build_optimizer(other, config)
    loaded.load_state_dict(deepcopy(optimizer.state_dict()))
    step(model, optimizer, 3)
    step(other, loaded, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, loaded.state[q][name]) for name, value in optimizer.state[p].items())


def test_a_rate_of_muon_without_muon_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer\.muon_lr: got 0\.1; allowed: null with optimizer\.name=adamw"
    ):
        check_optimizer(OptimizerConfig(muon_lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer\.muon_lr: got 0; allowed: null, or above 0"):
        OptimizerConfig(name="muon", muon_lr=0)
