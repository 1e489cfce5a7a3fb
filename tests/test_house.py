"""The rules of the house, checked on the source itself: who imports whom, one door for each library, sizes,
no loose ends.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.small import ROOT

PACKAGE = ROOT / "lit_transdiff"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# A room may import from rooms of earlier lines, and from itself; rooms of one line do not see each other.
ORDER = (
    ("base",),
    ("config", "kernels"),
    ("data", "models", "flow"),
    ("checkpoints",),
    ("sampling",),
    ("stages",),
    ("distributed", "evaluation"),
    ("released", "tracking", "planning"),
    ("study",),
    ("training", "publish"),
    ("sweep",),
    ("cli",),
    ("__main__",),
)
LAYERS = {room: layer for layer, rooms in enumerate(ORDER) for room in rooms}
MAX_FILE, MAX_FUNCTION = 300, 45  # lines, of at most 110 columns
# Files and functions that are longer since lines became shorter, each with its length: they may only shrink.
LONGER = {
    "cli/pipeline.py": 306,
    "data/index.py": 329,
    "models/autoencoder.py": 312,
    "released/convert.py": 316,
    "study/compare.py": 306,
    "study/plots.py": 309,
    "training/callbacks.py": 316,
    "__main__.py:add_data_commands": 47,
    "models/adapt.py:match": 54,
    "released/convert.py:convert": 48,
    "sampling/pictures.py:grid": 47,
}
DOORS = {
    "webdataset": {"data/shards.py", "data/stream.py"},
    "wandb": {"tracking/", "study/wandb_logs.py", "sweep/command.py"},
    "deepspeed": {"distributed/"},
    "torchmetrics": {"evaluation/"},
    "torch_fidelity": {"evaluation/"},
    "diffusers": {"models/autoencoder.py", "sampling/pipeline.py"},
    "huggingface_hub": {"base/hub.py", "publish/"},
    "omegaconf": {"config/loading.py"},
    "triton": {"kernels/"},
    "yaml": {"config/yaml_text.py"},
    "fsspec": {"base/remote.py"},
}
TWICE = {"log"}  # names that may be defined in two files: the logger of a module


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    if path == PACKAGE / "__init__.py":
        return
    room = room_of(path)
    assert room in LAYERS, f"{room} has no layer; add it to LAYERS"
    for name in imported(path):
        if name.startswith("lit_transdiff."):
            other = name.split(".")[1]
            allowed = other == room or LAYERS[other] < LAYERS[room]
            assert allowed, f"{path.relative_to(ROOT)} imports {name}: {room} stands below or beside {other}"


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str):
    users = {
        str(p.relative_to(PACKAGE))
        for p in FILES
        if any(name.split(".")[0] == library for name in imported(p))
    }
    assert all(any(user.startswith(door) for door in DOORS[library]) for user in users), users


def test_config_imports_no_torch():
    for path in FILES:
        assert room_of(path) != "config" or not any(
            name.split(".")[0] == "torch" for name in imported(path)
        ), path


def test_models_know_no_lightning_and_flow_knows_no_network():
    for path in FILES:
        if room_of(path) in ("models", "flow"):
            assert not any(name.split(".")[0] == "lightning" for name in imported(path)), path
        if room_of(path) == "flow":
            assert "nn" not in {
                n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
            }, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_code_is_documented_and_nothing_is_loose(path: Path):
    text, name = path.read_text(), str(path.relative_to(PACKAGE))
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or path.name == "__init__.py", "no module docstring"
    for pattern in (
        r"load_state_dict\([^)]*strict=False",
        r"\.cuda\(",
        r"\bTODO\b",
        r"\bFIXME\b",
        "NotImplementedError",
    ):
        assert not re.search(pattern, text), pattern
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"bare except in line {node.lineno}"
        )
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"class {node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno
            assert length <= LONGER.get(f"{name}:{node.name}", MAX_FUNCTION), (
                f"{node.name} has {length} lines"
            )
    assert text.count("\n") <= LONGER.get(name, MAX_FILE)


def defined(path: Path) -> set[str]:
    """Names of the functions, classes and constants at the top of a file."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return {name for name in names if not name.startswith("__")}


def test_no_docstring_begins_with_what():
    """A docstring names its subject."""
    for path in [*FILES, *TESTS, *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").split(" ")[0]
                assert first not in ("What", "Whatever"), f"{path}: {ast.get_docstring(node)}"


def test_a_name_is_defined_in_one_file():
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for name in defined(path):
            homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert not {name: files for name, files in twice.items() if name not in TWICE}
    assert set(TWICE) <= set(twice), f"defined once now, take it from TWICE: {set(TWICE) - set(twice)}"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_tests_share_nothing_but_helpers(path: Path):
    """Helpers of two test modules are in ``tests/helpers``."""
    for name in imported(path):
        assert name.split(".")[0] != "tests" or name.startswith("tests.helpers"), (
            f"{path.relative_to(ROOT)} imports {name}"
        )


def test_dependencies_stand_in_one_list():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    listed = {re.split(r"[><=;]", line)[0].strip().lower() for line in lines}
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    names |= {name: name.replace("_", "-") for name in ("torch_fidelity", "huggingface_hub")}
    standard = set(__import__("sys").stdlib_module_names) | {"lit_transdiff"}
    standard.add("triton")  # comes with torch where there is a GPU; without it the kernels are not used
    used = {name.split(".")[0] for path in FILES for name in imported(path)} - standard
    missing = {names.get(name, name) for name in used} - listed
    assert not missing, missing
