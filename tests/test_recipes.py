"""Every recipe and pipeline that is shipped."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path

import pytest
from lightning.fabric import Fabric
from PIL import Image

from lit_transdiff.__main__ import main, parse
from lit_transdiff.cli.pipeline import dry_run, farewell, load_pipeline, run_pipeline
from lit_transdiff.config import SIZES, ModelConfig, check_effects
from lit_transdiff.config.loading import load_run, read_yaml, run_from
from lit_transdiff.data.pack import pack
from lit_transdiff.tracking.place import flattened
from tests.helpers.small import ROOT, small_run

OTHERS = ("launch", "studies", "sweeps")  # these files have tests of their own
YAML = sorted(file for file in (ROOT / "experiments").rglob("*.yaml") if file.parent.name not in OTHERS)
PIPELINES = [path for path in YAML if "runs" in read_yaml(path)]
RECIPES = [path for path in YAML if path not in PIPELINES]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_is_valid(path: Path):
    run = load_run(path)
    assert run == run_from(read_yaml(path))
    check_effects(run)


@pytest.mark.parametrize("path", RECIPES + PIPELINES, ids=name)
def test_a_recipe_says_what_it_is(path: Path):
    assert path.read_text().startswith("# "), "the first line of a recipe is a comment that says what it is"


@pytest.mark.parametrize("path", [p for p in PIPELINES if "fashion" in str(p)], ids=name)
def test_a_pipeline_dry_runs_and_writes_nothing(path: Path, tmp_path: Path):
    said: list[str] = []
    pipeline, runs = load_pipeline(path, [f"output_dir={tmp_path / 'runs'}"])
    dry_run(runs, pipeline, said.append)
    assert sum("parameters  " in text for text in said) == len(runs) == len(read_yaml(path)["runs"])
    assert not (tmp_path / "runs").exists()


def test_a_pipeline_that_trains_its_own_autoencoder_dry_runs(tmp_path: Path):
    """The template for one's own folder, with bundled shards in the place of the user's."""
    said: list[str] = []
    own = [
        f"output_dir={tmp_path}",
        "data.image_size=32",
        "model.latent_size=8",
        "model.num_classes=10",
        "data.image_channels=1",
    ]
    pipeline, runs = load_pipeline(ROOT / "experiments/folder/pipeline.yaml", own)
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "evaluation"):
        (shards / split).symlink_to(ROOT / "data/fashion" / split)
    dry_run(runs, pipeline, said.append)
    assert sum("parameters  " in text for text in said) == len(runs) == 4


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (
            {"ant": 8, "bee": 8},
            {"ant": 2, "bee": 2},
            r"mrar_finetune: data\.evaluation: no class of .* more than 2 images",
        ),
        (
            {"ant": 8, "bee": 3},
            {"ant": 4, "bee": 4},
            r"mrar_finetune: model\.num_references: got 4, but class 'bee' .* only 3",
        ),
        (
            {"ant": 8, "bee": 8},
            {"ant": 4, "cat": 4},
            r"classifier: data\.evaluation: .* got class 1 'cat'; allowed: 'bee'",
        ),
        ({"ant": 8, "bee": 8}, {"ant": 4, "bee": 1}, ""),
    ],
)
def test_a_pipeline_looks_at_its_images_before_the_first_stage(
    train: dict, held_out: dict, message: str, tmp_path: Path
):
    for split, classes in (("train", train), ("evaluation", held_out)):
        for label, count in classes.items():
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
        pack(tmp_path / "photos" / split, tmp_path / "shards" / split, progress=False)
    own = [
        f"output_dir={tmp_path}",
        "data.image_size=16",
        "model.latent_size=4",
        "model.num_context_tokens=16",
    ]
    pipeline, runs = load_pipeline(ROOT / "experiments/folder/pipeline.yaml", own)
    if message:
        with pytest.raises(ValueError, match=message):
            dry_run(runs, pipeline, str)
        with pytest.raises(ValueError, match=message):
            run_pipeline(pipeline, runs, Fabric(accelerator="cpu", devices=1))
    else:
        dry_run(runs, pipeline, str)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "shards"}


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_output_dir_moves_everything_that_a_pipeline_makes(path: Path):
    def paths(output: str) -> list[str]:
        pipeline, runs = load_pipeline(path, [f"output_dir={output}"])
        settings = [flattened(dataclasses.asdict(run)) for run in runs]
        own = [pipeline.output_dir, pipeline.reference_images, *(step.source for step in pipeline.cache)]
        return [
            value
            for value in (*own, *(v for s in settings for v in s.values()))
            if isinstance(value, str) and "/" in value
        ]

    shipped = str(read_yaml(path)["output_dir"])
    stays = [value for value in paths("/else/where") if not value.startswith("/else/where")]
    assert all(value.startswith("data/") for value in stays), stays
    assert [value.replace("/else/where", shipped) for value in paths("/else/where")] == paths(shipped)


def test_what_a_pipeline_refers_to_is_there(tmp_path: Path):
    (tmp_path / "pipeline.yaml").write_text("reference_images: ${ouput_dir}/x\nruns: [{recipe: a.yaml}]")
    with pytest.raises(ValueError, match=r"pipeline\.yaml: reference_images: .*ouput_dir"):
        load_pipeline(tmp_path / "pipeline.yaml")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_references", [1, 4])
def test_every_size_fits_one_step_and_mrar(size: str, num_references: int):
    config = ModelConfig(size=size, num_references=num_references)
    assert config.tokens_per_reference * num_references == 256
    assert config.reference_patch_size == (2 if num_references == 4 else 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("runs[0].recipee: x", "recipe"),
        ("ouput_dir: x", "output_dir"),
    ],
)
def test_a_mistyped_pipeline_is_refused(tmp_path: Path, line: str, message: str):
    text = "runs: [{recipee: a.yaml}]" if "recipee" in line else line + "\nruns: []"
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"Did you mean '{message}'"):
        load_pipeline(tmp_path / "pipeline.yaml")


def test_a_pipeline_for_several_devices_asks_for_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    devices = [f"output_dir={tmp_path / 'runs'}", "distributed.devices=2"]
    assert main(["run", "experiments/fashion/pipeline.yaml", *devices]) == 2
    assert (
        "got 2; allowed: the 1 that this command runs in (torchrun starts several)" in capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()


def test_a_recipe_is_no_pipeline():
    with pytest.raises(ValueError, match="is the recipe of one run; start it with: lit-transdiff train"):
        load_pipeline(ROOT / "experiments/fashion/ar_pretrain.yaml")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in (
        "pack",
        "index",
        "verify",
        "cache",
        "statistics",
        "train",
        "run",
        "sample",
        "evaluate",
        "compare",
    ):
        assert f"    {command}" in text


@pytest.mark.parametrize("classes", [1, 2, 10])
@pytest.mark.parametrize("program", ["bin/lit-transdiff", "lit_transdiff/__main__.py"])
def test_what_is_to_be_tried_next_works_for_the_classes_of_the_run(
    classes: int, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are read as the command line reads them; folders of several words are one."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.argv", [str(Path(program).absolute())])
    start = (
        ["bin/lit-transdiff"]
        if program.startswith("bin")
        else [os.path.relpath(sys.executable), "-m", "lit_transdiff"]
    )
    run = small_run(Path("my runs"), model={"num_classes": classes})
    commands = [
        shlex.split(line)
        for line in farewell(Path("my runs"), run).split("Try next:")[1].strip().splitlines()
    ]
    assert all(words[: len(start)] == start for words in commands)
    parsed = [parse(words[len(start) :]) for words in commands]
    started = [args.function.__name__.removesuffix("_command") for args in parsed]
    assert started == ["sample", *["sample"] * (classes > 1), "evaluate", "compare"]
    for args in parsed[:-2]:
        chosen = [int(number) for number in args.classes.split(",")]
        assert (
            args.checkpoint == str(run.folder)
            and max(chosen) < classes
            and len(set(chosen)) == min(classes, 2)
        )
    assert parsed[-1].folder == "my runs"
