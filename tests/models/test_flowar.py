"""FlowAR's transformer, flow networks, loss and sampling, against the numbers of the official implementation
and against itself.
"""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.config.flowar import FlowARConfig
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.flow.solvers import dense_end_grid
from lit_transdiff.models import layers
from lit_transdiff.models.flowar import CrossFlowBlock, FlowAR, Scales, places_of
from lit_transdiff.models.rotary import rotary_turns
from lit_transdiff.sampling.loop import sampler_of
from lit_transdiff.stages.objective import losses_of
from tests.helpers.families import (
    Prepared,
    check,
    check_gradients,
    flowar,
    same_shapes,
    scalars,
    tensors,
    without_gradient,
)
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
PUBLISHED = {"small": 171_718_072, "large": 586_862_912, "huge": 1_913_316_880}  # parameters
SIDES = (1, 2, 4, 8, 16)
NONE = torch.zeros(2, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


@pytest.mark.parametrize("size", PUBLISHED)
def test_keys_shapes_and_parameter_counts(size: str):
    with torch.device("meta"):
        net = FlowAR(FlowARConfig(size=size))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[size]
    published = {"small": "flowar_small_d2_w1024", "large": "flowar_large_d12_w1024"}
    if size in published:
        same_shapes(net, published[size])


@torch.no_grad()
def test_transformer():
    name = "flowar_transformer"
    case, net, inputs = tensors(name), flowar(), []
    net.z_proj.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    x = case["in/latents"][:, None]
    check(name, "targets", net.parts(x), case)
    check(name, "z", net.condition(case["in/labels"], NONE, x, None).context, case)
    check(name, "inputs", inputs[0], case)


@torch.no_grad()
def test_flow_networks():
    name = "flowar_flownet"
    case, net = tensors(name), flowar().flownet
    for key, end, side in (("v", "", 4), ("v1", "1", 1)):
        x, t, z = (case[f"in/{name}{end}"] for name in "xtz")
        check(name, key, net(x, t[:, None], Scales(z, net.cond_embed(z), (side,))), case)


def test_training_loss_and_gradients():
    """Ours is the mean over all tokens, the official one a sum over scales: 341/256 of it."""
    name = "flowar_loss_train"
    case, net = tensors(name), flowar().train()
    noise = torch.cat([case[f"in/noise_{side}"] for side in SIDES], dim=1)
    numbers = [torch.special.ndtri(case["in/t"].double()).T[..., None], noise]
    process, drop = (
        PROCESSES[net.process](FlowConfig(density="uniform"), net.prediction),
        case["in/drop_rand"],
    )
    x, normal = case["in/latents"][:, None], Prepared(numbers)
    losses, _ = losses_of(net, process, case["in/labels"], drop < 0.1, x, normal, 1)
    loss = losses.mean() * 341 / 256
    loss.backward()
    check(name, "loss", loss[None], case)
    check_gradients(name, net, case, 11)


@torch.no_grad()
def test_sampling_with_guidance_that_grows():
    name = "flowar_sample_cfg4_n10"
    case, net, given = tensors(name), flowar(), scalars(name)
    sampling = SamplingConfig(
        solver="euler",
        grid="dense_end",
        num_steps=given["num_steps"],
        guidance_scale=given["cfg"],
        guidance_interval=[0.0, given["guidance_high"]],
        part_guidance="growing",
    )
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    decoding = net.decode(case["in/labels"], sampling, None)
    problem = next(decoding)
    with pytest.raises(StopIteration) as end:
        for side in SIDES:
            noise = case[f"in/noise_{side}"][:2].double()  # the null class needs none of its own
            scale = process.solve(problem, noise, None, sampler_of(problem, sampling))
            check(name, f"scale_{side}", scale, case)
            problem = decoding.send(scale)
    check(name, "latents", end.value.value[:, 0], case)


def test_times_of_the_released_sampler():
    assert dense_end_grid(24).tolist() == pytest.approx(
        [1 - 0.7 * i / 11 for i in range(12)] + [0.25 * (1 - i / 12) for i in range(13)]
    )
    assert dense_end_grid(1).tolist() == [1, 0]


def small(version: int, **more: object) -> FlowAR:
    torch.manual_seed(0)
    shape = dict(width=16, num_heads=2, decoder_heads=1, encoder_blocks=2, decoder_blocks=2, num_classes=5)
    shape |= dict(head_width=8, head_blocks=2, head_version=version, latent_channels=3, latent_size=8)
    dropout = dict(attention_dropout=0.0, projection_dropout=0.0)
    net = FlowAR(FlowARConfig(**(shape | dict(patch_size=2) | dropout | more)))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("version", [1, 2])
def test_every_parameter_gets_a_gradient_and_draws_share_the_context(version: int):
    net, x = small(version).train(), torch.randn(3, 1, 3, 8, 8)
    numbers = torch.randn(3, 3, 2), torch.randn(3, 2 * 21, 12)
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    labels, drop = torch.tensor([0, 4, 2]), torch.tensor([True, False, False])
    losses, _ = losses_of(net, process, labels, drop, x, Prepared([*numbers]), 2)
    losses.mean().backward()
    assert without_gradient(net) == []
    total, tokens = 0.0, net.parts(x)
    with torch.no_grad():
        for draw in range(2):
            parts = numbers[1].split([2, 8, 32], dim=1)
            noise = torch.cat([rearrange(z, "b (m n) c -> m b n c", m=2)[draw] for z in parts], dim=1)
            t = numbers[0][:, :, draw].sigmoid()
            each = torch.cat([t[:, k : k + 1].expand(-1, 4**k) for k in range(3)], dim=1)[..., None]
            memory = net.condition(labels, drop, x, None)
            alone = net.predict((1 - each) * tokens + each * noise, t, memory)
            total += (alone - (noise - tokens)).square().mean().item()
    assert losses.mean().item() == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
@pytest.mark.parametrize("scales", [None, [1, 3, 4], [4]])
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_kept_gives_what_the_whole_pass_gives_and_finer_scales_are_not_seen(
    version: int, scales: list[int] | None
):
    """Scales drawn one after the other see what they saw in training; a class at a time, or two."""
    net, labels, x = small(version, scales=scales), torch.tensor([1, 4]), torch.randn(2, 1, 3, 8, 8)
    x_t, clean = torch.randn(2, sum(net.part_sizes), 12), net.parts(x).split(net.part_sizes, 1)
    t = torch.rand(1, len(net.part_sizes))
    whole, null = (
        net.predict(x_t, t.expand(2, -1), net.condition(labels, drop, x, None)) for drop in (NONE, ~NONE)
    )
    for scale in (1.0, 2.0):
        decoding, first = net.decode(labels, SamplingConfig(guidance_scale=scale), None), 0
        problem = next(decoding)
        with pytest.raises(StopIteration) as end:
            for k, part in enumerate(x_t.split(net.part_sizes, 1)):
                own, at = slice(first, first + part.shape[1]), t[0, k].item()
                torch.testing.assert_close(problem.predict(part, at), whole[:, own])
                if scale > 1:
                    both = torch.stack([whole[:, own], null[:, own]])
                    torch.testing.assert_close(torch.stack(problem.pair(part, at)), both)
                first = own.stop
                problem = decoding.send(clean[k])
        assert torch.equal(end.value.value, x)


@torch.no_grad()
@pytest.mark.usefixtures("float64")
def test_attention_to_the_context_written_out():
    """Version 2 of a block for a scale alone, by the formulas: no official numbers of it are at hand."""
    torch.manual_seed(0)
    block, scales = CrossFlowBlock(8, 2, 12), Scales(torch.randn(2, 4, 12), torch.randn(2, 4, 8), (2,))
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    x, times = torch.randn(2, 2, 4, 8).unbind()
    turns, te = rotary_turns(places_of((2,), 4, torch.device("cpu")), 4), times[:, :1]
    found = block(x, te, te + scales.embedded, scales, turns)

    def normed(z: Tensor) -> Tensor:
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for h in range(2):
            turn = torch.polar(torch.ones(4, 2), torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2.0]]))
            own = slice(4 * h, 4 * h + 4)
            a, b = (torch.view_as_complex(z[..., own].reshape(2, 4, 2, 2)) * turn for z in (q, k))
            a, b = (torch.view_as_real(z).flatten(2) for z in (a, b))
            heads.append((a @ b.mT / 2).softmax(-1) @ v[..., own])
        return torch.cat(heads, -1)

    gate, scale, shift = block.ada_lin_attn(F.silu(te)).chunk(3, -1)
    q, k, v = (F.linear(normed(x) * (1 + scale) + shift, block.attn.qkv.weight)).chunk(3, -1)
    x = x + gate * block.attn.proj(attention(q, k, v))
    k, v = F.linear(normed(scales.context) * block.norm2_2.weight, block.crossattn.kv.weight).chunk(2, -1)
    q = F.linear(normed(x) * block.norm2_1.weight, block.crossattn.q.weight)
    x = x + block.crossattn.proj(attention(q, k, v))
    gate, scale, shift = block.ada_lin_mlp(F.silu(te + scales.embedded)).chunk(3, -1)
    h = normed(x) * (1 + scale) + shift
    x = x + gate * block.mlp.fc2(F.gelu(block.mlp.fc1_g(h)) * block.mlp.fc1_x(h))
    torch.testing.assert_close(found, x)


def test_scales_that_do_not_end_with_the_grid_are_refused():
    for changes, message in (
        (
            {"scales": [1, 2]},
            r"model\.scales: got \[1, 2\]; allowed: rising numbers .* the 16 tokens of a side",
        ),
        ({"scales": [4, 2, 16]}, r"model\.scales"),
        ({"scales": []}, r"model\.scales"),
        ({"head_width": 100}, r"model\.head_width: got 100; allowed: a multiple of 64, or below that"),
        ({"head_version": 3}, r"model\.head_version: got 3; allowed: 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowARConfig(**changes)
    assert FlowARConfig(latent_size=6).sides == (1, 2, 4, 6) and FlowARConfig().sides == SIDES
    assert FlowARConfig(latent_size=1).sides == (1,)
