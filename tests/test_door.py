"""The entry points: public names, and fast answers before the large libraries are loaded."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

import lit_transdiff
from lit_transdiff.cli.api import page
from tests.helpers.small import ROOT

HEAVY = (
    "torch",
    "lightning",
    "wandb",
    "pandas",
    "matplotlib",
    "torchmetrics",
    "deepspeed",
    "diffusers",
    "scipy",
)
LOADED = f"[name for name in {HEAVY} if name in sys.modules]"
RECIPE = "experiments/fashion/ar_pretrain.yaml"
FILES = ["--weights", "nope", "--vae", "nope", "--inception", "nope", "--reference", "nope"]
WRONG = [
    ["pack", "nope", "{new}"],
    ["index", "nope"],
    ["verify", "nope"],
    ["cache", "nope.yaml", "nope", "{new}"],
    ["cache", RECIPE, "nope", "{new}"],
    ["statistics", "nope.yaml", "nope", "{new}.npz"],
    ["statistics", RECIPE, "nope", "{new}.npz"],
    ["train", "nope.yaml"],
    ["train", "nope.yaml", "--dry-run"],
    ["train", RECIPE, "output_dir={new}", "data.train=nope"],
    ["train", RECIPE, "output_dir={new}", "data.train=data/fashion/train", "data.evaluation=nope"],
    [
        "train",
        RECIPE,
        "output_dir={new}",
        "data.train=data/fashion/train",
        "data.evaluation=null",
        "init_from=nope",
    ],
    ["run", "nope.yaml"],
    ["convert", "nope", "{new}"],
    ["convert", "nope", "{new}", "--recipe", "nope.yaml"],
    ["sample", "--checkpoint", "nope"],
    ["evaluate", "--checkpoint", "nope"],
    ["reproduce", "L-MRAR", *FILES],
    ["compare", "nope"],
    ["report", "nope"],
    ["sweep", "nope.yaml"],
    ["export", "nope"],
    ["plan", "nope.yaml", "--gpus", "8", "--gpu", "h100"],
    ["doctor", "--shards", "nope"],
]
SCRIPT = f"""
import json, sys
import lit_transdiff
found = {{"import": [0, {LOADED}]}}
from lit_transdiff.__main__ import main
for words in json.loads(sys.argv[1]):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    found[" ".join(words)] = [status, {LOADED}]
print(json.dumps(found), file=sys.stderr)
"""


def test_help_and_wrong_paths_are_answered_before_the_large_libraries_are_loaded(tmp_path):
    words = [["--help"], ["train", "--help"], ["settings"], ["train", "--nope"]]
    words += [[word.format(new=tmp_path / "new") for word in command] for command in WRONG]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)], cwd=ROOT, capture_output=True, text=True
    )
    *messages, last = ran.stderr.splitlines()
    found = json.loads(last)
    assert len(found) == 1 + len(words)
    assert {command: loaded for command, (_, loaded) in found.items() if loaded} == {}
    assert [status for status, _ in found.values()] == [0] * 4 + [2] * (1 + len(WRONG))
    assert len([line for line in messages if "nope" in line]) >= len(WRONG)
    assert "Traceback" not in ran.stderr and not (tmp_path / "new").exists()


def test_a_public_name_is_the_object_of_its_module():
    for name, module in (lit_transdiff.PUBLIC | lit_transdiff.TABLES).items():
        value = getattr(lit_transdiff, name)
        home = sys.modules[f"lit_transdiff.{module}"]
        assert value is getattr(home, name, home)
        assert value.__doc__, name
    assert lit_transdiff.__all__ == [*lit_transdiff.PUBLIC, *lit_transdiff.TABLES]
    assert {*lit_transdiff.__all__} <= {*dir(lit_transdiff)}
    with pytest.raises(AttributeError, match="no attribute 'Transdiff'"):
        _ = lit_transdiff.Transdiff


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse((ROOT / "lit_transdiff/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        (alias.asname, node.module)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {
        name: f"lit_transdiff.{module}"
        for name, module in (lit_transdiff.PUBLIC | lit_transdiff.TABLES).items()
    }
    assert told == {
        (name, home.removesuffix(f".{name}") if name == "plots" else home) for name, home in homes.items()
    }


def test_the_page_of_the_public_names_is_current():
    assert (ROOT / "docs/api.md").read_text() == page(), "python -m lit_transdiff.cli.api > docs/api.md"
    for name in lit_transdiff.PUBLIC:
        assert f"## `{name}`" in page()


def test_the_quickstart_imports_from_the_front_door_alone():
    book = json.loads((ROOT / "notebooks/1_quickstart.ipynb").read_text())
    lines = [
        line
        for cell in book["cells"]
        if cell["cell_type"] == "code"
        for line in cell["source"]
        if "lit_transdiff" in line
    ]
    (line,) = [line for line in lines if "import" in line]
    assert line.startswith("from lit_transdiff import ")
    assert {*line.strip().removeprefix("from lit_transdiff import ").split(", ")} <= {*lit_transdiff.PUBLIC}
