"""ACDiT's network, its loss and its sampling, against the numbers of the official implementation and against
itself.
"""

import pytest
import torch
from einops import rearrange
from torch import nn

from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.config.acdit import ACDiTConfig
from lit_transdiff.flow.diffusion import linear_chain
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.flow.spacings import nonzero_steps
from lit_transdiff.models import layers
from lit_transdiff.models.acdit import ACDiT, Known, angles_of
from lit_transdiff.models.tokens import split_squares
from lit_transdiff.stages.objective import losses_of
from tests.helpers.families import acdit, check, same_shapes, scalars, tensors, without_gradient
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
# published parameters
FOUR_CHANNELS = {"base": 130_305_028, "large": 457_851_908, "xl": 674_856_708, "huge": 950_959_620}
SIXTEEN = {"base": 130_323_472, "large": 457_876_496, "xl": 674_884_368, "huge": 950_990_352}
NONE = torch.zeros(2, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


@pytest.mark.parametrize("size", FOUR_CHANNELS)
def test_keys_shapes_and_parameter_counts(size: str):
    with torch.device("meta"):
        net, wide = (ACDiT(ACDiTConfig(size=size, latent_channels=c, latent_size=32)) for c in (4, 16))
    counts = [sum(p.numel() for p in model.parameters()) for model in (net, wide)]
    assert counts == [FOUR_CHANNELS[size], SIXTEEN[size]]
    if size == "base":
        same_shapes(net, "acdit_b")


@torch.no_grad()
def test_forward_over_a_clean_and_a_noised_copy():
    name = "acdit_forward"
    case, net = tensors(name), acdit()
    clean, noised = (case[f"in/{key}"].flatten(1, 2) for key in ("clean", "noised"))
    check(name, "eps", net.predict(noised, case["in/t"], Known(case["in/labels"], clean)), case)


def test_order_of_tokens_and_their_angles():
    name = "acdit_forward"
    case = tensors(name)
    places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    check(name, "position_ids", split_squares(places[:, None], 2, 1)[..., 0], case)
    angles = split_squares(angles_of(8, 64, torch.device("cpu")).movedim(-1, 0), 2, 1)[[0, 1, 4, 16, 33, 63]]
    check(name, "rope_cos", angles.cos(), case)
    check(name, "rope_sin", angles.sin(), case)


@torch.no_grad()
def test_who_sees_whom():
    """The published mask, block by block, from what a change of one part changes in
    the output of one layer.
    """
    name = "acdit_forward"
    case, layer = tensors(name), acdit().blocks[0].attn
    angles, x = torch.zeros(64, 64), torch.randn(2, 64, 128)
    before, seen = layer(x, 1, 4, angles, None), torch.zeros(8, 8, dtype=torch.bool)
    for row, part in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        other = x.clone()
        other[row, 16 * part : 16 * (part + 1)] += 1
        moved = (layer(other, 1, 4, angles, None) - before).unflatten(1, (4, 16)).abs().amax((2, 3)) > 1e-6
        seen[:, 4 * row + part] = moved.flatten()
    check(name, "mask", seen, case)


@torch.no_grad()
def test_sampling_with_guidance():
    name = "acdit_sample_cfg1.5_n10"
    case, net = tensors(name), acdit()
    steps = scalars(name)["num_inference_steps"]
    assert nonzero_steps(steps, 1000)[::-1] == case["out/timesteps"].tolist()
    sampling = SamplingConfig(
        solver="dpmpp_2m", grid="nonzero", num_steps=steps, guidance_scale=scalars(name)["cfg"]
    )
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    decoding = net.decode(case["in/labels"], sampling, None)
    problem, drawn = next(decoding), []
    with pytest.raises(StopIteration) as end:
        for noise in case["in/noise"]:
            drawn.append(process.solve(problem, noise[:, 0], None, sampling))
            problem = decoding.send(drawn[-1])
    check(name, "blocks", torch.stack(drawn, dim=1), case)
    check(name, "latents", end.value.value[:, 0], case)


def small() -> ACDiT:
    torch.manual_seed(0)
    shape = dict(
        width=16, num_heads=2, num_blocks=2, num_classes=5, latent_channels=3, latent_size=8, patch_size=2
    )
    net = ACDiT(ACDiTConfig(**shape))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


@torch.no_grad()
def test_a_new_network_predicts_zero_and_each_block_leaves_noised_tokens_as_they_are():
    torch.manual_seed(0)
    net = ACDiT(ACDiTConfig(size="test", latent_size=4, latent_channels=3))
    clean, x_t = torch.randn(2, 2, 16, 3)
    assert torch.equal(
        net.predict(x_t, torch.rand(2, 4), Known(torch.tensor([0, 3]), clean)), torch.zeros(2, 16, 3)
    )
    x = torch.randn(3, 16, 32)
    y = net.blocks[0](x, torch.randn(2, 4, 32), torch.zeros(16, 16))
    assert torch.equal(y[1:], x[1:]) and (y[0] - x[0]).abs().min() > 0


def test_every_parameter_gets_a_gradient_from_the_loss_of_all_parts():
    """The loss is the error of the noise, by hand, and draws of an image share its clean copy."""
    net, x = small().train(), torch.randn(3, 1, 3, 8, 8)
    numbers = torch.randn(3, 4, 2), torch.randn(3, 2 * 16, 12)
    given = iter(numbers)
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    labels, drop = torch.tensor([0, 4, 2]), torch.tensor([True, False, False])
    losses, _ = losses_of(net, process, labels, drop, x, lambda *shape: next(given), 2)
    losses.mean().backward()
    assert without_gradient(net) == []
    steps = (torch.special.ndtr(numbers[0]) * 1000).long()
    tokens = net.parts(x)
    with torch.no_grad():
        total = 0.0
        for draw in range(2):
            noise = rearrange(numbers[1], "b (k m n) c -> m b (k n) c", m=2, k=4)[draw]
            each = steps[:, :, draw].repeat_interleave(4, dim=1)
            x_t = (
                linear_chain()
                .noised(tokens.flatten(0, 1), noise.flatten(0, 1), each.flatten())
                .view_as(tokens)
            )
            alone = net.predict(x_t, steps[:, :, draw], Known(torch.tensor([5, 4, 2]), tokens))
            total += (alone - noise).square().mean().item()
    assert losses.mean().item() == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_what_is_kept_gives_what_the_whole_pass_gives_and_later_parts_are_not_seen():
    """Parts drawn one after the other, of kept keys and values, see what they saw in training; a class at a
    time, or two.
    """
    net, labels, t = small(), torch.tensor([1, 4]), torch.tensor([[700, 3, 250, 999]])
    x, x_t = torch.randn(2, 1, 3, 8, 8), torch.randn(2, 16, 12)
    whole = net.predict(x_t, t.expand(2, -1), net.condition(labels, NONE, x, None))
    null = net.predict(x_t, t.expand(2, -1), net.condition(labels, ~NONE, x, None))
    decoding = net.decode(labels, SamplingConfig(), None)
    problem = next(decoding)
    with pytest.raises(StopIteration):
        for k, (part, clean) in enumerate(zip(x_t.split(4, 1), net.parts(x).split(4, 1), strict=True)):
            own = slice(4 * k, 4 * k + 4)
            torch.testing.assert_close(problem.predict(part, t[0, k].item()), whole[:, own])
            torch.testing.assert_close(
                torch.stack(problem.pair(part, t[0, k].item())), torch.stack([whole, null])[:, :, own]
            )
            problem = decoding.send(clean)


@torch.no_grad()
def test_parts_are_put_together_as_they_are_taken_apart():
    net, x = small(), torch.randn(2, 1, 3, 8, 8)
    decoding, parts = net.decode(torch.tensor([0, 1]), SamplingConfig(), None), net.parts(x).split(4, 1)
    next(decoding)
    with pytest.raises(StopIteration) as end:
        for part in parts:
            decoding.send(part)
    assert torch.equal(end.value.value, x)


def test_a_grid_that_is_not_made_of_squares_is_refused():
    for changes, message in (
        (
            {"parts_per_side": 3},
            r"model\.parts_per_side: got 3; allowed: a divisor of 16, the tokens of a side of the latent",
        ),
        (
            {"width": 36, "num_heads": 6, "num_blocks": 1},
            r"model\.num_heads: got 6; allowed: .* divisor of model\.width=36",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ACDiTConfig(**changes)
