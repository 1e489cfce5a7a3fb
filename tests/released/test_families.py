"""Released files of the families beside TransDiff: known by their tensors, and bit for bit there and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.config import PARADIGMS, RunConfig
from lit_transdiff.config.loading import run_from
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.released.convert import convert
from lit_transdiff.released.families import Hints, ratio_of
from lit_transdiff.released.layouts import LAYOUTS, layout_in
from lit_transdiff.sampling.generator import load_generator
from tests.helpers.families import SHAPES
from tests.helpers.released_files import converted_autoencoder, equal

FAMILIES = [name for name in LAYOUTS if name != "transdiff"]
SMALL = dict(size="test", num_classes=7, latent_channels=4, latent_size=4)
F16, F8 = Hints(latent_channels=16, latent_size=16), Hints(latent_channels=4, latent_size=32)
PUBLISHED: dict[str, tuple[str, Hints, dict[str, Any]]] = {
    "mar_base_d6_w1024": ("mar", F16, {"size": "base"}),
    "ardiff_base": ("ardiff", F16, {"size": "base"}),
    "flowar_small_d2_w1024": ("flowar", F16, {"size": "small"}),
    "flowar_large_d12_w1024": ("flowar", F16, {"size": "large"}),
    "xar_base": ("xar", F16, {"size": "base"}),
    "acdit_b": ("acdit", F8, {"size": "base", "latent_channels": 4, "latent_size": 32}),
    "sit_b_2": ("sit", F8, {"size": "base", "latent_channels": 4, "latent_size": 32, "patch_size": 2}),
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_autoencoder(tmp_path_factory.mktemp("released"))


def random_states(paradigm: str, **changes: Any) -> list[dict[str, Tensor]]:
    """Weights and averages of a small model."""
    config = PARADIGMS[paradigm].settings(**SMALL | changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    shapes = {key: value.shape for key, value in build_model(config).state_dict().items()}
    return [{key: torch.randn(shape) for key, shape in shapes.items()} for _ in range(2)]


def recipe_of(paradigm: str, **changes: Any) -> RunConfig:
    model = {"paradigm": paradigm, **SMALL, **changes}
    more = {"stage": "pretrain", "model": model, "data": {"image_size": 64}}
    solver = (
        "ancestral" if paradigm in ("dit", "mar", "ardiff") else "dpmpp_2m" if paradigm == "acdit" else "heun"
    )
    grid = "nonzero" if solver == "dpmpp_2m" else "uniform"
    return run_from(more | {"sampling": {"solver": solver, "grid": grid, "num_steps": 2}})


def test_all_families_have_a_layout():
    assert {*LAYOUTS} == {*PARADIGMS} - {"transdiff_parts"}


@pytest.mark.parametrize("published", PUBLISHED)
def test_a_published_size_is_known_by_its_tensors(published: str):
    paradigm, hints, expected = PUBLISHED[published]
    state = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[published].items()}
    layout = layout_in(state, published, None)
    assert layout.paradigm == paradigm
    found = layout.settings(state, hints)["model"]
    settings = PARADIGMS[paradigm].settings
    assert settings(**found) == settings(**expected)  # type: ignore[call-arg]


@pytest.mark.parametrize("paradigm", FAMILIES)
def test_there_and_back_is_bit_for_bit(paradigm: str, tmp_path: Path, autoencoder: Path):
    states, name = random_states(paradigm), "ema" if paradigm in ("sit", "dit", "acdit") else "model_ema"
    buffer = {"rope.freqs": torch.randn(3)} if paradigm == "xar" else {}
    content = {"model": states[0] | buffer, name: states[1] | buffer, "epoch": 3, "opt": {}}
    torch.save(content, tmp_path / "file.pt")
    recipe = recipe_of(paradigm) if paradigm in ("dit", "acdit") else None  # which says what tensors do not
    said = convert(tmp_path / "file.pt", tmp_path / "ours", autoencoder=autoencoder, recipe=recipe)
    run = read_export(tmp_path / "ours").run
    settings = PARADIGMS[paradigm].settings
    assert run.model == settings(**SMALL) and run.stage == "pretrain"  # type: ignore[call-arg]
    assert paradigm in said and f"{name}: " in said and "not converted: opt" in said
    assert ("kept aside: rope.freqs [3]" in said) == bool(buffer)
    generator = load_generator(tmp_path / "ours")
    drawn = generator.model.state_dict()
    assert all(torch.equal(drawn[key], states[1][key]) for key in drawn)
    convert(tmp_path / "ours", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    assert [*back] == ["model", name, "epoch"]
    assert equal(back["model"], content["model"]) and equal(back[name], content[name])


def test_a_file_without_the_table_that_is_a_formula(tmp_path: Path, autoencoder: Path):
    (state, _) = random_states("sit")
    table = state.pop("pos_embed")
    torch.save(state, tmp_path / "file.pt")
    convert(tmp_path / "file.pt", tmp_path / "ours", autoencoder=autoencoder, recipe=recipe_of("sit"))
    made = load_generator(tmp_path / "ours").model.state_dict()["pos_embed"]
    assert made.shape == table.shape and torch.equal(made, build_model(recipe_of("sit").model).pos_embed)
    convert(tmp_path / "ours", tmp_path / "back.pt")
    assert equal(torch.load(tmp_path / "back.pt")["model"], state)


def test_the_released_sampler_is_that_of_a_file_without_a_recipe(tmp_path: Path, autoencoder: Path):
    torch.save(random_states("mar")[0], tmp_path / "file.pth")
    convert(tmp_path / "file.pth", tmp_path / "ours", autoencoder=autoencoder)
    run = read_export(tmp_path / "ours").run
    assert (run.sampling.solver, run.sampling.part_guidance) == ("ancestral", "growing")
    assert load_generator(tmp_path / "ours").weights == "last"


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("paradigm", "change", "recipe", "message"),
    [
        ("mar", lambda s: without(s, "z_proj_ln.bias"), None, r"does not fit: missing: z_proj_ln\.bias"),
        ("mar", lambda s: s | {"more": torch.zeros(1)}, None, r"does not fit: unexpected: more \[1\]$"),
        (
            "xar",
            lambda s: s | {"pred.bias": torch.zeros(5)},
            None,
            r"shape: pred\.bias \[5\], expected \[4\]$",
        ),
        ("ardiff", lambda s: without(s, "target_pos_embed"), None, r"released ardiff .* target_pos_embed is"),
        ("flowar", lambda s: s, "xar", r"recipe: model\.paradigm: got 'xar'; allowed: flowar, as the file"),
        ("dit", lambda s: s, None, r"recipe: got None; allowed: a recipe with model\.paradigm sit or dit"),
        (
            "xar",
            lambda s: s | {"encoder_pos_embed_learned": torch.zeros(1, 15, 32)},
            None,
            r"encoder_pos_embed_learned: tokens: got 15; allowed: the square",
        ),
        (
            "mar",
            lambda s: s | {"z_proj.weight": torch.zeros(32, 6)},
            None,
            r"channels of the autoencoder: got",
        ),
        ("acdit", lambda s: s | {"x_embedder.bias": torch.zeros(32)}, None, r"unexpected: x_embedder\.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    paradigm: str, change: Any, recipe: str | None, message: str, tmp_path: Path, autoencoder: Path
):
    torch.save(change(random_states(paradigm)[0]), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message) as error:
        convert(
            tmp_path / "file.pth",
            tmp_path / "ours",
            autoencoder=autoencoder,
            recipe=None if recipe is None else recipe_of(recipe),
        )
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


def test_a_ratio_that_is_no_whole_number():
    assert ratio_of(2048, 768, gated=True) == 4.0
    for ratio in (1.3, 2.7, 3.5):
        assert int(96 * ratio_of(int(96 * ratio), 96)) == int(96 * ratio)
        hidden = int(96 * ratio * 2 / 3)
        assert int(96 * ratio_of(hidden, 96, gated=True) * 2 / 3) == hidden


def test_heads_of_no_known_size_are_asked_for(tmp_path: Path, autoencoder: Path):
    torch.save(random_states("mar", width=40, num_heads=5)[0], tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"model\.num_heads: no known size has .*; give num_heads"):
        convert(tmp_path / "file.pth", tmp_path / "ours", autoencoder=autoencoder)
    convert(tmp_path / "file.pth", tmp_path / "ours", autoencoder=autoencoder, num_heads=5)
    assert read_export(tmp_path / "ours").run.model.num_heads == 5  # type: ignore[attr-defined]
