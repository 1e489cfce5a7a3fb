"""AdamW with averages: against torch's AdamW and the recursion written out."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lit_transdiff.checkpoints.averages import average_decays, power_of, power_state
from lit_transdiff.config import OptimizerConfig
from lit_transdiff.stages.adamw import adamw_works
from lit_transdiff.stages.optim import SCHEDULES, AveragedAdamW, build_optimizer, lr_factor, parameter_groups
from tests.helpers.small_model import build

pytestmark = pytest.mark.numeric


def train(optimizer: torch.optim.Optimizer, layer: nn.Linear, steps: int) -> list[torch.Tensor]:
    history = [layer.weight.detach().clone()]
    for i in range(steps):
        optimizer.zero_grad()
        layer(torch.full((1, 3), float(i + 1))).square().sum().backward()
        optimizer.step()
        history.append(layer.weight.detach().clone())
    return history


def layers() -> tuple[nn.Linear, nn.Linear]:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    return first, second


def test_the_weights_move_as_with_torch_and_the_average_follows_the_recursion():
    ours, theirs = layers()
    optimizer = AveragedAdamW(
        ours.parameters(), decays={"ema": lambda update: 0.8}, lr=0.1, weight_decay=0.02
    )
    history = train(optimizer, ours, 5)
    expected = train(torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.02), theirs, 5)
    torch.testing.assert_close(history, expected)
    average = history[0]
    for weights in history[1:]:
        average = 0.8 * average + 0.2 * weights
    torch.testing.assert_close(optimizer.state[ours.weight]["ema"], average)


def test_several_averages_have_their_own_decay():
    layer, _ = layers()
    optimizer = AveragedAdamW(
        layer.parameters(),
        decays=average_decays(OptimizerConfig(ema_decay=0.5, more_ema_decays=[0.9])),
        lr=0.1,
    )
    history = train(optimizer, layer, 4)
    for name, decay in {"ema": 0.5, "ema_0.9": 0.9}.items():
        average = history[0]
        for weights in history[1:]:
            average = decay * average + (1 - decay) * weights
        torch.testing.assert_close(optimizer.state[layer.weight][name], average)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_function_average_has_the_profile_of_its_width(width: float):
    """The weights after update i count as i^(gamma + 1) - (i - 1)^(gamma + 1)."""
    layer, _ = layers()
    optimizer = AveragedAdamW(
        layer.parameters(), decays=average_decays(OptimizerConfig(power_widths=[width])), lr=0.1
    )
    history = torch.stack(train(optimizer, layer, 40)[1:]).double()
    edges = torch.linspace(0, 1, 41, dtype=torch.float64) ** (power_of(width) + 1)
    profile = edges.diff()
    found = optimizer.state[layer.weight][power_state(width)].double()
    torch.testing.assert_close(found, (profile[:, None, None] * history).sum(0), rtol=1e-5, atol=1e-6)
    middles = torch.arange(40).add(0.5) / 40
    spread = (profile * middles**2).sum() - (profile * middles).sum() ** 2
    assert spread.sqrt().item() == pytest.approx(width, rel=0.02)


def test_a_skipped_step_changes_nothing():
    layer, _ = layers()
    optimizer = AveragedAdamW(
        layer.parameters(), decays={"ema": lambda update: 0.5}, lr=0.1, weight_decay=0.1
    )
    train(optimizer, layer, 2)
    before = {name: value.clone() for name, value in optimizer.state[layer.weight].items()}
    optimizer.skip_step = True
    history = train(optimizer, layer, 2)
    assert all(torch.equal(history[0], weights) for weights in history)
    assert all(torch.equal(before[name], value) for name, value in optimizer.state[layer.weight].items())


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's kernels at sizes for Triton's interpreter."""
    adamw = pytest.importorskip("lit_transdiff.kernels.adamw")
    monkeypatch.setattr(adamw, "ADAMW_CHUNK", 8)
    monkeypatch.setattr(adamw, "ADAMW_BLOCK", 4)


