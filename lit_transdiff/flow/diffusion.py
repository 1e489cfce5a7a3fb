"""Diffusion in discrete steps (arXiv 2006.11239; with a learned variance 2102.09672): chain, losses, solvers.

Steps run from 0 (almost data) to n - 1 (noise): x_t = signal x + sigma noise. The network predicts the noise
and, if it learns variances, in as many further channels values in [-1, 1] that interpolate between the
smallest and largest reverse variance.

Shapes: x, noise, x_t [R, ...]; the network's output has the same shape or, with variances, twice the length
along one axis; step [R], integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_transdiff.config import FlowConfig, SamplingConfig, require, require_known
from lit_transdiff.flow.guidance import GUIDANCE, guide
from lit_transdiff.flow.process import Process, Unsolved
from lit_transdiff.flow.solvers import DrawNoise
from lit_transdiff.flow.spacings import SPACINGS

StepPrediction = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # x_t, step -> noise and variance values
BIN = 1 / 255  # half the width of a grey value in [-1, 1]
LEAST_PROBABILITY = 1e-12


class Coefficients(NamedTuple):
    """Coefficients of single steps, float32: of x_t, and of the posterior of the preceding state."""

    signal: Tensor
    sigma: Tensor
    of_x: Tensor
    of_x_t: Tensor
    least_log_variance: Tensor
    largest_log_variance: Tensor

    def mean(self, x: Tensor, x_t: Tensor) -> Tensor:
        """The posterior mean of the state one step before ``x_t``, given the data ``x``."""
        return self.of_x * x + self.of_x_t * x_t


@dataclass(frozen=True, eq=False)
class Chain:
    """A diffusion chain of n steps."""

    betas: Tensor  # [n], float64: the variance that each step adds
    steps: tuple[int, ...]  # their numbers in the chain of training

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def alphas_cumprod(self) -> Tensor:
        """The share of the data's variance that remains after each step, [n]."""
        return (1 - self.betas).cumprod(0)

    def noised(self, x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t of the forward process."""
        k = self.at(step, x)
        return k.signal * x + k.sigma * noise

    def at(self, step: Tensor, like: Tensor) -> Coefficients:
        """The coefficients of ``step``, with trailing axes for broadcasting against ``like``."""
        rows = self.table.to(step.device)[:, step]
        return Coefficients(*rows.reshape(rows.shape + (1,) * (like.ndim - step.ndim)))

    @cached_property
    def table(self) -> Tensor:
        """The ``Coefficients`` of all steps, [6, n], computed in float64 and stored in float32."""
        after = self.alphas_cumprod
        before = torch.cat([after.new_ones(1), after[:-1]])
        variance = self.betas * (1 - before) / (1 - after)
        variance[0] = variance[min(1, len(self) - 1)]  # the first is 0 and has no logarithm
        of_x = self.betas * before.sqrt() / (1 - after)
        of_x_t = (1 - before) * (1 - self.betas).sqrt() / (1 - after)
        rows = [after.sqrt(), (1 - after).sqrt(), of_x, of_x_t, variance.log(), self.betas.log()]
        return torch.stack(rows).float()

    def respaced(self, steps: list[int]) -> Chain:
        """The chain of a subset of ``steps``, in rising order, with the same signal and noise at each."""
        after = self.alphas_cumprod[steps]
        betas = 1 - after / torch.cat([after.new_ones(1), after[:-1]])
        return Chain(betas, tuple(self.steps[i] for i in steps))


def cosine_chain(num_steps: int = 1000) -> Chain:
    """The cosine schedule of arXiv 2102.09672, eq. 17."""
    share = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    after = torch.cos((share + 0.008) / 1.008 * math.pi / 2).square()
    return Chain((1 - after[1:] / after[:-1]).clamp(max=0.999), tuple(range(num_steps)))


def linear_chain(num_steps: int = 1000) -> Chain:
    """The linear schedule of arXiv 2006.11239."""
    return Chain(torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64), tuple(range(num_steps)))


@lru_cache
def spaced(chain: Chain, spacing: str, num_steps: int) -> Chain:
    """The chain of a sampler's steps."""
    return chain.respaced(SPACINGS[spacing](num_steps, len(chain)))


@lru_cache
def table_on(chain: Chain, device: torch.device) -> Tensor:
    """The ``Coefficients`` of a chain, which are copied to a device once: a copy waits for it."""
    return chain.table.to(device)


def draw_steps(normal: Tensor, chain: Chain) -> Tensor:
    """Uniform training steps from standard normal numbers of any shape."""
    return (torch.special.ndtr(normal) * len(chain)).long().clamp(max=len(chain) - 1)


def diffusion_loss(
    output: Tensor, x: Tensor, noise: Tensor, step: Tensor, x_t: Tensor, chain: Chain
) -> Tensor:
    """Mean squared error of the noise plus the variational bound, which trains only the variance: [R]."""
    return noise_error(halves(output, x)[0], noise) + variational_bound(output, x, step, x_t, chain)


def noise_error(predicted: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the noise: [R]."""
    return (predicted - noise).square().flatten(1).mean(1)


def halves(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Split the network's output for ``x`` into noise and variance, along the axis of twice the length."""
    lengths = zip(output.shape, x.shape, strict=True)
    axis = next(i for i, (long, length) in enumerate(lengths) if long != length)
    noise, values = output.chunk(2, dim=axis)
    return noise, values


def variational_bound(output: Tensor, x: Tensor, step: Tensor, x_t: Tensor, chain: Chain) -> Tensor:
    """The variational bound in bits, [R]: KL divergence of the reverse step, or at step 0 -log p(x)."""
    k = chain.at(step, x)
    noise, values = halves(output, x)
    mean, log_variance = backwards(noise.detach(), values, x_t, k)
    ratio = k.least_log_variance - log_variance
    divergence = (ratio.exp() - 1 - ratio + (k.mean(x, x_t) - mean).square() * (-log_variance).exp()) / 2
    first = step.reshape(k.signal.shape) == 0
    nats = torch.where(first, -log_probability(x, mean, log_variance), divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def backwards(noise: Tensor, values: Tensor, x_t: Tensor, k: Coefficients) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the reverse step from ``x_t``, from predicted noise and variance values."""
    share = (values + 1) / 2
    log_variance = share * k.largest_log_variance + (1 - share) * k.least_log_variance
    return k.mean(x_t / k.signal - (k.sigma / k.signal) * noise, x_t), log_variance


def log_probability(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the grey value around ``x`` under a Gaussian; the outer bins reach to infinity."""
    scale = (-log_variance / 2).exp()
    above, below = normal_cdf(scale * (x - mean + BIN)), normal_cdf(scale * (x - mean - BIN))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=LEAST_PROBABILITY).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal CDF with which the published models were trained."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@torch.no_grad()
def ancestral(
    predict: StepPrediction, x: Tensor, chain: Chain, draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """Sample data from noise ``x`` [B, ...] in ``num_steps`` steps; ``noise_scale`` is the temperature.

    ``predict`` receives the step's number in the training chain; ``draw()`` returns Gaussian noise of x's
    shape.
    """
    chain = spaced(chain, config.grid, config.num_steps)
    table = table_on(chain, x.device)
    for i, step in reversed([*enumerate(chain.steps)]):
        noise, values = predict(x, step)
        mean, log_variance = backwards(noise, values, x, Coefficients(*table[:, i]))
        x = mean if i == 0 else mean + config.noise_scale * (log_variance / 2).exp() * draw()
    return x


@torch.no_grad()
def dpmpp_2m(
    predict: StepPrediction, x: Tensor, chain: Chain, draw: DrawNoise, config: SamplingConfig
) -> Tensor:
    """DPM-Solver++(2M), midpoint rule (arXiv 2211.01095): second order, deterministic, one evaluation a step.

    Steps are taken in log(signal / sigma). The first one and the last one, which ends in the data, are of
    first order.
    """
    chain = spaced(chain, config.grid, config.num_steps)
    signal, sigma = chain.alphas_cumprod.sqrt().tolist(), (1 - chain.alphas_cumprod).sqrt().tolist()
    x_0_before, distance_before = x, math.inf
    for i, step in reversed([*enumerate(chain.steps)]):
        x_0 = (x - sigma[i] * predict(x, step)[0]) / signal[i]
        if i == 0:
            return x_0
        distance = math.log(signal[i - 1] / sigma[i - 1]) - math.log(signal[i] / sigma[i])
        midpoint = x_0 + distance / (2 * distance_before) * (x_0 - x_0_before)
        x = sigma[i - 1] / sigma[i] * x - signal[i - 1] * math.expm1(-distance) * midpoint
        x_0_before, distance_before = x_0, distance
    return x


ChainSolver = Callable[[StepPrediction, Tensor, Chain, DrawNoise, SamplingConfig], Tensor]
CHAIN_SOLVERS: dict[str, ChainSolver] = {"ancestral": ancestral, "dpmpp_2m": dpmpp_2m}


class Diffusion(Process):
    """Diffusion in discrete steps. Where the variance is not learned, ``ancestral`` uses the smallest one."""

    predictions = ("noise_and_variance", "noise")
    chain: ClassVar[Callable[[], Chain]]

    @classmethod
    def check(cls, config: FlowConfig) -> None:
        """Refuse changed settings of the continuous path, which have no effect here."""
        unread = ("density", "density_mean", "density_std", "shift", "discretize", "objective", "loss_terms")
        for name in unread:
            value, default = getattr(config, name), getattr(FlowConfig(), name)
            allowed = f"{default!r}, which a diffusion in discrete steps does not read"
            require(value == default, f"flow.{name}", value, allowed)

    @classmethod
    def check_sampling(cls, sampling: SamplingConfig) -> None:
        """Refuse solvers and grids of other processes, and more steps than the chain has."""
        for field, table in (("solver", CHAIN_SOLVERS), ("grid", SPACINGS), ("guidance", GUIDANCE)):
            require_known(f"sampling.{field}", getattr(sampling, field), table)
        steps, length, spacing = sampling.num_steps, len(cls.chain()), SPACINGS[sampling.grid]
        most = next(number for number in range(length, 0, -1) if len({*spacing(number, length)}) == number)
        require(2 <= steps <= most, "sampling.num_steps", steps, f"2 to {most}, the steps of the chain")

    @classmethod
    def unread(cls, sampling: SamplingConfig) -> Mapping[str, str]:
        names = ("shift", "drift_scale", "diffusion", "last_step", "rtol", "atol")
        return dict.fromkeys(names, "with a diffusion in discrete steps, which does not read it")

    def __init__(self, config: FlowConfig, prediction: str) -> None:
        super().__init__(config, prediction)
        self.whole = type(self).chain()

    def times(self, normal: Tensor) -> Tensor:
        return draw_steps(normal, self.whole)

    def share(self, t: Tensor) -> Tensor:
        return t / (len(self.whole) - 1)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.whole.noised(x, noise, t)

    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        if self.prediction == "noise":
            return noise_error(output.float(), noise)
        return diffusion_loss(output.float(), x, noise, t, x_t, self.whole)

    def solve(self, problem: Unsolved, noise: Tensor, draw: DrawNoise, sampling: SamplingConfig) -> Tensor:
        last = len(self.whole) - 1
        low, high = sampling.guidance_interval
        guided = guide(
            lambda x_t, share: problem.predict(x_t, round(share * last)),
            lambda x_t, share: problem.pair(x_t, round(share * last)),
            sampling.guidance_scale,
            (low, high),
            GUIDANCE[sampling.guidance],
        )

        def predict(x_t: Tensor, step: int) -> tuple[Tensor, Tensor]:
            output = guided(x_t, step / last)
            return (output, -torch.ones_like(output)) if self.prediction == "noise" else halves(output, x_t)

        return CHAIN_SOLVERS[sampling.solver](predict, noise, self.whole, draw, sampling)


class CosineDiffusion(Diffusion):
    """Diffusion with the cosine schedule of arXiv 2102.09672."""

    chain = staticmethod(cosine_chain)


class LinearDiffusion(Diffusion):
    """Diffusion with the linear schedule of arXiv 2006.11239."""

    chain = staticmethod(linear_chain)
