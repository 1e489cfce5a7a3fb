"""MAR's transformer, head, training and sampling against the numbers of the official implementation."""

import math
from functools import partial
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.config.mar import MARConfig
from lit_transdiff.flow.diffusion import cosine_chain, diffusion_loss, variational_bound
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models import layers
from lit_transdiff.models.mar import MAR, known_tokens, number_unknown, unknown_tokens
from lit_transdiff.models.tokens import rows_at
from lit_transdiff.sampling.loop import sampler_of
from lit_transdiff.stages.objective import losses_of
from tests.helpers.families import (
    Prepared,
    as_tokens,
    check,
    check_gradients,
    mar,
    same_shapes,
    scalars,
    settings,
    tensors,
    without_gradient,
)
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
PUBLISHED = {"base": 207_924_768, "large": 478_326_304, "huge": 942_403_104}  # parameters


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


@pytest.mark.parametrize("size", PUBLISHED)
def test_keys_shapes_and_parameter_counts(size: str):
    with torch.device("meta"):
        net = MAR(MARConfig(size=size))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[size]
    if size == "base":
        same_shapes(net, "mar_base_d6_w1024")


@torch.no_grad()
def test_transformer():
    name = "mar_transformer"
    case, net = tensors(name), mar()
    tokens, orders = as_tokens(case["in/latents"]), case["in/orders"]
    check(name, "tokens", tokens, case)
    known = known_tokens(orders, math.ceil(64 * case["in/mask_rate"].item()))
    assert torch.equal(torch.ones(3, 64, dtype=torch.bool).scatter(1, known, False), case["out/mask"])
    for key, drop in (("z", None), ("z_null", torch.ones(3, dtype=torch.bool))):
        classes = net.class_vectors(case["in/labels"], drop)
        encoded = net.encode_known(classes, tokens, known)
        if drop is None:
            check(name, "encoded", encoded, case)
        check(name, key, net.decode_all(encoded, known), case)


def test_head_its_loss_and_gradients():
    name = "mar_diffloss"
    case, head = tensors(name), mar().diffloss["net"]
    chain, t, x, noise = cosine_chain(), case["in/t"], case["in/target"], case["in/noise"]
    condition = head.cond_embed(case["in/c"])
    with torch.no_grad():
        check(name, "net_out", head(case["in/x"], t, condition), case)
    x_t = chain.noised(x, noise, t)
    out = head(x_t, t, condition)
    rows = diffusion_loss(out, x, noise, t, x_t, chain)
    rows.mean().backward()
    check(name, "x_t", x_t, case)
    check(name, "mse", (out[:, :16] - noise).square().mean(1), case)
    check(name, "vb", variational_bound(out, x, t, x_t, chain), case)
    check(name, "loss", rows, case)
    check_gradients(name, head, case, 4)


def normal_of_rate(rate: float) -> float:
    """The standard normal number of a mask rate: normal(1, 0.25) truncated to [0.7, 1]."""
    below = NormalDist(1, 0.25).cdf
    return NormalDist().inv_cdf((below(rate) - below(0.7)) / (below(1) - below(0.7)))


def test_training_loss_and_gradients():
    name = "mar_loss_train"
    case, net = tensors(name), mar().train()
    draws = settings(name)["diffusion_batch_mul"]
    times = torch.special.ndtri((case["in/t"].double() + 0.5) / 1000)
    numbers = [
        rearrange(times, "(m b n) -> b n m", m=draws, b=4),
        rearrange(case["in/noise"], "(m b n) c -> b (n m) c", m=draws, b=4),
        case["in/orders"].argsort(dim=1).float(),
    ]
    normal = Prepared(numbers, normal_of_rate(case["in/mask_rate"].item()))
    process, drop = PROCESSES[net.process](FlowConfig(), net.prediction), case["in/drop_rand"] < 0.1
    losses, share = losses_of(
        net, process, case["in/labels"], drop, case["in/latents"][:, None], normal, draws
    )
    assert torch.equal(
        (share * 999).round(), rearrange(case["in/t"], "(m b n) -> (n m b)", m=draws, b=4).float()
    )
    losses.mean().backward()
    check(name, "loss", losses.mean()[None], case)
    check_gradients(name, net, case, 10)


