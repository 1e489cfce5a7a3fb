"""The seam: outside of models, their settings and released files, no file names a family."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_transdiff.config import PARADIGMS
from lit_transdiff.models.paradigm import build_model
from tests.helpers.small import ROOT

PACKAGE = ROOT / "lit_transdiff"
# models; TransDiff's released files; the public names of the package; settings
OWN = ("models/", "released/", "__init__.py", "config/paradigms.py")
SETTINGS = tuple(family.settings.__module__.replace(".", "/") + ".py" for family in PARADIGMS.values())
OTHERS = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.relative_to(PACKAGE).as_posix().startswith(OWN) and not path.as_posix().endswith(SETTINGS)
]


@pytest.fixture(scope="module")
def parts() -> set[str]:
    """Names of what the networks consist of; ``blocks`` is the name of many a thing."""
    with torch.device("meta"):
        networks = [build_model(family.settings(size="test")) for family in PARADIGMS.values()]
    return {name for network in networks for name, _ in network.named_children()} - {"blocks"}


def words_of(path: Path) -> Iterator[str]:
    """Strings in the code of a file, and the modules that it imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_no_file_outside_models_names_a_family(parts: set[str]):
    modules = {family.network.partition(":")[0] for family in PARADIGMS.values()}
    assert len(PARADIGMS) >= 5 and {"encoder", "decoder", "diffloss", "final_layer"} <= parts
    named = {
        f"{path.relative_to(PACKAGE)}: {word!r}"
        for path in OTHERS
        for word in words_of(path)
        if word in PARADIGMS or word in modules or word.startswith(tuple(f"{part}." for part in parts))
    }
    assert not named
