"""The documents: Python runs, commands parse, and the settings, options, files and headings that they name
exist.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lit_transdiff import train
from lit_transdiff.__main__ import parse
from lit_transdiff.cli import commands, studies
from lit_transdiff.cli.own_package import write_package
from lit_transdiff.config.reference import all_settings, family_settings
from tests.helpers.documents import CURRENT, DOCUMENTS, check_command, name
from tests.helpers.run_folders import make_run
from tests.helpers.small import ROOT, small_run

RECIPES = [file for file in sorted((ROOT / "experiments").rglob("*.yaml")) if file.parent.name != "launch"]
FUNCTIONS = [name for name in {**vars(commands), **vars(studies)} if name.endswith("_command")]
COMMANDS = [function.removesuffix("_command") for function in FUNCTIONS]
OF_OTHERS = ("--max_restarts", "--nproc_per_node", "--array")  # options of torchrun and sbatch
SUFFIXES = (
    "py",
    "md",
    "yaml",
    "csv",
    "json",
    "jsonl",
    "npz",
    "safetensors",
    "zip",
    "html",
    "pickle",
    "sh",
    "png",
    "txt",
    "pth",
    "ckpt",
)
# in the test of a block
TINY = {"/usr/share/datasets/fashion-mnist": "idx", "limit=4000": "limit=40", "limit=2000": "limit=20"}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def python_blocks() -> Iterator[object]:
    """But those of ``extending.md`` and ``hub.md``, which have tests of their own, and the signatures of
    ``api.md``, which are no programs.
    """
    for path in DOCUMENTS:
        for number, code in enumerate(blocks(path, "python")):
            if path.name not in ("extending.md", "hub.md") and (path.name != "api.md" or "import " in code):
                yield pytest.param(code, id=f"{name(path)}-{number}")


def write_idx(folder: Path, split: str, count: int) -> None:
    """Black images of 28 x 28 pixels in the layout of MNIST, evenly over ten classes."""
    images, labels = np.zeros((count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
    for array, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
        header = np.array([0x0800 + array.ndim, *array.shape], ">i4")
        (folder / f"{split}-{kind}-ubyte").write_bytes(header.tobytes() + array.tobytes())


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after the demo and a sweep, with the files of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("user")
    mrar = {
        "stage": "mrar_finetune",
        "model": {"num_references": 4},
        "training": {"max_steps": 2, "sample_every": 0},
    }
    train(small_run(folder / "runs/fashion-fast", name="mrar_finetune", **mrar), say=lambda text: None)
    for draws, seed in itertools.product((1, 2), (0, 1)):
        flow = {"num_noise_draws": draws}
        make_run(folder / "runs/sweeps/noise_draws", f"{draws}-{seed}", 2.0 + seed, seed=seed, flow=flow)
    (folder / "idx").mkdir()
    write_idx(folder / "idx", "train", 40)
    write_idx(folder / "idx", "t10k", 20)
    return folder


@pytest.mark.parametrize("code", python_blocks())
def test_python_runs(user: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.chdir(user)
    for shown, tiny in TINY.items():
        code = code.replace(shown, tiny)
    exec(code, {})


def command_lines(path: Path) -> list[str]:
    """The ``lit-transdiff`` lines of a document's code blocks and of a recipe's header, with continuation
    lines joined.
    """
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(blocks(path, "(?:bash|sh|console)?"))
    text = re.sub(r"\\\n#?\s*", " ", text)
    return [
        m.group(1)
        for m in re.finditer(r"^(?:#\s+|\$ )?(?:.*?-m\s)?(lit[-_]transdiff .*)$", text, flags=re.MULTILINE)
    ]


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("<folder with the IDX files>", "IDX"), comments=True)[1:]


@pytest.fixture
def my_lab(tmp_path: Path, fresh_tables: None) -> Path:
    """The folder in which ``lit-transdiff init my_lab`` and ``pip install -e my_lab`` were called."""
    write_package(tmp_path / "my_lab")
    sys.path.insert(0, str(tmp_path / "my_lab"))
    return tmp_path


@pytest.mark.usefixtures("my_lab")
@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES], ids=name)
def test_commands_parse_and_take_their_settings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in command_lines(path):
        check_command(parse(words_of(command)))


def test_commands_of_a_package_of_ones_own_parse(my_lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipe's data are there
    for command in command_lines(my_lab / "my_lab/README.md"):
        words = [
            str(my_lab / "my_lab" / word) if word.endswith(".yaml") else word for word in words_of(command)
        ]
        check_command(parse(words))


def test_the_yaml_of_a_document_is_that_of_its_file() -> None:
    shown = {
        name(path): block
        for path in DOCUMENTS
        for block in blocks(path, "yaml")
        if block.startswith("# experiments/")
    }
    assert shown
    for document, block in shown.items():
        first, rest = block.split("\n", 1)
        assert rest in (ROOT / first[2:]).read_text(), f"{document} shows another {first[2:]}"


def code_words(path: Path) -> list[str]:
    """The text in backquotes in a line, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+", " ", word).replace("\\|", "|") for word in re.findall(r"`([^`]+)`", text)]


@cache
def help_of(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        parse([command, "--help"])
    return text.getvalue()


@pytest.mark.parametrize("path", CURRENT, ids=name)
def test_commands_and_options_in_the_text_are_there(path: Path) -> None:
    scripts = (
        "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
        if path.parent.name == "benchmarks"
        else ""
    )
    for word in code_words(path):
        if command := re.match(r"lit-transdiff ([a-z]+)", word):
            assert command[1] in COMMANDS, word
        if command or word.startswith("--"):
            text = help_of(command[1]) if command else scripts + "".join(map(help_of, COMMANDS))
            for option in re.findall(r"(?:^|(?<= ))--[a-z_-]+", word):
                assert option in OF_OTHERS or re.search(rf"{option}(?![\w-])", text), word


@cache
def settings() -> set[str]:
    sections = [*all_settings().values(), *family_settings().values()]
    return {setting.name for section in sections for setting in section}


@cache
def sources() -> dict[str, str]:
    """The text of every file of code, by its path."""
    files = [
        file
        for place in ("lit_transdiff", "tests", "benchmarks", "experiments")
        for file in (ROOT / place).rglob("*.*")
    ]
    return {f"/{name(file)}": file.read_text() for file in files if file.suffix in (".py", ".sh", ".sbatch")}


@pytest.mark.parametrize("path", CURRENT, ids=name)
def test_settings_and_code_in_the_text_are_there(path: Path) -> None:
    sections = {setting.split(".")[0] for setting in settings() if "." in setting}
    for word in code_words(path):
        for file in re.findall(r"[\w/]+\.(?:py|sh|sbatch)\b", word):
            assert any(place.endswith(f"/{file}") for place in sources()), word
        for first, second in re.findall(r"(?<![\w./])([a-z_]+)\.(\w+)(?![\w/(])", word):
            modules = [text for place, text in sources().items() if place.endswith(f"/{first}.py")]
            if second not in SUFFIXES and first in sections:
                assert f"{first}.{second}" in settings(), word
            elif second not in SUFFIXES and modules and word == f"{first}.{second}":
                assert any(re.search(rf"\b{second}\b", text) for text in modules), word


def anchors(path: Path) -> set[str]:
    """The valid targets of links after ``#``: headings in GitHub's form."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_scripts_and_targets_that_a_document_names_are_there(path: Path) -> None:
    text = path.read_text()
    for file in re.findall(
        r"(?<![\w/.-])(?:experiments|benchmarks|notebooks|tests|docs|lit_transdiff)/[\w./-]*\w", text
    ):
        assert (ROOT / file).exists(), f"{path.name} names {file}"
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert targets is not None
    shown = "\n".join([*blocks(path, "bash"), *code_words(path)])
    for target in re.findall(r"^make ([a-z-]+)", shown, flags=re.MULTILINE):
        assert target in targets[1].split(), f"{path.name} names make {target}"


def test_the_readme_shows_the_two_commands_at_its_top() -> None:
    top = (ROOT / "README.md").read_text()[:1500]
    assert "make demo" in top and "make test" in top
