"""TransDiff over the parts of one image: cells in raster or random order, and scales."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import ModelConfig, SamplingConfig
from lit_transdiff.config.transdiff_parts import TransDiffPartsConfig
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.models.transdiff_parts import TransDiffParts
from lit_transdiff.sampling.loop import generate
from tests.helpers.families import Prepared, without_gradient

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("float64")]
SHAPE: dict[str, Any] = dict(
    size="test",
    num_classes=10,
    num_class_tokens=2,
    latent_channels=2,
    latent_size=4,
    attention_dropout=0.0,
    projection_dropout=0.0,
)
KINDS: dict[str, dict[str, Any]] = {
    "raster": {},
    "random": {"order": "random"},
    "tokens": {"order": "random", "parts_per_side": 4},
    "scales": {"parts": "scales"},
}
LABELS, DROP = torch.tensor([0, 3]), torch.tensor([True, False])


def random_weights(model: torch.nn.Module) -> None:
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> TransDiffParts:
    torch.manual_seed(0)
    model = TransDiffParts(TransDiffPartsConfig(**SHAPE, **KINDS[request.param])).eval()
    random_weights(model)
    return model


def order_numbers(model: TransDiffParts) -> Tensor:
    return torch.randn(2, len(model.part_sizes))


def test_every_parameter_gets_a_gradient_and_draws_are_independent(model: TransDiffParts):
    x, number, parts = torch.randn(2, 1, 2, 4, 4), sum(model.part_sizes), len(model.part_sizes)
    memory = model.condition(LABELS, DROP, x, Prepared([order_numbers(model)]))
    x_t, t = torch.randn(4, number, 2), torch.rand(4, parts)
    velocities = model.predict(x_t, t, memory)
    velocities.square().sum().backward()
    assert without_gradient(model) == []
    changed = torch.cat([x_t[:2], torch.randn(2, number, 2)])
    assert torch.equal(model.predict(changed, t, memory)[:2], velocities[:2])


def test_drawing_with_keys_and_values_kept_gives_the_velocities_of_training(model: TransDiffParts):
    """Part by part, given the clean parts of a known image: so a part is blind to those after it, too."""
    x, numbers = torch.randn(2, 1, 2, 4, 4), order_numbers(model)
    clean = model.parts(x)
    memory = model.condition(LABELS, torch.tensor([False, False]), x, Prepared([numbers]))
    null = model.condition(LABELS, torch.tensor([True, True]), x, Prepared([numbers]))
    x_t, parts = torch.randn_like(clean), len(model.part_sizes)
    known, unknown = (model.predict(x_t, torch.full((2, parts), 0.3), each) for each in (memory, null))
    sampling = SamplingConfig(guidance_scale=2.0)
    decoding = model.decode(LABELS, sampling, Prepared([numbers]))
    problem, ends = next(decoding), torch.tensor([0, *model.part_sizes]).cumsum(0)
    try:
        for j in range(parts):
            places = torch.stack(
                [torch.arange(ends[part], ends[part + 1]) for part in memory.order[:, j].tolist()]
            )
            rows = torch.arange(2)[:, None], places
            c, u = problem.pair(x_t[rows], 0.3)
            torch.testing.assert_close(c, known[rows], rtol=0, atol=1e-6)
            torch.testing.assert_close(u, unknown[rows], rtol=0, atol=1e-6)
            torch.testing.assert_close(problem.predict(x_t[rows], 0.3), known[rows], rtol=0, atol=1e-6)
            assert problem.progress == (j + 1) / parts
            problem = decoding.send(clean[rows])
        raise AssertionError("there are more parts")
    except StopIteration as end:
        torch.testing.assert_close(end.value, x)


def test_an_image_depends_on_its_own_seed_alone(model: TransDiffParts):
    sampling = SamplingConfig(num_steps=3, guidance_scale=2.0)
    together = generate(model, LABELS, sampling, [4, 9])
    alone = generate(model, LABELS[1:], sampling, [9])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)
    assert (together - generate(model, LABELS, sampling, [5, 8])).abs().amin((1, 2, 3, 4)).max() > 0


def test_orders_are_random_for_each_image_alone():
    model = TransDiffParts(TransDiffPartsConfig(**SHAPE, **KINDS["tokens"]))
    x = torch.randn(2, 1, 2, 4, 4)
    order = model.condition(LABELS, DROP, x, PerImageNormal([1, 2])).order
    assert torch.equal(order.sort(dim=1).values, torch.arange(16).expand(2, -1))
    assert not torch.equal(order[0], order[1])


def test_one_part_is_one_step_transdiff():
    ours = TransDiffParts(TransDiffPartsConfig(**SHAPE, parts_per_side=1)).eval()
    theirs = TransDiff(ModelConfig(**SHAPE, num_context_tokens=16)).eval()
    random_weights(theirs)
    weights = theirs.state_dict()
    position = weights.pop("encoder.position")
    weights["encoder.class_position"], weights["encoder.position"] = position.split([2, 16], dim=1)
    weights["encoder.mask_token"] = weights.pop("encoder.mask_tokens")
    ours.load_state_dict(weights)
    x, t = torch.randn(2, 1, 2, 4, 4), torch.rand(2, 1)
    memories = [net.condition(LABELS, DROP, x, PerImageNormal([1, 2])) for net in (ours, theirs)]
    velocity = theirs.predict(x, t, memories[1])
    torch.testing.assert_close(ours.predict(ours.parts(x), t, memories[0]), ours.parts(velocity))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": "scales", "order": "random"}, r"model\.order: got 'random'; allowed: 'raster' with"),
        ({"parts": "scales", "parts_per_side": 4}, r"model\.parts_per_side: got 4; allowed: 2 with"),
        ({"parts": "scales", "latent_size": 6}, r"tokens of a side: got 6; allowed: a power of 2"),
        ({"order": "random", "parts_per_side": 1}, r"model\.order: got 'random'; allowed: 'raster' with"),
        ({"parts_per_side": 3}, r"model\.parts_per_side: got 3; allowed: a divisor of 4"),
    ],
)
def test_what_has_no_effect_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TransDiffPartsConfig(**SHAPE | settings)