def clipped_steps(optimizer: AveragedAdamW, layer: nn.Linear, first: int, last: int) -> None:
    """Steps from gradients that are the same for every optimizer, of which the last has none of the bias."""
    for i in range(first, last):
        layer.weight.grad = torch.arange(6.0).view(2, 3) * (i + 1)
        layer.bias.grad = None if i == 4 else torch.ones(2)
        if not optimizer.clips(gradient_clip_val=2.0, gradient_clip_algorithm="norm"):
            nn.utils.clip_grad_norm_(layer.parameters(), 2.0)
        optimizer.step()


def test_kernels_compute_the_same_steps_and_states(by_kernels: None):
    """Also when the states were loaded, a step is skipped, and a parameter has no gradient."""
    decays = average_decays(OptimizerConfig(ema_decay=0.5, power_widths=[0.1]))
    built, states = layers(), []
    for layer, kernels in zip(built, (False, True), strict=True):
        groups = [
            {"params": [layer.weight], "weight_decay": 0.1},
            {"params": [layer.bias], "weight_decay": 0.0},
        ]
        optimizer = AveragedAdamW(groups, decays=decays, lr=0.1, fused=True)
        optimizer.kernels = kernels
        clipped_steps(optimizer, layer, 0, 3)
        assert (optimizer.tables() is not None) == kernels
        optimizer.skip_step = True
        clipped_steps(optimizer, layer, 3, 4)
        optimizer.skip_step = False
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        clipped_steps(optimizer, layer, 3, 5)
        states.append(optimizer.state_dict())
    torch.testing.assert_close(built[1].state_dict(), built[0].state_dict(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-7)


def test_kernels_leave_what_they_cannot_update_to_torch(by_kernels: None):
    layer, _ = layers()
    optimizer = AveragedAdamW(layer.parameters(), decays={"ema": lambda update: 0.5}, lr=0.1, fused=True)
    optimizer.kernels = True
    clipped_steps(optimizer, layer, 0, 1)
    assert optimizer.tables() is not None
    layer.weight.grad = torch.ones(3, 2).T  # of another order in memory
    assert optimizer.tables() is None and not optimizer.clips(2.0, "norm")
    assert not optimizer.clips(2.0, "value")


@pytest.fixture
def made(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors in each of the tables that are made."""
    from lit_transdiff.kernels import adamw

    sizes: list[int] = []

    class Counted(adamw.Tables):
        def __init__(self, groups: list[list[adamw.Updated]]) -> None:
            super().__init__(groups)
            sizes.append(sum(map(len, groups)))

    adamw_works(torch.device("cpu"))  # which makes one, too
    monkeypatch.setattr(adamw, "Tables", Counted)
    return sizes


def test_addresses_are_listed_once_and_again_when_a_tensor_has_moved(made: list[int]):
    """Every way in which a tensor moves, after which steps equal those of torch."""
    (layer, other), steps = layers(), []
    optimizers = [
        AveragedAdamW(each.parameters(), decays={"ema": lambda update: 0.5}, lr=0.1, fused=True)
        for each in (layer, other)
    ]
    optimizers[0].kernels = True

    def replaced_gradients(layer: nn.Linear, optimizer: AveragedAdamW) -> None:
        kept.extend(p.grad for p in layer.parameters())
        layer.zero_grad()  # the next ones are elsewhere

    def moved_weight(layer: nn.Linear, optimizer: AveragedAdamW) -> None:
        layer.weight.data = layer.weight.detach().clone()

    def loaded_states(layer: nn.Linear, optimizer: AveragedAdamW) -> None:
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))

    def states_on_another_device(layer: nn.Linear, optimizer: AveragedAdamW) -> None:
        for p, states in optimizer.state.items():  # as Lightning does it
            optimizer.state[p] = {name: value.clone() for name, value in states.items()}

    def replaced_average(layer: nn.Linear, optimizer: AveragedAdamW) -> None:
        optimizer.state[layer.weight]["ema"] = optimizer.state[layer.weight]["ema"].clone()
        optimizer.forget()

    def missing_gradient(layer: nn.Linear, optimizer: AveragedAdamW) -> None:
        layer.bias.grad = None

    kept: list[torch.Tensor | None] = []
    for change, expected in (
        (None, [2]),  # after torch's first step
        (replaced_gradients, [2]),
        (moved_weight, [2]),
        (loaded_states, [2]),
        (states_on_another_device, [2]),
        (replaced_average, [2]),
        (missing_gradient, [1]),
    ):
        made.clear()
        for each, optimizer in zip((layer, other), optimizers, strict=True):
            if change is not None:
                change(each, optimizer)
            for step in range(10):
                for i, p in enumerate(each.parameters()):
                    values = torch.full_like(p, 0.1 * step + i)
                    if p.grad is not None:
                        p.grad.copy_(values)
                    elif change is not missing_gradient:
                        p.grad = values
                if not optimizer.clips(gradient_clip_val=2.0, gradient_clip_algorithm="norm"):
                    nn.utils.clip_grad_norm_(each.parameters(), 2.0)
                optimizer.step()
        assert made == expected
        torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)
        steps = [optimizer.state_dict() for optimizer in optimizers]
        torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-7)


def test_a_step_calls_no_function_of_a_tensor_but_for_its_address(made: list[int]):
    """The host's part of a step with kernels: two addresses a parameter, however many states it has."""
    layer, _ = layers()
    decays = average_decays(OptimizerConfig(ema_decay=0.5, power_widths=[0.1, 0.2]))
    optimizer = AveragedAdamW(layer.parameters(), decays=decays, lr=0.1, fused=True)
    optimizer.kernels = True
    clipped_steps(optimizer, layer, 0, 1)
    assert optimizer.tables() is not None and optimizer.prepared is not None
    called: list[str] = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Calls():
        assert optimizer.prepared.lasts(optimizer.state)
    assert called.count("data_ptr") == 4 and {*called} <= {"data_ptr", "__get__", "__hash__"}


def test_averages_are_saved_with_the_optimizer_and_stay_float32():
    layer, other = layers()
    optimizer = AveragedAdamW(layer.parameters(), decays={"ema": lambda update: 0.5}, lr=0.1)
    train(optimizer, layer, 3)
    loaded = AveragedAdamW(other.parameters(), decays={"ema": lambda update: 0.5}, lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[other.weight]["ema"], optimizer.state[layer.weight]["ema"])
    assert loaded.state[other.weight]["ema"].dtype == torch.float32


def test_groups_of_the_paper():
    model = build(4)
    none, decayed = parameter_groups(model, 0.02)
    assert (none["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay = {names[id(p)] for p in decayed["params"]}
    assert not any(
        name.startswith("decoder.") or name.endswith("bias") or "norm" in name for name in with_decay
    )
    assert {
        "encoder.class_embedding.weight",
        "encoder.null_class",
        "encoder.mask_tokens",
        "encoder.position",
    } <= with_decay
    assert "encoder.context_position" in with_decay
    assert len(none["params"]) + len(decayed["params"]) == len(names)


def test_a_frozen_encoder_leaves_one_group():
    model = build()
    model.encoder.requires_grad_(False)
    groups = parameter_groups(model, 0.02)
    assert [g["weight_decay"] for g in groups] == [0.0]
    assert len(build_optimizer(model, OptimizerConfig()).param_groups) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate(schedule: str):
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=10, schedule=schedule)
    factors = [lr_factor(step, 110, config) for step in range(111)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    middle, end = {"constant": (1.0, 1.0), "cosine": (0.55, 0.1), "wsd": (1.0, 0.1 + 0.9 / 64)}[schedule]
    assert (factors[60], factors[110]) == pytest.approx((middle, end))


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_references_schedule_runs_within_the_passes_of_a_step(passes: int):
    """It sets the rate before each pass, by the place of the pass in training; the last one before the step
    counts.
    """
    config = OptimizerConfig(
        warmup_steps=10, schedule="cosine", lr=1.0, min_lr=0.1, warmup_offset=1 - 1 / passes
    )
    for step in range(100):
        place = (step * passes + passes - 1) / passes
        decayed = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (place - 10) / 90))
        assert lr_factor(step, 100, config) == pytest.approx(place / 10 if place < 10 else decayed)
