"""TransDiff's ablations: decoders that know the context in another way, and a decoder without encoder."""

from typing import Any

import pytest
import torch

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import ModelConfig, SamplingConfig
from lit_transdiff.models.decoders import DECODERS
from lit_transdiff.models.flops import row_cost
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.sampling.loop import generate
from tests.helpers.families import without_gradient
from tests.helpers.small_model import SMALL, build

pytestmark = pytest.mark.numeric
LABELS, DROP = torch.tensor([0, 3, 1]), torch.tensor([True, False, False])


@pytest.fixture(params=[name for name in DECODERS if name != "cross_attention"])
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param


def predicted(model: TransDiff, x: torch.Tensor, rows: slice = slice(None), draws: int = 2) -> torch.Tensor:
    """The velocities [M, B, R, C, H, W] of fixed noise and times."""
    stream = torch.Generator().manual_seed(1)
    noise = torch.randn(draws, *x.shape, generator=stream)[:, rows]
    t = torch.rand(draws, *x.shape[:2], generator=stream)[:, rows]
    memory = model.condition(LABELS[rows], DROP[rows], x[rows], PerImageNormal([0]))
    return model.predict(noise.flatten(0, 1), t.flatten(0, 1), memory).unflatten(0, (draws, -1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_references", [1, 4])
def test_a_row_depends_on_its_own_context_alone(decoder: str, num_references: int):
    model, x = build(num_references, decoder=decoder), torch.randn(3, num_references, 2, 4, 4)
    together = predicted(model, x)
    for i in range(3):
        torch.testing.assert_close(predicted(model, x, slice(i, i + 1)), together[:, i : i + 1])


@pytest.mark.usefixtures("float64")
def test_an_image_sees_the_images_before_it_alone(decoder: str):
    model, x = build(4, decoder=decoder), torch.randn(3, 4, 2, 4, 4)
    changed = x.clone()
    changed[:, 1] += 1
    before, after = predicted(model, x), predicted(model, changed)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], rtol=0, atol=0)
    assert ((before - after)[:, :, 2:].abs().amax((3, 4, 5)) > 1e-6).all()


@pytest.mark.parametrize("num_references", [1, 4])
def test_it_learns_and_draws(decoder: str, num_references: int):
    model = build(num_references, decoder=decoder)
    predicted(model.train(), torch.randn(3, num_references, 2, 4, 4)).square().mean().backward()
    assert without_gradient(model) == []
    sampling = SamplingConfig(num_steps=2, guidance_scale=2.0)
    images = generate(model.eval(), LABELS, sampling, [1, 2, 3])
    alone = generate(model, LABELS[1:2], sampling, [2])
    torch.testing.assert_close(images[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(images, generate(model, LABELS.flip(0), sampling, [1, 2, 3]), atol=1e-3)


def test_a_decoder_alone_knows_the_class():
    """Without blocks of an encoder; costs are counted, too."""
    model = build(encoder="class_alone", encoder_blocks=0, num_class_tokens=0)
    assert [*model.block_lists()] == ["decoder"]
    predicted(model.train(), torch.randn(3, 1, 2, 4, 4)).square().mean().backward()
    assert without_gradient(model) == []
    sampling = SamplingConfig(num_steps=2, guidance_scale=2.0)
    images = [generate(model.eval(), labels, sampling, [1, 2, 3]) for labels in (LABELS, LABELS.flip(0))]
    assert not torch.allclose(*images, atol=1e-3)
    assert 0 < row_cost(model.config, 2).flops < row_cost(build().config, 2).flops


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_blocks": 0}, r"model\.encoder_blocks: got 0; allowed: an integer of at least 1"),
        (
            {"encoder": "class_alone"},
            r"model\.encoder_blocks: got 2; allowed: 0 with model\.encoder=class_alone",
        ),
        (
            {"encoder": "class_alone", "encoder_blocks": 0, "num_class_tokens": 0, "num_references": 4},
            r"model\.num_references: got 4; allowed: 1 with",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **settings})
