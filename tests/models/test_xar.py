"""xAR's network, its loss and its sampling, against the numbers of the official implementation and against
itself.
"""

import pytest
import torch
from einops import rearrange
from torch import nn

from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.config.xar import XARConfig
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models import layers
from lit_transdiff.models.rotary import grid_places, rotary_turns
from lit_transdiff.models.tokens import split_squares
from lit_transdiff.models.xar import XAR, NoisyCells
from lit_transdiff.sampling.loop import sampler_of
from lit_transdiff.stages.objective import losses_of
from tests.helpers.families import Prepared, check, same_shapes, scalars, tensors, without_gradient, xar
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
PUBLISHED = {"base": 172_638_224, "large": 608_397_968, "huge": 1_186_024_096}  # parameters
NONE = torch.zeros(2, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


@pytest.mark.parametrize("size", PUBLISHED)
def test_keys_shapes_and_parameter_counts(size: str):
    with torch.device("meta"):
        net = XAR(XARConfig(size=size))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[size]
    if size == "base":
        same_shapes(net, "xar_base")


@torch.no_grad()
def test_forward_over_noisy_cells():
    """The network is told whole thousandths of the time: what lies between them changes nothing."""
    name = "xar_forward"
    case, net, encoded = tensors(name), xar(), []
    net.encoder_norm.register_forward_hook(lambda *call: encoded.append(call[-1]))
    t = ((case["in/t"] + 0.5) / 1000).T
    check(name, "v", net.predict(case["in/x"], t, NoisyCells(case["in/labels"])), case)
    check(name, "encoded", encoded[0], case)
    exact = net.predict(case["in/x"], case["in/t"].double().T / 1000, NoisyCells(case["in/labels"]))
    check(name, "v", exact, case)


def test_order_of_cells_and_their_angles():
    name = "xar_forward"
    case, places = tensors(name), grid_places(16, 16, torch.device("cpu"))
    cells = split_squares(places.movedim(-1, 0)[:, None], 2, 1)[..., 0]
    check(name, "cell_order", (16 * cells[0] + cells[1]).long(), case)
    cos, sin = rotary_turns(cells.T, 12)[:, [0, 1, 7, 8, 64, 65, 128, 192, 255]].repeat_interleave(2, dim=2)
    check(name, "rope_cos", cos, case)
    check(name, "rope_sin", sin, case)


@torch.no_grad()
def test_sampling_with_guidance_that_grows():
    name = "xar_sample_cfg2.7_n8"
    case, net, given = tensors(name), xar(), scalars(name)
    sampling = SamplingConfig(
        num_steps=given["num_steps"], guidance_scale=given["cfg"], part_guidance="growing"
    )
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    decoding = net.decode(case["in/labels"], sampling, None)
    problem = next(decoding)
    with pytest.raises(StopIteration) as end:
        for k in range(4):
            steps = iter(case[f"in/steps_{k}"])
            sampler = sampler_of(problem, sampling)
            cell = process.solve(problem, case[f"in/noise_{k}"], lambda steps=steps: next(steps), sampler)
            check(name, f"cell_{k}", cell, case)
            problem = decoding.send(cell)
    check(name, "latents", end.value.value[:, 0], case)


def small() -> XAR:
    torch.manual_seed(0)
    shape = dict(width=16, num_heads=2, decoder_heads=1, encoder_blocks=2, decoder_blocks=2, num_classes=5)
    shape |= dict(latent_channels=3, latent_size=8, patch_size=2, parts_per_side=2)
    net = XAR(XARConfig(**shape, attention_dropout=0.0, projection_dropout=0.0))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def test_every_parameter_gets_a_gradient_from_the_loss_of_all_cells():
    """The loss is the error of the velocity, by hand."""
    net, x = small().train(), torch.randn(3, 1, 3, 8, 8)
    numbers = torch.randn(3, 4, 2), torch.randn(3, 2 * 16, 12)
    process = PROCESSES[net.process](FlowConfig(), net.prediction)
    labels, drop = torch.tensor([0, 4, 2]), torch.tensor([True, False, False])
    losses, share = losses_of(net, process, labels, drop, x, Prepared([*numbers]), 2)
    losses.mean().backward()
    assert without_gradient(net) == []
    times, tokens, total = numbers[0].sigmoid(), net.parts(x), 0.0
    assert torch.equal(share, rearrange(times, "b k m -> (k m b)"))
    with torch.no_grad():
        for draw in range(2):
            noise = rearrange(numbers[1], "b (k m n) c -> m b (k n) c", m=2, k=4)[draw]
            each = times[:, :, draw].repeat_interleave(4, dim=1)[..., None]
            x_t = (1 - each) * tokens + each * noise
            alone = net.predict(x_t, times[:, :, draw], NoisyCells(torch.tensor([5, 4, 2])))
            total += (alone - (noise - tokens)).square().mean().item()
    assert losses.mean().item() == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_what_is_kept_gives_what_the_whole_pass_gives_and_later_cells_are_not_seen():
    """Cells before are clean and at time 0, for the class and for the null class, which each have their own
    keys and values.
    """
    net, labels, clean = small(), torch.tensor([1, 4]), torch.randn(2, 1, 3, 8, 8)
    tokens, noisy = net.parts(clean), torch.randn(2, 4, 12)
    for scale in (1.0, 2.0):
        decoding = net.decode(labels, SamplingConfig(guidance_scale=scale), None)
        problem = next(decoding)
        with pytest.raises(StopIteration) as end:
            for k, part in enumerate(tokens.split(4, 1)):
                x = torch.cat([tokens[:, : 4 * k], noisy, torch.randn(2, 12 - 4 * k, 12)], dim=1)
                t = torch.tensor([[0.0] * k + [0.6] + [0.9] * (3 - k)]).expand(2, -1)
                whole, null = (
                    net.predict(x, t, net.condition(labels, drop, clean, None))[:, 4 * k : 4 * k + 4]
                    for drop in (NONE, ~NONE)
                )
                torch.testing.assert_close(problem.predict(noisy, 0.6), whole)
                if scale > 1:
                    both = torch.stack(problem.pair(noisy, 0.6))
                    torch.testing.assert_close(both, torch.stack([whole, null]))
                problem = decoding.send(part)
        assert torch.equal(end.value.value, clean)


def test_cells_that_do_not_fill_the_grid_are_refused():
    for changes, message in (
        ({"parts_per_side": 3}, r"model\.parts_per_side: got 3; allowed: a divisor of 16, the tokens of a"),
        ({"width": 36, "num_heads": 6}, r"model\.num_heads: got 6; allowed: .* divisor of model\.width=36"),
        ({"decoder_heads": 0}, r"model\.decoder_heads: got 0; allowed: .* divisor of model\.width=768"),
        ({"size": "xl"}, r"model\.size: 'xl' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            XARConfig(**changes)
