"""Time grids, and the integrators from noise (t = 1) to data (t = 0).

A solver is ``solver(velocity, x, grid, draw, config) -> x``: ``x`` [B, ...] is the state at ``grid[0]``,
``grid`` a falling list of times that ends in 0, ``velocity(x, t)`` the field at a time shared by all rows,
or at one of each [B], and ``draw()`` returns fresh Gaussian noise of x's shape (deterministic solvers never
call it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow.adaptive import dopri5
from lit_transdiff.flow.loss import shift_times

Velocity = Callable[[Tensor, Any], Tensor]  # x_t [B, ...], t or the rows' own [B] -> velocity [B, ...]
DrawNoise = Callable[[], Tensor]
Solver = Callable[[Velocity, Tensor, list[float], DrawNoise, SamplingConfig], Tensor]


def paper_grid(num_steps: int) -> Tensor:
    """n equidistant times from 1 to 0.04, then 0 (the grid of the released sampler)."""
    return torch.cat([torch.linspace(1, 0.04, num_steps), torch.zeros(1)])


def uniform_grid(num_steps: int) -> Tensor:
    """n + 1 equidistant times from 1 to 0."""
    return torch.linspace(1, 0, num_steps + 1)


def dense_end_grid(num_steps: int) -> Tensor:
    """Half of the times from 1 to 0.3, half from 0.25 to 0, evenly (released sampler of arXiv 2412.15205)."""
    half = num_steps // 2
    return torch.cat([torch.linspace(1, 0.3, num_steps - half), torch.linspace(0, 0.25, half + 1).flip(0)])


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "paper": paper_grid,
    "uniform": uniform_grid,
    "dense_end": dense_end_grid,
}


def time_grid(config: SamplingConfig) -> list[float]:
    """The n + 1 falling times of a sampler; a shift above 1 puts more of them near noise."""
    return shift_times(GRIDS[config.grid](config.num_steps), config.shift).tolist()


# Names of sampling.diffusion -> t -> the coefficient g of the noise, sqrt(2 g |dt|), and of the score.
DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "sigma": lambda t: t,
    "decreasing": lambda t: (1 - math.cos(math.pi * t)) ** 2 / 4,
}


def drift_of(velocity: Velocity, x: Tensor, t: float, config: SamplingConfig) -> Tensor:
    """v - g score, with the score -(x + (1 - t) v) / t: for g = t the paper's (2 - t) v + x."""
    share = DIFFUSIONS[config.diffusion](t) / t
    return ((1 + share) - share * t) * velocity(x, t) + share * x


def without_noise(velocity: Velocity, x: Tensor, t: float, t_next: float, config: SamplingConfig) -> Tensor:
    """The end of a stochastic solver, without noise."""
    slope = velocity(x, t) if config.last_step == "velocity" else drift_of(velocity, x, t, config)
    return x + slope * (t_next - t)


def noise_of(draw: DrawNoise, t: float, t_next: float, config: SamplingConfig) -> Tensor:
    """The noise of a step."""
    size = math.sqrt(2 * DIFFUSIONS[config.diffusion](t) * (t - t_next))
    return config.noise_scale * size * draw()


def euler_maruyama(
    velocity: Velocity, x: Tensor, grid: list[float], draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """The paper's stochastic sampler: drift v - t score = (2 - t) v + x and diffusion 2 t (section 3.2).

    Drift and noise are scaled by ``drift_scale`` and ``noise_scale`` in every step except the last.
    """
    for t, t_next in pairwise(grid[:-1]):
        noise = noise_of(draw, t, t_next, config)
        drift = drift_of(velocity, x, t, config)
        x = x + config.drift_scale * drift * (t_next - t) + noise
    return without_noise(velocity, x, grid[-2], grid[-1], config)


def stochastic_heun(
    velocity: Velocity, x: Tensor, grid: list[float], draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """SiT's other stochastic sampler (arXiv 2401.08740): the noise of a step, then a Heun step of the drift,
    scaled as in ``euler_maruyama``.
    """
    for t, t_next in pairwise(grid[:-1]):
        x, dt = x + noise_of(draw, t, t_next, config), config.drift_scale * (t_next - t)
        drift = drift_of(velocity, x, t, config)
        x = x + dt * (drift + drift_of(velocity, x + dt * drift, t_next, config)) / 2
    return without_noise(velocity, x, grid[-2], grid[-1], config)


def euler(
    velocity: Velocity, x: Tensor, grid: list[float], draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """Euler: first order, one evaluation per step."""
    for t, t_next in pairwise(grid):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, grid: list[float], draw: DrawNoise, config: SamplingConfig) -> Tensor:
    """Heun: second order, two evaluations per step (the trapezoidal rule with an Euler predictor)."""
    for t, t_next in pairwise(grid):
        v = velocity(x, t)
        v_next = velocity(x + (t_next - t) * v, t_next)
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def adams_bashforth(
    velocity: Velocity, x: Tensor, grid: list[float], draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """Adams-Bashforth: second order, one evaluation per step, for steps of any length.

    It extrapolates from the previous step; the first step is a Heun step.
    """
    v_before, dt_before = velocity(x, grid[0]), grid[1] - grid[0]
    x = x + dt_before * (v_before + velocity(x + dt_before * v_before, grid[1])) / 2
    for t, t_next in pairwise(grid[1:]):
        v, dt = velocity(x, t), t_next - t
        x = x + dt * (v + dt / (2 * dt_before) * (v - v_before))
        v_before, dt_before = v, dt
    return x


SOLVERS: dict[str, Solver] = {
    "euler_maruyama": euler_maruyama,
    "stochastic_heun": stochastic_heun,
    "euler": euler,
    "heun": heun,
    "adams_bashforth": adams_bashforth,
    "dopri5": dopri5,
}
ADAPTIVE = ("dopri5",)  # their num_steps are the most, and numbers decide how they go on
EVALUATIONS = {"stochastic_heun": 2, "heun": 2, "dopri5": 6}  # of a step, where it is not one

# The settings that a solver does not read, and why.
NO_NOISE = dict.fromkeys(("diffusion", "last_step"), "draws no noise")
NO_ERROR = dict.fromkeys(("rtol", "atol"), "measures no error")
NO_TIMES = dict.fromkeys(("grid", "shift"), "chooses its times")
NOT_READ: dict[str, dict[str, str]] = {
    **dict.fromkeys(("euler_maruyama", "stochastic_heun"), NO_ERROR),
    **dict.fromkeys(("euler", "heun", "adams_bashforth"), NO_NOISE | NO_ERROR),
    "dopri5": NO_NOISE | NO_TIMES,
}


def steps_in_words(sampling: Mapping[str, Any]) -> str:
    """The number of steps of a recorded sampler, or what decides it: ``100 steps``, ``rtol 0.001``."""
    if sampling["solver"] in ADAPTIVE:
        plain = SamplingConfig()
        rtol, atol = (sampling.get(name, getattr(plain, name)) for name in ("rtol", "atol"))
        return f"rtol {rtol:g}" + ("" if atol == plain.atol else f", atol {atol:g}")
    return "/".join(map(str, sampling.get("reference_steps") or [sampling["num_steps"]])) + " steps"


@torch.no_grad()
def solve(velocity: Velocity, noise: Tensor, config: SamplingConfig, draw: DrawNoise) -> Tensor:
    """Integrate ``noise`` [B, ...] to data with the configured grid and solver."""
    return SOLVERS[config.solver](velocity, noise, time_grid(config), draw, config)
