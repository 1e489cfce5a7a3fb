"""The network of SiT and DiT against the numbers of the official implementations."""

import pytest
import torch
from torch import Tensor, nn

from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.config.sit import SIT_SIZES, SiTConfig
from lit_transdiff.flow.diffusion import diffusion_loss, linear_chain, variational_bound
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models import layers
from lit_transdiff.models.sit import SiT, position_table
from tests.helpers.families import check, same_shapes, scalars, settings, sit_or_dit, tensors
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
# Parameters of the published sizes, of which the fixed table of positions has 256 D.
PUBLISHED = {"small": 32_957_200, "base": 130_500_112, "large": 458_086_416, "xl": 675_111_184}
SHAPE = dict(latent_channels=4, latent_size=32, patch_size=2)


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


def test_keys_and_shapes():
    with torch.device("meta"):
        same_shapes(SiT(SiTConfig(size="base", **SHAPE)), "sit_b_2", left_out=("pos_embed",))


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts(size: str):
    with torch.device("meta"):
        net = SiT(SiTConfig(size=size, **SHAPE))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[size]
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == 256 * SIT_SIZES[size]["width"]


@torch.no_grad()
def test_forward_and_three_guided_channels():
    name = "sit_forward"
    case, net = tensors(name), sit_or_dit(name, guided_channels=3)
    check(name, "pos_embed", position_table(48, 4)[None], case)
    check(name, "time_features", layers.sinusoids(case["in/t"]), case)
    x, t, labels = (case[f"in/{key}"] for key in ("x", "t", "labels"))
    check(name, "v", net(x, t, labels), case)
    none = torch.zeros(3, dtype=torch.bool)
    memory = net.condition(labels, none, x[:, None], None)
    check(name, "v", -net.predict(x[:, None], 1 - t[:, None], memory)[:, 0], case)
    guided = torch.cat(
        [guided_velocity(net, x[i], t[i].item(), labels[i], scalars(name)["cfg"]) for i in range(3)]
    )
    check(name, "v_cfg_3_channels", -guided, case)


def guided_velocity(net: SiT, x: Tensor, t: float, label: Tensor, scale: float) -> Tensor:
    c, u = next(net.decode(label[None], SamplingConfig(guidance_scale=scale), None)).pair(x[None], 1 - t)
    return u + scale * (c - u)


@torch.no_grad()
def test_its_stochastic_sampler_is_the_one_of_transdiff():
    name = "sit_sample_sde_sigma"
    case, net = tensors(name), sit_or_dit(name)
    draws, sampling = iter(case["in/steps"]), SamplingConfig(num_steps=scalars(name)["num_steps"])
    problem = next(net.decode(case["in/labels"], sampling, None))
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    check(name, "latents", process.solve(problem, case["in/noise"], lambda: next(draws), sampling), case)


def test_dit_loss_and_gradients():
    name = "dit_loss_train"
    case, net = tensors(name), sit_or_dit(name).train()
    chain, x, noise, t = linear_chain(), case["in/latents"], case["in/noise"], case["in/t"]
    labels = torch.where(case["in/drop_rand"] < 0.1, net.config.num_classes, case["in/labels"])
    x_t = chain.noised(x, noise, t)
    out = net(x_t, t, labels)
    rows = diffusion_loss(out, x, noise, t, x_t, chain)
    rows.mean().backward()
    check(name, "x_t", x_t, case)
    check(name, "out", out, case)
    check(name, "mse", (out[:, :4] - noise).square().flatten(1).mean(1), case)
    check(name, "vb", variational_bound(out, x, t, x_t, chain), case)
    check(name, "loss", rows.mean()[None], case)
    gradients = {f"grad/{key}": p.grad for key, p in net.named_parameters()}
    names = [key.removeprefix("out/") for key in case if key.startswith("out/grad/")]
    assert len(names) == 7
    for key in names:
        check(name, key, gradients[key], case)


def small(**more) -> SiT:
    torch.manual_seed(0)
    shape = dict(num_classes=5, latent_channels=3, latent_size=6, patch_size=2)
    return SiT(SiTConfig(width=16, num_heads=2, num_blocks=2, **shape, **more))


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, 6])
def test_a_new_network_predicts_zero_and_each_block_is_the_identity(channels: int):
    net = small(learn_sigma=channels == 6)
    out = net(torch.randn(2, 3, 6, 6), torch.rand(2), torch.tensor([0, 5]))
    assert torch.equal(out, torch.zeros(2, channels, 6, 6))
    h = torch.randn(2, 9, 16)
    assert torch.equal(net.blocks[0](h, torch.randn(2, 1, 16)), h)


def test_every_parameter_but_the_fixed_table_gets_a_gradient():
    net = small()
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    net(torch.randn(6, 3, 6, 6), torch.rand(6), torch.arange(6)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == [
        "pos_embed"
    ]


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_batch_equals_one_by_one_and_one_time_serves_for_all():
    net = small()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    x, labels = torch.randn(3, 3, 6, 6), torch.tensor([0, 5, 2])
    together = net(x, torch.tensor([0.3]), labels)
    for i in range(3):
        torch.testing.assert_close(
            net(x[i : i + 1], torch.tensor([0.3]), labels[i : i + 1]), together[i : i + 1]
        )


def test_settings_of_the_cases_are_those_that_are_read():
    assert (
        settings("sit_forward")["learn_sigma"] is False and settings("dit_loss_train")["learn_sigma"] is True
    )