@torch.no_grad()
def test_sampling_with_a_linear_scale():
    name = "mar_sample_cfg3_linear"
    case, net, given = tensors(name), mar(), scalars(name)
    sampling = SamplingConfig(
        solver="ancestral",
        grid="uniform",
        num_steps=5,
        num_parts=given["num_iter"],
        guidance_scale=given["cfg"],
        part_guidance="growing",
    )
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    decoding = net.decode(case["in/labels"], sampling, Prepared([case["in/orders"].argsort(dim=1).float()]))
    problem, rows = next(decoding), partial(rearrange, pattern="(b n) c -> b c n", b=2)
    with pytest.raises(StopIteration) as end:
        for i, number in enumerate(given["tokens_per_iteration"]):
            assert problem.shape == (16, number)
            steps = iter(case[f"in/steps_{i}"][:, : 2 * number])  # without those of the null half
            draw = lambda steps=steps: rows(next(steps))  # noqa: E731
            solution = process.solve(
                problem, rows(case[f"in/noise_{i}"]), draw, sampler_of(problem, sampling)
            )
            problem = decoding.send(solution)
    check(name, "latents", end.value.value[:, 0], case)


@pytest.mark.parametrize("normal", [-40.0, -1.0, 0.0, 1.0, 40.0])
def test_mask_rates_are_truncated(normal: float):
    number = number_unknown(MARConfig(), normal)
    assert math.ceil(256 * 0.7) <= number <= 256
    assert number == max(180, math.ceil(256 * rate_of_normal(normal)))


def rate_of_normal(normal: float) -> float:
    below = NormalDist(1, 0.25).cdf
    share = NormalDist().cdf(normal) * (0.5 - below(0.7)) + below(0.7)
    return NormalDist(1, 0.25).inv_cdf(share)


@pytest.mark.parametrize(("parts", "length"), [(4, 64), (64, 256), (256, 256)])
def test_tokens_that_are_left(parts: int, length: int):
    name = "mar_schedules"
    case = tensors(name)
    left = torch.tensor(unknown_tokens(length, parts))
    # the last, 0, stands as 1 there
    assert torch.equal(left.clamp(min=1), case[f"out/mask_len_{parts}_of_{length}"])
    scales = 1 + (3 - 1) * (length - left.clamp(min=1)) / length
    check(name, f"cfg3_linear_{parts}_of_{length}", scales, case)


def test_tokens_that_are_left_where_the_cosine_is_a_half():
    """As pi / 2 times the iteration comes first in the released code, it is below by a rounding."""
    assert np.cos(math.pi / 2.0 * 26 / 39) < 0.5 < np.cos(math.pi / 2.0 * (26 / 39))
    assert [unknown_tokens(length, 39)[25] for length in (64, 256)] == [31, 127]


@pytest.mark.parametrize("parts", [1, 2, 7, 16])
def test_each_iteration_draws_at_least_one_token(parts: int):
    left = [16, *unknown_tokens(16, parts)]
    assert len(left) == parts + 1 and left[-1] == 0
    assert all(before > after for before, after in pairwise(left))


def small(**more) -> MAR:
    torch.manual_seed(0)
    shape = dict(
        width=16,
        decoder_width=24,
        num_heads=2,
        encoder_blocks=2,
        decoder_blocks=2,
        head_width=8,
        head_blocks=2,
    )
    shape |= dict(num_classes=5, num_class_tokens=3, latent_size=3, latent_channels=4)
    net = MAR(MARConfig(**shape, mlp_ratio=2.0, attention_dropout=0.0, projection_dropout=0.0, **more))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def test_every_parameter_gets_a_gradient():
    net = small().train()
    known = known_tokens(torch.rand(4, 9).argsort(1), 6)
    context = net.context(
        net.class_vectors(torch.arange(4), torch.arange(4) < 2), torch.randn(4, 9, 4), known
    )
    head = net.diffloss["net"]
    head(
        torch.randn(36, 4), torch.arange(36), head.cond_embed(context.flatten(0, 1))
    ).square().mean().backward()
    assert without_gradient(net) == []


@pytest.mark.usefixtures("float64")
@torch.no_grad()
@pytest.mark.parametrize("num_known", [0, 4, 8])
def test_the_context_depends_on_known_tokens_alone(num_known: int):
    net = small()
    order, tokens = torch.rand(3, 9).argsort(1), torch.randn(3, 9, 4)
    known, classes = known_tokens(order, 9 - num_known), net.class_vectors(torch.tensor([0, 4, 2]))
    context = net.context(classes, tokens, known)
    other = torch.randn(3, 9, 4).scatter(1, known[..., None].expand(-1, -1, 4), rows_at(tokens, known))
    torch.testing.assert_close(net.context(classes, other, known), context)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(net.context(classes[one], tokens[one], known[one]), context[one])
    if num_known:
        other.scatter_add_(1, known[:, :1, None].expand(-1, -1, 4), torch.ones(3, 1, 4))
        assert ((net.context(classes, other, known) - context).abs().amax(dim=2) > 1e-6).all()
