"""Solvers on a field whose solution is known: data N(0, s^2), for which the velocity is linear.

On the linear path x_t has the variance S(t) = (1 - t)^2 s^2 + t^2, the velocity is S'(t) / (2 S(t)) x, and
the flow carries x(1) to x(0) = s x(1).
"""

import math
from itertools import pairwise

import pytest
import torch

from lit_transdiff.config import ModelConfig, SamplingConfig
from lit_transdiff.flow.guidance import GUIDANCE, guide
from lit_transdiff.flow.solvers import ADAPTIVE, EVALUATIONS, GRIDS, NOT_READ, SOLVERS, solve, time_grid
from lit_transdiff.sampling.loop import check_sampling

pytestmark = pytest.mark.numeric
STD = 0.4
STOCHASTIC = ("euler_maruyama", "stochastic_heun")
ORDERS = {"euler": 1, "heun": 2, "adams_bashforth": 2}


def field(x: torch.Tensor, t: float) -> torch.Tensor:
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * x


def no_draw() -> torch.Tensor:
    raise AssertionError("a deterministic solver draws no noise")


def test_every_solver_is_tested_here():
    assert {*ORDERS, *STOCHASTIC, *ADAPTIVE} == set(SOLVERS) == set(NOT_READ)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver: str):
    errors = []
    for steps in (32, 64, 128):
        config = SamplingConfig(solver=solver, grid="uniform", num_steps=steps)
        x = solve(field, torch.ones(1, dtype=torch.float64), config, no_draw)
        errors.append(abs(x.item() - STD))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.2)


def stochastic_variance(steps: int, **settings: float) -> float:
    """The exact variance of Euler-Maruyama's result.

    The field is linear, so the state is tracked as coefficients of the independent noises: the initial one,
    then those of the steps.
    """
    drawn = iter(torch.eye(steps + 1, dtype=torch.float64)[1:])
    start = torch.eye(steps + 1, dtype=torch.float64)[0]
    config = SamplingConfig(solver="euler_maruyama", grid="uniform", num_steps=steps, **settings)
    return solve(field, start, config, lambda: next(drawn)).square().sum().item()


