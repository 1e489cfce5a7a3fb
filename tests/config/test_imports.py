"""The user's own modules: they add to the tables before a name is looked up, and
errors in them are located.
"""

import re
import sys
from pathlib import Path

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.checkpoints.run_folder import last_checkpoint
from lit_transdiff.config.imports import import_modules
from lit_transdiff.config.loading import load_run, save_yaml
from lit_transdiff.flow.solvers import SOLVERS
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

IDEA = """
from lit_transdiff.flow.solvers import SOLVERS

def one_step(velocity, x, grid, draw, config):
    return x - velocity(x, grid[0])

SOLVERS["one_step"] = one_step
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tables: None) -> Path:
    """A folder with a package of the user's own, in which commands are given."""
    (tmp_path / "lab_of_test").mkdir()
    (tmp_path / "lab_of_test" / "ideas.py").write_text(IDEA)
    (tmp_path / "lab_of_test" / "broken.py").write_text("import os\nos.nothing()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_with_an_own_solver_trains_and_its_export_brings_the_module_back(lab: Path):
    run = small_run(
        lab, imports=["lab_of_test.ideas"], sampling={"solver": "one_step"}, training={"max_steps": 2}
    )
    save_yaml(run, lab / "recipe.yaml")
    assert load_run(lab / "recipe.yaml").imports == ["lab_of_test.ideas"]
    train(run, say=lambda text: None)
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None and checkpoint.training()["run"]["imports"] == ["lab_of_test.ideas"]
    del SOLVERS["one_step"], sys.modules["lab_of_test.ideas"]
    assert load_generator(run.folder).images([0], [0]).shape == (1, 1, 1, 32, 32)
    del SOLVERS["one_step"], sys.modules["lab_of_test.ideas"]
    (lab / "lab_of_test" / "ideas.py").unlink()
    with pytest.raises(
        ValueError, match=r"imports: 'lab_of_test\.ideas' cannot be imported: there is no module"
    ):
        load_generator(run.folder)


def test_an_import_of_the_command_line_is_kept_with_the_run(lab: Path, capsys: pytest.CaptureFixture[str]):
    save_yaml(small_run(lab, training={"max_steps": 2}), lab / "recipe.yaml")
    command = ["train", str(lab / "recipe.yaml"), "--dry-run", "sampling.solver=one_step"]
    assert main(command) == 2 and "'one_step' is not known" in capsys.readouterr().err
    assert main([*command, "--import", "lab_of_test.ideas"]) == 0
    assert "imports:\n- lab_of_test.ideas" in capsys.readouterr().out
    assert main(["settings", "sampling.solver", "--import", "lab_of_test.ideas"]) == 0
    assert "one_step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["lab_of_test.broken"],
            r"'lab_of_test\.broken' cannot be imported: AttributeError: .* \(.*broken\.py, line 2\)",
        ),
        (["lab_of_test.idea"], r"there is no module 'lab_of_test\.idea'"),
        (["lab of test"], r"imports: got 'lab of test'; allowed: a list of modules"),
        ("lab_of_test.ideas", r"imports: got 'lab_of_test\.ideas'; allowed: a list of modules"),
        ([3], r"imports: got 3; allowed: a list of modules"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(lab: Path, names: list, message: str):
    with pytest.raises(ValueError, match=message):
        import_modules(names)
    (lab / "recipe.yaml").write_text(f"imports: {names}\n")
    assert main(["train", "recipe.yaml"]) == 2


def test_every_command_takes_imports(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert {"train", "pack", "sweep", "report"} <= {*commands}
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--import MODULE" in capsys.readouterr().out, command
