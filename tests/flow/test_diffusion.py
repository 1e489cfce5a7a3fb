"""Discrete diffusion: the published tables, and algebra."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow.diffusion import (
    CHAIN_SOLVERS,
    Chain,
    ancestral,
    backwards,
    cosine_chain,
    diffusion_loss,
    draw_steps,
    linear_chain,
    log_probability,
    variational_bound,
)
from lit_transdiff.flow.spacings import SPACINGS, even_steps, nonzero_steps, strided_steps
from tests.helpers.families import check, tensors

pytestmark = pytest.mark.numeric
NAME = "mar_schedules"
CHAINS = {"cosine": cosine_chain, "linear": linear_chain}


def least_log_variance(chain: Chain) -> Tensor:
    return chain.at(torch.arange(len(chain)), torch.zeros(len(chain))).least_log_variance


def test_the_cosine_chain():
    case, chain = tensors(NAME), cosine_chain()
    check(NAME, "betas", chain.betas, case)
    check(NAME, "alphas_cumprod", chain.alphas_cumprod, case)
    check(NAME, "posterior_log_variance_clipped", least_log_variance(chain), case)


@pytest.mark.parametrize("number", [5, 25, 100])
def test_respaced_chains(number: int):
    case, steps = tensors(NAME), even_steps(number, 1000)
    assert steps == case[f"out/timestep_map_{number}"].tolist()
    chain = cosine_chain().respaced(steps)
    assert list(chain.steps) == steps
    check(NAME, f"respaced_betas_{number}", chain.betas, case)
    check(NAME, f"respaced_posterior_log_variance_clipped_{number}", least_log_variance(chain), case)


def test_steps_without_the_first_are_those_of_numpy():
    """Also where 999 i / n is a half, which is rounded as in the released sampler."""
    for number in (10, 25, 26, 30, 46, 104, 998):
        assert nonzero_steps(number, 1000) == np.linspace(0, 999, number + 1).round()[1:].tolist()


def test_strides():
    assert strided_steps(5, 1000) == [0, 200, 400, 600, 800]
    assert (
        even_steps(1000, 1000)
        == strided_steps(1000, 1000)
        == [0, *nonzero_steps(999, 1000)]
        == list(range(1000))
    )


@pytest.mark.parametrize("name", CHAINS)
def test_a_respaced_chain_keeps_as_much_of_the_data_and_a_whole_one_is_the_same(name: str):
    chain = CHAINS[name]()
    short = chain.respaced([10, 500, 990])
    torch.testing.assert_close(short.alphas_cumprod, chain.alphas_cumprod[[10, 500, 990]])
    torch.testing.assert_close(chain.respaced(list(range(1000))).betas, chain.betas)
    assert short.respaced([0, 2]).steps == (10, 990)


def test_linear_betas():
    betas = linear_chain().betas
    assert betas[0].item() == 1e-4 and betas[-1].item() == pytest.approx(0.02) and betas.diff().std() < 1e-15


def test_steps_of_training_are_uniform():
    steps = draw_steps(torch.randn(100_000), cosine_chain())
    assert steps.min() >= 0 and steps.max() <= 999
    counts = steps.bincount(minlength=1000).double()
    assert ((counts - 100).square() / 100).sum().item() == pytest.approx(1000, abs=5 * math.sqrt(2 * 1000))
    assert draw_steps(torch.tensor([-50.0, 50.0]), cosine_chain()).tolist() == [0, 999]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CHAINS)
def test_the_step_backwards_is_bayes_rule(name: str):
    """q(x_{t-1} | x_t, x) by multiplying the two Gaussians of the chain, in 64 bits."""
    chain, x, x_t = CHAINS[name](), torch.randn(998), torch.randn(998)
    step = torch.arange(1, 999)
    k = chain.at(step, x)
    beta, before = chain.betas[step], chain.alphas_cumprod[step - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * x_t / beta + before.sqrt() * x / (1 - before)) / precision
    torch.testing.assert_close(k.mean(x, x_t), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(k.least_log_variance.double().exp(), 1 / precision, rtol=1e-5, atol=0)


def test_the_bound_is_a_divergence_in_bits_and_is_none_for_the_truth():
    chain, step = cosine_chain(), torch.tensor([1, 300, 999])
    x, noise = torch.randn(2, 3, 5)
    k, x_t = chain.at(step, x), chain.noised(x, noise, step)
    truth = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    torch.testing.assert_close(
        variational_bound(truth, x, step, x_t, chain), torch.zeros(3), atol=1e-4, rtol=0
    )
    other = noise + 0.1, torch.full_like(noise, 0.3)
    mean, log_variance = backwards(*other, x_t, k)
    theirs = kl_divergence(
        Normal(k.mean(x, x_t), (k.least_log_variance / 2).exp()), Normal(mean, (log_variance / 2).exp())
    )
    torch.testing.assert_close(
        variational_bound(torch.cat(other, dim=1), x, step, x_t, chain),
        theirs.mean(1) / math.log(2),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.usefixtures("float64")
def test_the_probabilities_of_all_grey_values_add_up_to_one():
    grey = torch.linspace(-1, 1, 256)
    for mean in (-1.2, 0.0, 0.7):
        assert log_probability(
            grey, torch.full((256,), mean), torch.tensor(-4.0)
        ).exp().sum().item() == pytest.approx(1)


def test_the_mean_is_trained_by_the_squared_error_alone():
    chain, step, x, noise = cosine_chain(), torch.tensor([0, 5, 600]), *torch.randn(2, 3, 4)
    output = torch.randn(3, 8, requires_grad=True)
    diffusion_loss(output, x, noise, step, chain.noised(x, noise, step), chain).sum().backward()
    torch.testing.assert_close(output.grad[:, :4], 2 * (output.detach()[:, :4] - noise) / 4)
    assert (output.grad[:, 4:].abs().sum(1) > 0).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", SPACINGS)
@pytest.mark.parametrize("solver", CHAIN_SOLVERS)
def test_sampling_of_known_data_ends_in_it(grid: str, solver: str):
    """The noise that the data imply is predicted: the last state is the data itself, whatever was drawn on
    the way.
    """
    chain, data = cosine_chain(), torch.randn(4, 3)
    told = []

    def predict(x_t: Tensor, step: int) -> tuple[Tensor, Tensor]:
        told.append(step)
        kept = chain.alphas_cumprod[step]
        return (x_t - kept.sqrt() * data) / (1 - kept).sqrt(), torch.zeros_like(x_t)

    config = SamplingConfig(num_steps=10, grid=grid)
    x = CHAIN_SOLVERS[solver](predict, torch.randn(4, 3), chain, lambda: torch.randn(4, 3), config)
    torch.testing.assert_close(x, data, rtol=0, atol=1e-4)
    assert told == SPACINGS[grid](10, 1000)[::-1]


def test_the_temperature_scales_what_is_drawn():
    zero = lambda x, step: (torch.zeros(len(x), 1), torch.zeros(len(x), 1))  # noqa: E731
    config, gentle = SamplingConfig(num_steps=2, grid="uniform"), linear_chain()
    states = [
        ancestral(
            zero, torch.ones(3, 1), gentle, lambda: torch.ones(3, 1), replace(config, noise_scale=scale)
        )
        for scale in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(states[1] - states[0], (states[2] - states[0]) / 2)
    assert (states[1] != states[0]).all()
