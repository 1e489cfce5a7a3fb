"""The path, the densities of t and the loss, against algebra and known distributions."""

import math

import pytest
import torch

from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.flow import path
from lit_transdiff.flow.loss import DENSITIES, check_flow, draw_times, shift_times
from lit_transdiff.flow.solvers import euler_maruyama
from lit_transdiff.models.layers import time_features
from tests.helpers.reference import flow_loss

pytestmark = pytest.mark.numeric

X, NOISE = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])


def test_zero_is_data_and_one_is_noise():
    assert torch.equal(path.interpolate(X, NOISE, torch.zeros(5)), X)
    assert torch.equal(path.interpolate(X, NOISE, torch.ones(5)), NOISE)


def test_velocity_is_the_derivative_of_the_path():
    h = 1e-3
    difference = (path.interpolate(X, NOISE, T.double() + h) - path.interpolate(X, NOISE, T.double() - h)) / (
        2 * h
    )
    torch.testing.assert_close(difference, path.target_velocity(X, NOISE), atol=1e-3, rtol=0)


def test_a_state_and_its_velocity_imply_data_and_noise():
    x_t, v, t = path.interpolate(X, NOISE, T), path.target_velocity(X, NOISE), path.expand_like(T, X)
    torch.testing.assert_close(x_t - t * v, X)
    torch.testing.assert_close(x_t + (1 - t) * v, NOISE)


def test_drift_of_the_paper_in_closed_form():
    """v - t score, where the score is -noise / t, is (2 - t) v + x_t, of which the solver takes a plain last
    step.
    """
    x_t, v = path.interpolate(X, NOISE, T), path.target_velocity(X, NOISE)
    t = path.expand_like(T, X)
    drift = v - t * (-NOISE / t)
    torch.testing.assert_close(drift, (2 - t) * v + x_t)
    for i, time in enumerate(T.tolist()):
        x = euler_maruyama(lambda x, t, i=i: v[i], x_t[i], [time, 0.0], lambda: NOISE, SamplingConfig())
        torch.testing.assert_close(x, x_t[i] - time * drift[i])


@pytest.mark.parametrize("density", DENSITIES)
def test_times_are_inside_and_float32(density: str):
    t = draw_times(torch.randn(10_000, dtype=torch.float64), FlowConfig(density=density))
    assert t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.02)


def test_quantiles_of_the_densities():
    normal = torch.tensor([-1.0, 0.0, 2.0])
    probabilities = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in normal.tolist()]
    torch.testing.assert_close(draw_times(normal, FlowConfig(density="uniform")), torch.tensor(probabilities))
    ours = draw_times(normal, FlowConfig(density_mean=0.3, density_std=2.0))
    torch.testing.assert_close(
        ours, torch.tensor([1 / (1 + math.exp(-(0.3 + 2 * z))) for z in normal.tolist()])
    )


def test_shift_keeps_the_ends_and_moves_towards_noise():
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_times(ends, 3.0), ends)
    for shift in [step / 100 for step in range(1, 1000)] + [1e-8, 1e8]:
        assert torch.equal(shift_times(ends, shift), ends), shift
    assert (shift_times(T, 3.0) > T).all()
    torch.testing.assert_close(shift_times(T, 3.0), 3 * T / (1 + 2 * T))
    torch.testing.assert_close(shift_times(shift_times(T, 3.0), 1 / 3), T)


def test_truncation_gives_multiples_of_one_thousandth():
    t = draw_times(torch.randn(1000), FlowConfig(discretize=1000))
    torch.testing.assert_close((t * 1000).round() / 1000, t)
    assert t.max() < 1


def test_the_network_sees_truncated_times_as_the_integers_that_they_are():
    whole = torch.arange(1000)
    t = draw_times(torch.logit((whole + 0.5) / 1000), FlowConfig(discretize=1000))
    assert torch.equal((1000 * t).float(), whole.float())
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    assert torch.equal(time_features(t)[:, :128], (whole.float()[:, None] * frequencies).cos())


def test_loss_is_zero_for_the_true_velocity_and_per_row():
    wrong = torch.tensor([0.0, 0, 1, 0, 0])
    rows = flow_loss(lambda x_t, t: NOISE - X + path.expand_like(wrong, X), X, NOISE, T, FlowConfig())
    torch.testing.assert_close(rows, wrong.double())


def test_objectives_and_terms_by_their_formulas():
    v = lambda x_t, t: x_t.sin()  # noqa: E731
    error = flow_loss(v, X, NOISE, T, FlowConfig())
    clean = flow_loss(v, X, NOISE, T, FlowConfig(objective="clean"))
    torch.testing.assert_close(clean, T.square() * error)
    both = flow_loss(v, X, NOISE, T, FlowConfig(loss_terms={"direction": 0.25}))
    predicted, true = v(path.interpolate(X, NOISE, T), T).float().flatten(1), (NOISE - X).flatten(1)
    cosine = (predicted * true).sum(1) / (predicted.norm(dim=1) * true.norm(dim=1))
    torch.testing.assert_close(both, error + 0.25 * (1 - cosine))
    longer = flow_loss(lambda x_t, t: 3 * (NOISE - X), X, NOISE, T, FlowConfig(loss_terms={"direction": 1.0}))
    # the right direction costs nothing
    torch.testing.assert_close(longer, (2 * (NOISE - X)).square().flatten(1).mean(1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "velocty"}, r"flow\.objective: 'velocty' is not known\. Did you mean 'velocity'"),
        (
            {"loss_terms": {"directon": 1.0}},
            r"flow\.loss_terms: 'directon' is not known\. Did you mean 'direction'",
        ),
        ({"density": "normal"}, r"flow\.density: 'normal' is not known"),
    ],
)
def test_a_name_in_no_table_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        check_flow(FlowConfig(**changes))
