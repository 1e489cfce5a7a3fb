"""The JSON schema of recipes: current, valid for every shipped recipe, and strict for settings that a run
refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lit_transdiff import SOLVERS
from lit_transdiff.__main__ import main
from lit_transdiff.config.reference import all_settings
from lit_transdiff.config.schema import bounds, recipe_schema, schema_as_json
from tests.helpers.small import ROOT

OTHER = {
    "runs",
    "parameters",
    "arms",
    "apiVersion",
    "resources",
    "overrides",
}  # of pipelines, sweeps, studies and jobs
RECIPES = [
    path
    for path in sorted((ROOT / "experiments").rglob("*.yaml"))
    if not OTHER & set(yaml.safe_load(path.read_text()))
]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    jsonschema.Draft7Validator.check_schema(recipe_schema())
    return jsonschema.Draft7Validator(recipe_schema())


def test_the_file_is_current() -> None:
    current = (ROOT / "docs/recipe.schema.json").read_text() == schema_as_json()
    assert current, "make it again: lit-transdiff settings --json-schema > docs/recipe.schema.json"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_fit(path: Path, validator: jsonschema.Draft7Validator) -> None:
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    "recipe",
    [
        "optimiser: {lr: 1}",
        "optimizer: {learning_rate: 1}",
        "optimizer: {lr: -1.0}",
        "optimizer: {lr: fast}",
        "model: {width: 0}",
        "model: {attention_dropout: 1.0}",
        "training: {max_steps: 2.5}",
        "training: {precision: fp8}",
        "training: {max_steps: 2000000000}",
        "optimizer: {betas: 0.9}",
        "init_classes: some",
        "data: {horizontal_flip: 3}",
        "sampling: [heun]",
    ],
)
def test_what_a_run_would_refuse_is_marked(recipe: str, validator: jsonschema.Draft7Validator) -> None:
    assert not validator.is_valid(yaml.safe_load(recipe))


@pytest.mark.parametrize(
    "recipe",
    [
        "seed: ${training.max_steps}",
        "init_from: null",
        "init_classes: {sneaker: shoe, '3': null}",
        "sampling: {solver: one_of_my_own}",
        "flow: {loss_terms: {direction: 0.5}}",
        "sampling: {guidance_interval: [0.1, 0.9]}",
    ],
)
def test_what_a_run_takes_is_taken(recipe: str, validator: jsonschema.Draft7Validator) -> None:
    assert [error.message for error in validator.iter_errors(yaml.safe_load(recipe))] == []


def test_ranges_are_those_of_the_checks() -> None:
    found = {setting.name: bounds(setting) for section in all_settings().values() for setting in section}
    assert found["data.image_size"] == {"minimum": 1}
    assert found["optimizer.lr"] == {"exclusiveMinimum": 0}
    assert found["model.attention_dropout"] == {"minimum": 0, "exclusiveMaximum": 1}
    assert found["training.max_steps"] == {"minimum": 1, "maximum": 1_000_000_000}
    assert found["evaluation.every"] == {"minimum": 0}, "0 (off) or more"
    assert found["safety.spike_factor"] == {}, "0 (off) or above 1 is no interval"


def test_the_command_prints_it_with_entries_of_ones_own(
    fresh_tables: None, capsys: pytest.CaptureFixture[str]
) -> None:
    SOLVERS["mine"] = SOLVERS["euler"]
    assert main(["settings", "--json-schema"]) == 0
    schema: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = schema["properties"]["sampling"]["properties"]["solver"]["anyOf"][0]["enum"]
    assert "mine" in names and "euler" in names
