"""The reference of all settings: complete, current, and the same names as the tables of the code."""

import dataclasses
import re

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.config import NESTED, PARADIGMS, SIZES, RunConfig
from lit_transdiff.config.reference import (
    Setting,
    all_settings,
    family_settings,
    settings_as_markdown,
    settings_as_text,
)
from lit_transdiff.distributed import STRATEGIES
from lit_transdiff.evaluation.features import EXTRACTORS
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.flow.diffusion import CHAIN_SOLVERS
from lit_transdiff.flow.loss import DENSITIES
from lit_transdiff.flow.solvers import GRIDS, SOLVERS
from lit_transdiff.stages.optim import SCHEDULES
from tests.helpers.small import ROOT

TABLES = {
    "model.size": SIZES,
    "flow.density": DENSITIES,
    "optimizer.schedule": SCHEDULES,
    "sampling.solver": [*SOLVERS, *CHAIN_SOLVERS],
    "sampling.grid": GRIDS,
    "evaluation.extractor": EXTRACTORS,
    "evaluation.metrics": METRICS,
    "distributed.strategy": ["auto", *STRATEGIES],
}


@pytest.fixture(scope="module")
def settings() -> dict[str, Setting]:
    return {setting.name: setting for section in all_settings().values() for setting in section}


def test_the_page_is_current():
    current = (ROOT / "docs/settings.md").read_text() == settings_as_markdown()
    assert current, "make it again: lit-transdiff settings --markdown > docs/settings.md"


def test_every_field_is_there(settings: dict[str, Setting]):
    own = [field.name for field in dataclasses.fields(RunConfig) if field.name not in NESTED]
    nested = [
        f"{name}.{field.name}" for name, schema in NESTED.items() for field in dataclasses.fields(schema)
    ]
    assert list(settings) == own + nested


@pytest.mark.parametrize("name", [name for name in PARADIGMS if name != "transdiff"])
def test_every_field_of_every_family_is_there_with_its_meaning(name: str):
    cls = PARADIGMS[name].settings
    found = {setting.name: setting for setting in family_settings()[name]}
    assert list(found) == [f"model.{field.name}" for field in dataclasses.fields(cls)]
    assert all(setting.meaning for setting in found.values()) and found["model.paradigm"].default == name
    assert f"### `model.paradigm: {name}`" in settings_as_markdown()


@pytest.mark.parametrize(
    ("word", "lines"), [("sit", "model.guided_channels"), ("mask_rate_min", "model.mask_rate_min")]
)
def test_settings_of_a_family_are_found(word: str, lines: str):
    assert f"{lines} = " in settings_as_text(word) and "sampling." not in settings_as_text(word).split()


@pytest.mark.parametrize("name", TABLES)
def test_open_sets_are_listed(settings: dict[str, Setting], name: str):
    listed = re.findall("`[^`]+`", settings[name].values)
    assert sorted(listed) == sorted(f"`{key}`" for key in TABLES[name])


def test_comments_types_ranges_and_defaults_are_read(settings: dict[str, Setting]):
    assert "diffusers' layout" in settings["autoencoder.path"].meaning
    assert "at least 1" in settings["data.image_size"].values and settings[
        "data.image_size"
    ].values.startswith("integer")
    assert (
        settings["training.log_every"].values == settings["model.num_classes"].values == "integer, at least 1"
    ), "from loops"
    assert settings["data.crop"].values == "`none`, `center`, `random`, `random-square`"
    assert "bfloat16" in settings["training.precision"].meaning, (
        "the lines below a field are a part of its comment"
    )
    assert settings["autoencoder.kind"].default == "identity", (
        "the run's default, which is not that of the class"
    )
    assert settings["optimizer.betas"].default == "[0.9, 0.95]" and settings["init_from"].default == "null"


def test_the_command_prints_a_section_a_setting_or_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["settings", "checkpoint"]) == 0
    assert capsys.readouterr().out.count("checkpoint.") == len(dataclasses.fields(NESTED["checkpoint"]))
    assert main(["settings", "optimizer.lr"]) == 0
    assert capsys.readouterr().out.startswith("optimizer.lr = 0.0008    (number")
    assert main(["settings", "lr"]) == 0
    assert capsys.readouterr().out.startswith("optimizer.lr = 0.0008    (number")
    assert main(["settings"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert main(["settings", "optimiser"]) == 2
    assert "Did you mean 'optimizer'" in capsys.readouterr().err


def test_a_mistyped_setting_is_told_where_its_section_is_explained(capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(ROOT / "experiments/fashion/ar_pretrain.yaml"), "sampling.num_stepz=3"]) == 2
    assert capsys.readouterr().err.strip().endswith("Explained by: lit-transdiff settings sampling")
