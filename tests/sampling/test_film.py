"""Films: for every family, the states end in the image, and each keeps what was drawn before."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_transdiff.config import SamplingConfig
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.sampling.draw import draw_samples
from lit_transdiff.sampling.film import MOST_STATES, draw_film, film, shown_states
from lit_transdiff.sampling.generator import Generator
from tests.helpers.small import FAMILIES, small_run

pytestmark = pytest.mark.numeric
REFERENCES = {"model": {"num_references": 4}, "stage": "mrar_finetune"}
RUNS = {"transdiff": {}, "mrar": REFERENCES, **FAMILIES}
PARTS = {"mrar": 4, "transdiff_parts": 4, "acdit": 4, "xar": 4, "flowar": 3, "ardiff": 16, "mar": 4}
LABELS, SEEDS = [0, 7], [11, 12]


@pytest.fixture(params=RUNS)
def generator(request: pytest.FixtureRequest, tmp_path: Path) -> Generator:
    run = small_run(tmp_path, name=request.param, **RUNS[request.param])
    torch.manual_seed(0)
    model = build_model(run.model).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Generator(model, load_autoencoder("identity", None, 1), run, ())


def filmed(generator: Generator) -> tuple[Tensor, list[str], SamplingConfig]:
    sampling = generator.run.sampling
    return *film(generator, LABELS, SEEDS, sampling), sampling


def test_the_last_state_is_the_image(generator: Generator):
    states, captions, sampling = filmed(generator)
    images = generator.images(LABELS, SEEDS, sampling)[:, -1]
    torch.testing.assert_close(states[:, -1], images, rtol=0, atol=1e-6)
    name = generator.run.name
    assert len(captions) == states.shape[1] == PARTS.get(name, sampling.num_steps + 1)
    if name in PARTS:
        assert captions[-1] == f"{PARTS[name]} of {PARTS[name]}"
    else:
        assert (captions[0], captions[-1]) == ("noise 1.00", "noise 0")


def test_every_state_adds_to_the_one_before(generator: Generator):
    """Pixels that a part has set stay; only an image of a row, a scale or a step replaces all of them."""
    states, _, _ = filmed(generator)
    steps = states.diff(dim=1).abs().amax(2) > 1e-6
    assert bool((steps.flatten(2).any(-1)).all())
    if generator.run.name in ("acdit", "xar", "ardiff", "mar"):
        assert int(steps.sum(1).max()) == 1


def test_the_states_are_pictures(tmp_path: Path):
    run = small_run(tmp_path, **FAMILIES["xar"])
    generator = Generator(
        build_model(run.model).eval(), load_autoencoder("identity", None, 1), run, "abcdefghij"
    )
    picture = Image.open(draw_film(generator, [1, 2], 2, tmp_path / "film"))
    assert picture.width > 4 * 96 and picture.height > 4 * 96
    animation = Image.open(tmp_path / "film" / "film.webp")
    assert animation.n_frames == 4
    assert draw_samples(generator, [1], 1, tmp_path / "grid").is_file()


def test_a_long_film_is_cut_to_states_at_equal_distances():
    assert shown_states(1) == [0] and shown_states(3) == [0, 1, 2]
    assert (
        shown_states(256)[0] == 0
        and shown_states(256)[-1] == 255
        and len(set(shown_states(256))) == MOST_STATES
    )


def test_a_film_of_an_adaptive_solver_is_in_the_order_of_the_mean_noise(tmp_path: Path):
    sampling = {"solver": "dopri5", "num_steps": 100, "rtol": 0.05, "atol": 0.01}
    run = small_run(tmp_path, **FAMILIES["sit"], sampling=sampling)
    torch.manual_seed(0)
    model = build_model(run.model).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    generator = Generator(model, load_autoencoder("identity", None, 1), run, ())
    states, captions, sampling = filmed(generator)
    torch.testing.assert_close(states[:, -1], generator.images(LABELS, SEEDS, sampling)[:, -1])
    levels = [float(caption.removeprefix("noise ")) for caption in captions]
    assert levels == sorted(levels, reverse=True) and (levels[0], levels[-1]) == (1, 0)
    assert 6 < len(levels) <= MOST_STATES
