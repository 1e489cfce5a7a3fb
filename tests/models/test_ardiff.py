"""ARDiff's transformer, loss and sampling, against the numbers of the official implementation and against
itself.
"""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.config.ardiff import ARDiffConfig
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models import layers
from lit_transdiff.models.ardiff import ARDiff
from lit_transdiff.sampling.loop import sampler_of
from lit_transdiff.stages.objective import losses_of
from tests.helpers.families import (
    Prepared,
    ardiff,
    check,
    check_gradients,
    same_shapes,
    scalars,
    settings,
    tensors,
    without_gradient,
)
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
# parameters
PUBLISHED = {"base": 150_133_536, "large": 477_646_880, "xl": 694_586_016, "huge": 970_592_544}
NONE = torch.zeros(2, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


@pytest.mark.parametrize("size", PUBLISHED)
def test_keys_shapes_and_parameter_counts(size: str):
    with torch.device("meta"):
        net = ARDiff(ARDiffConfig(size=size))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[size]
    if size == "base":
        same_shapes(net, "ardiff_base")


def test_training_loss_and_gradients_in_raster_order():
    name = "ardiff_raster_loss_train"
    case, net, context = tensors(name), ardiff().train(), []
    net.evaluated.cond_embed.register_forward_pre_hook(lambda module, given: context.append(given[0]))
    draws = settings(name)["diffusion_batch_mul"]
    times = torch.special.ndtri((case["in/t"].double() + 0.5) / 1000)
    numbers = [
        rearrange(times, "(m b n) -> b n m", m=draws, b=3),
        rearrange(case["in/noise"], "(m b n) c -> b (n m) c", m=draws, b=3),
    ]
    process, drop = PROCESSES[net.process](FlowConfig(), net.prediction), case["in/drop_rand"] < 0.1
    latents = case["in/latents"][:, None]
    losses, _ = losses_of(net, process, case["in/labels"], drop, latents, Prepared(numbers), draws)
    losses.mean().backward()
    check(name, "z", context[0], case)
    check(name, "loss", losses.mean()[None], case)
    check_gradients(name, net, case, 11)


@torch.no_grad()
def test_sampling_token_by_token_from_kept_keys_and_values():
    """The official sampler computes the whole prefix anew for each token; ours does not, with equal
    numbers.
    """
    name = "ardiff_sample_raster_cfg3"
    case, net, given = tensors(name), ardiff(), scalars(name)
    sampling = SamplingConfig(
        solver="ancestral",
        grid="uniform",
        num_steps=5,
        guidance_scale=given["cfg"],
        part_guidance="growing",
    )
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    decoding, lengths = net.decode(case["in/labels"], sampling, None), []
    net.transformer["blocks"][0].register_forward_pre_hook(
        lambda block, given: lengths.append(given[0].shape)
    )
    problem = next(decoding)
    with pytest.raises(StopIteration) as end:
        for i in range(16):
            steps = iter(case[f"in/steps_{i}"][:, :2, :, None])  # without those of the null half
            draw = lambda steps=steps: next(steps)  # noqa: E731
            noise = case[f"in/noise_{i}"][:2, :, None]
            problem = decoding.send(process.solve(problem, noise, draw, sampler_of(problem, sampling)))
    check(name, "latents", end.value.value[:, 0], case)
    assert lengths == [(4, 1, 48)] * 16


def small(order: str) -> ARDiff:
    torch.manual_seed(0)
    shape = dict(width=16, num_heads=2, num_blocks=2, head_width=8, head_blocks=2, num_classes=5)
    net = ARDiff(ARDiffConfig(**shape, order=order, latent_channels=3, latent_size=4, patch_size=2))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("order", ["raster", "random"])
def test_every_parameter_gets_a_gradient(order: str):
    net, x = small(order).train(), torch.randn(3, 1, 3, 4, 4)
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    drop, normal = torch.tensor([True, False, False]), PerImageNormal([1, 2, 3])
    losses, _ = losses_of(net, process, torch.tensor([0, 4, 2]), drop, x, normal, 2)
    losses.mean().backward()
    assert without_gradient(net) == []


@torch.no_grad()
def test_a_new_network_predicts_zero_and_its_blocks_leave_tokens_as_they_are():
    net, x = ARDiff(ARDiffConfig(size="test", latent_size=4, latent_channels=3)), torch.randn(2, 1, 3, 4, 4)
    memory = net.condition(torch.tensor([0, 3]), NONE, x, None)
    assert torch.equal(net.predict(torch.randn(2, 16, 3), torch.ones(2, 16), memory), torch.zeros(2, 16, 6))
    h = torch.randn(2, 16, 32)
    assert torch.equal(net.transformer["blocks"][0](h, torch.randn(2, 16, 32)), h)


def permuted(order: Tensor) -> Prepared:
    """A ``Normal`` that gives this order."""
    return Prepared([order.argsort(dim=1).float()])


@pytest.mark.usefixtures("float64")
@torch.no_grad()
@pytest.mark.parametrize("order", ["raster", "random"])
def test_what_is_kept_gives_what_the_whole_pass_gives(order: str):
    """Tokens drawn one after the other in an order see what they saw in training; a class at a time, or
    two.
    """
    net, labels, x = small(order), torch.tensor([1, 4]), torch.randn(2, 1, 3, 4, 4)
    orders = torch.stack([torch.randperm(4) if order == "random" else torch.arange(4) for _ in range(2)])
    x_t, t, clean = torch.randn(2, 4, 12), 321, net.parts(x)
    whole, null = (
        net.predict(x_t, torch.full((2, 4), t), net.condition(labels, drop, x, permuted(orders)))
        for drop in (NONE, ~NONE)
    )
    rows = torch.arange(2)
    for scale in (1.0, 2.0):
        decoding = net.decode(labels, SamplingConfig(guidance_scale=scale), permuted(orders))
        problem = next(decoding)
        with pytest.raises(StopIteration) as end:
            for j in range(4):
                own = rows, orders[:, j]
                torch.testing.assert_close(problem.predict(x_t[own][..., None], t)[..., 0], whole[own])
                if scale > 1:
                    c, u = problem.pair(x_t[own][..., None], t)
                    torch.testing.assert_close(c[..., 0], whole[own])
                    torch.testing.assert_close(u[:, :12, 0], null[own][:, :12])
                    torch.testing.assert_close(u[:, 12:, 0], whole[own][:, 12:])  # variances are not guided
                problem = decoding.send(clean[own][..., None])
        assert torch.equal(end.value.value, x)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_token_depends_on_those_before_it_in_its_order_alone():
    net, labels, order = small("random"), torch.tensor([1, 4]), torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
    x = torch.randn(2, 1, 3, 4, 4)
    before = net.condition(labels, NONE, x, permuted(order))
    tokens = net.parts(x)
    for j in range(4):
        other = tokens.clone()
        other[torch.arange(2), order[:, j]] += 1
        changed = rearrange(other, "b (h w) (c p q) -> b 1 c (h p) (w q)", h=2, p=2, q=2)
        after = net.condition(labels, NONE, changed, permuted(order))
        moved = (after - before).abs().amax(dim=2).gather(1, order) > 1e-9
        assert torch.equal(moved, (torch.arange(4) > j).expand(2, -1))
