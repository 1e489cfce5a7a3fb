"""The process of flow matching: the linear path with the run's objective, density and solver.

Shapes: n rows (parts of images) of any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lit_transdiff.config import FlowConfig, SamplingConfig, require_known
from lit_transdiff.flow.guidance import GUIDANCE, guide
from lit_transdiff.flow.loss import Prediction, check_flow, draw_times, flow_matching_loss
from lit_transdiff.flow.path import expand_like, interpolate
from lit_transdiff.flow.process import Process, Unsolved
from lit_transdiff.flow.solvers import GRIDS, NOT_READ, SOLVERS, DrawNoise, solve

NEAREST = 0.05  # lower bound of the divisors t and 1 - t, when the network predicts clean data or noise
VelocityOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # prediction, x_t [n, ...], t [n] or scalar
VELOCITIES: dict[str, VelocityOf] = {
    "velocity": lambda output, x_t, t: output,
    "clean": lambda output, x_t, t: (x_t - output) / expand_like(t.clamp(min=NEAREST), x_t),
    "noise": lambda output, x_t, t: (output - x_t) / expand_like((1 - t).clamp(min=NEAREST), x_t),
}


class Flow(Process):
    """Flow matching on the linear path of ``flow.path``."""

    predictions = VELOCITIES

    @classmethod
    def check(cls, config: FlowConfig) -> None:
        check_flow(config)

    @classmethod
    def check_sampling(cls, sampling: SamplingConfig) -> None:
        """Refuse unknown solvers, grids and guidance schedules."""
        for field, table in (("solver", SOLVERS), ("grid", GRIDS), ("guidance", GUIDANCE)):
            require_known(f"sampling.{field}", getattr(sampling, field), table)

    @classmethod
    def unread(cls, sampling: SamplingConfig) -> Mapping[str, str]:
        unread = NOT_READ.get(sampling.solver, {})
        return {name: f"with sampling.solver {sampling.solver}, which {why}" for name, why in unread.items()}

    def times(self, normal: Tensor) -> Tensor:
        return draw_times(normal, self.config)

    def share(self, t: Tensor) -> Tensor:
        return t

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(x, noise, t)

    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        prediction = Prediction(self.velocity(output.float(), x_t, t), x, noise, t, x_t)
        return flow_matching_loss(prediction, self.config)

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity implied by the network's output."""
        return VELOCITIES[self.prediction](output, x_t, t)

    def solve(self, problem: Unsolved, noise: Tensor, draw: DrawNoise, sampling: SamplingConfig) -> Tensor:
        def velocity(x_t: Tensor, t: float | Tensor) -> Tensor:
            return self.velocity(problem.predict(x_t, t), x_t, times(x_t, t))

        def pair(x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
            c, u = problem.pair(x_t, t)
            return self.velocity(c, x_t, times(x_t, t)), self.velocity(u, x_t, times(x_t, t))

        def times(x_t: Tensor, t: float | Tensor) -> Tensor:
            return t.to(x_t.device) if isinstance(t, Tensor) else torch.tensor(t)

        low, high = sampling.guidance_interval
        guided = guide(velocity, pair, sampling.guidance_scale, (low, high), GUIDANCE[sampling.guidance])
        return solve(guided, noise, sampling, draw)
