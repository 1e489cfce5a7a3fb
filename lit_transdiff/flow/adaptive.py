"""The Dormand-Prince method of order 5 with steps of its own for each row, so that none depends on its batch.

Scheme, error, acceptance and end are those of torchdiffeq's ``dopri5``, which takes one step for all rows.
The last step may end beyond the data; these are interpolated in it. A next step is rounded down to a power
of the square root of 2: the error is sensitive to numbers near 0, so that the roundings of a network, which
differ with the number of rows, would otherwise decide where all steps are.

Shapes: B rows. Times and steps [B] are kept in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_transdiff.config import SamplingConfig

if TYPE_CHECKING:
    from lit_transdiff.flow.solvers import DrawNoise, Velocity

# Share of the step, weights of the slopes before; the last stage is the solution (Dormand and Prince, 1980).
RUNGE_KUTTA = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
# The solution less another one of order 4, and the state in the middle of the step (both Shampine, 1986).
ERROR_WEIGHTS = (
    *(35 / 384 - 1951 / 21600, 0.0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720),
    *(12231 / 42400 - 2187 / 6784, 11 / 84 - 649 / 6300, -1 / 60),
)
MIDDLE_WEIGHTS = (
    *(6025192743 / 60171106304, 0.0, 51252292925 / 130801643196, -2691868925 / 90256659456),
    *(187940372067 / 3189068634112, -1776094331 / 39487288512, 11237099 / 470086768),
)
SAFETY, LEAST_FACTOR, MOST_FACTOR = 0.9, 0.2, 10.0  # of the change of a step


def dopri5(
    velocity: Velocity, x: Tensor, grid: list[float], draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """Adaptive, of order 5: six evaluations a step, in which the error per number stays below
    ``atol + rtol |x|`` (root mean square over a row).

    A row takes at most ``num_steps`` steps, with those that are tried again. All rows are evaluated until the
    last one has arrived. Raises ``ValueError`` where a row does not arrive.
    """
    t, arrived, data = torch.ones(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.bool), x
    v = velocity(x, t)
    dt = -rounded_down(first_step(velocity, x, v, config))
    for _ in range(config.num_steps):
        slopes, x_next = [v], x
        for share, weights in RUNGE_KUTTA:
            x_next = x + weighted_step(slopes, weights, dt)
            slopes.append(velocity(x_next, t + share * dt))
        wrong, larger = weighted_step(slopes, ERROR_WEIGHTS, dt), torch.maximum(x.abs(), x_next.abs())
        error = error_size(wrong, larger, config)
        if bool(error.isnan().any()):
            raise ValueError("sampling.solver: dopri5 got a prediction of the model that is not a number.")
        accepted = (error <= 1) & ~arrived
        ends = accepted & (t + dt <= 0)
        if bool(ends.any()):
            middle = x + weighted_step(slopes, MIDDLE_WEIGHTS, dt)
            found = within_step((x, middle, x_next), (v, slopes[-1]), dt, -t / dt)
            data, arrived = where_rows(ends, found, data), arrived | ends
            if bool(arrived.all()):
                return data
        going = accepted & ~ends
        x, v, t = (where_rows(going, a, b) for a, b in ((x_next, x), (slopes[-1], v), (t + dt, t)))
        dt = where_rows(arrived, dt, -rounded_down(-dt * factor_of(error)))
    raise ValueError(
        f"sampling.num_steps: got {config.num_steps}; allowed: enough to reach t = 0 with sampling.rtol "
        f"{config.rtol:g} and atol {config.atol:g}: an image is at t = {t[~arrived].max():.3g}."
    )


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` [B, ...] for the ``rows`` [B] that are true, else ``old``."""
    return torch.where(rows.to(new.device).reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def weighted_step(slopes: Sequence[Tensor], weights: Sequence[float], dt: Tensor) -> Tensor:
    """The change of a state by weighted slopes in steps ``dt`` [B]."""
    steps = along(dt, slopes[0])
    return sum((weight * steps * k for weight, k in zip(weights, slopes, strict=True) if weight), 0 * steps)


def along(numbers: Tensor, x: Tensor) -> Tensor:
    """A number for each row [B], in the form and on the device of the states ``x``."""
    return numbers.to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def error_size(numbers: Tensor, x: Tensor, config: SamplingConfig) -> Tensor:
    """The root mean square of a row over ``atol + rtol |x|``, [B] on the CPU."""
    relative = numbers / (config.atol + config.rtol * x.abs())
    return relative.reshape(len(x), -1).square().mean(1).sqrt().double().cpu()


def factor_of(error: Tensor) -> Tensor:
    """The factor of the next step, after an ``error`` [B] of which at most 1 is accepted."""
    least = torch.where(error < 1, 1.0, LEAST_FACTOR)
    return torch.maximum(SAFETY * error**-0.2, least).clamp(max=MOST_FACTOR)


def rounded_down(step: Tensor) -> Tensor:
    """The next lower power of the square root of 2, or the same one."""
    return torch.exp2(torch.floor(2 * torch.log2(step) + 1e-6) / 2)


def first_step(velocity: Velocity, x: Tensor, v: Tensor, config: SamplingConfig) -> Tensor:
    """The length [B] of the first step (Hairer, Norsett and Wanner, Solving ODEs I, section II.4)."""
    of_x, of_v = error_size(x, x, config), error_size(v, x, config)
    short = torch.where((of_x < 1e-5) | (of_v < 1e-5), 1e-6, 0.01 * of_x / of_v)
    bent = error_size(velocity(x - along(short, x) * v, 1 - short) - v, x, config) / short
    most = torch.maximum(of_v, bent)
    long = torch.where(most <= 1e-15, (1e-3 * short).clamp(min=1e-6), (0.01 / most) ** 0.2)
    return torch.minimum(100 * short, long)


def within_step(states: Sequence[Tensor], slopes: Sequence[Tensor], dt: Tensor, share: Tensor) -> Tensor:
    """The polynomial of order 4 through a step's start, middle and end, at a ``share`` [B] of the step."""
    (start, middle, end), s = states, along(share, states[0])
    before, after = (along(dt, k) * k for k in slopes)
    cubic = 5 * before - 3 * after + 18 * start + 14 * end - 32 * middle
    square = after - 4 * before - 11 * start - 5 * end + 16 * middle
    quartic = 2 * (after - before) - 8 * (start + end) + 16 * middle
    return start + s * before + s**2 * square + s**3 * cubic + s**4 * quartic