def test_weak_convergence_of_euler_maruyama():
    errors = [abs(stochastic_variance(n) - STD**2) for n in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert 0.7 < math.log2(coarse / fine) < 1.4
    assert errors[-1] < 0.02 * STD**2


@pytest.mark.parametrize("solver", ["euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("diffusion", ["sigma", "decreasing"])
@pytest.mark.parametrize("last_step", ["drift", "velocity"])
def test_sits_stochastic_samplers_in_its_own_time(solver: str, diffusion: str, last_step: str):
    """SiT's formulas (arXiv 2401.08740), in whose time s noise is 0 and data 1: score (s v - x) / (1 - s)."""
    noises = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0, 0.96, 8, dtype=torch.float64).tolist()

    def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
        return -field(x, 1 - s)

    def g(s: float) -> float:
        return 1 - s if diffusion == "sigma" else 0.25 * (math.cos(math.pi * s) + 1) ** 2

    def drift(x: torch.Tensor, s: float) -> torch.Tensor:
        v = velocity(x, s)
        return v + g(s) * (s * v - x) / (1 - s)

    x = noises[0]
    for noise, s, s_next in zip(noises[1:], times, times[1:], strict=False):
        ds = s_next - s
        stirred = x + math.sqrt(2 * g(s) * ds) * noise
        if solver == "euler_maruyama":
            x = stirred + ds * drift(x, s)
        else:
            k = drift(stirred, s)
            x = stirred + ds * (k + drift(stirred + ds * k, s_next)) / 2
    x = x + 0.04 * (velocity(x, 0.96) if last_step == "velocity" else drift(x, 0.96))
    drawn = iter(noises[1:])
    config = SamplingConfig(solver=solver, num_steps=8, diffusion=diffusion, last_step=last_step)  # type: ignore[arg-type]
    torch.testing.assert_close(solve(field, noises[0], config, lambda: next(drawn)), x, rtol=0, atol=1e-5)


UNREAD_VALUES = {
    **{"diffusion": "decreasing", "last_step": "velocity", "grid": "uniform", "shift": 2.0},
    **{"rtol": 1e-4, "atol": 1e-5},
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", UNREAD_VALUES)
def test_a_setting_that_a_solver_does_not_read_is_refused(solver: str, name: str):
    """A trained run may have recorded it."""
    value = UNREAD_VALUES[name]
    changed = SamplingConfig(solver=solver, **{name: value})  # type: ignore[arg-type]
    unread = {
        **dict.fromkeys(("diffusion", "last_step"), solver not in STOCHASTIC),
        **dict.fromkeys(("grid", "shift"), solver == "dopri5"),
        **dict.fromkeys(("rtol", "atol"), solver != "dopri5"),
    }
    if not unread[name]:
        return check_sampling(changed, ModelConfig())
    with pytest.raises(ValueError, match=rf"sampling\.{name}: got {value!r}; allowed: .* {solver}, which "):
        check_sampling(changed, ModelConfig())
    check_sampling(changed, ModelConfig(), recorded=changed)


def test_less_noise_gives_less_variance():
    assert stochastic_variance(64, noise_scale=0.8) < stochastic_variance(64)


@pytest.mark.parametrize("solver", [*ORDERS, *STOCHASTIC])
def test_number_of_evaluations(solver: str):
    calls = []

    def counting(x, t):
        calls.append(t)
        return field(x, t)

    config = SamplingConfig(solver=solver, num_steps=10)
    solve(counting, torch.ones(3), config, lambda: torch.zeros(3))
    extra = 1 if solver == "adams_bashforth" else 0  # its first step is a Heun step
    extra -= 1 if solver == "stochastic_heun" else 0  # whose last step is none
    assert len(calls) == EVALUATIONS.get(solver, 1) * 10 + extra


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_fall_from_one_to_zero(grid: str):
    for shift in (1.0, 2.0):
        times = time_grid(SamplingConfig(grid=grid, num_steps=7, shift=shift))
        assert times[0] == 1 and times[-1] == 0 and len(times) == 8
        assert times == sorted(times, reverse=True)


def test_the_last_step_is_plain_and_draws_nothing():
    config = SamplingConfig(num_steps=1, drift_scale=0.0, noise_scale=9.0)
    x = solve(field, torch.ones(1), config, no_draw)
    torch.testing.assert_close(x, 1 - ((2 - 1) * field(torch.ones(1), 1.0) + 1))


def test_solvers_leave_the_noise_as_it_is():
    noise = torch.ones(4)
    for solver in SOLVERS:
        solve(field, noise, SamplingConfig(solver=solver, num_steps=30), lambda: torch.ones(4))
    assert torch.equal(noise, torch.ones(4))


class TestGuidance:
    def test_formula(self):
        guided = guide(lambda x, t: x, lambda x, t: (x, 3 * x), 1.5)
        assert guided(torch.ones(1), 1.0).item() == 3 + 1.5 * (1 - 3)

    def test_a_rising_scale_is_none_at_noise_and_whole_at_data(self):
        guided = guide(lambda x, t: x, lambda x, t: (x, 0 * x), 3.0, schedule=GUIDANCE["rising"])
        assert [guided(torch.ones(1), t).item() for t in (1.0, 0.5, 0.0)] == [1, 2, 3]

    def test_scale_one_never_calls_the_unconditional_function(self):
        conditional = lambda x, t: x  # noqa: E731
        assert guide(conditional, conditional, 1.0) is conditional

    def test_interval(self):
        called = []
        guided = guide(lambda x, t: x, lambda x, t: called.append(t) or (x, 3 * x), 2.0, (0.3, 0.6))
        values = [guided(torch.ones(1), t).item() for t in (0.25, 0.5, 0.75)]
        assert values == [1, -1, 1]
        assert called == [0.5]

    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("steps", [10, 25, 100])
    def test_times_of_a_grid_that_equal_a_bound_are_guided(self, grid: str, steps: int):
        times = time_grid(SamplingConfig(grid=grid, num_steps=steps))[:-1]
        for bound in [round(t, 2) for t in times if abs(t - round(t, 2)) < 1e-6]:
            guided = guide(lambda x, t: x, lambda x, t: (x, 0 * x), 2.0, (bound, bound))
            assert [t for t in times if guided(torch.ones(1), t) == 2] == [pytest.approx(bound)]

    def test_below_one_is_refused(self):
        with pytest.raises(ValueError, match=r"guidance scale: got 0\.5; allowed: at least 1"):
            guide(field, field, 0.5)
