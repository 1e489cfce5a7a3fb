"""All three stages on real images through the command line: the demo with very little training."""

import csv
import io
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lit_transdiff.__main__ import main
from lit_transdiff.data.index import read_index
from lit_transdiff.data.shards import ShardReader
from tests.helpers.forks import PROGRAM, Forked, forked
from tests.helpers.small import ROOT

LITTLE = (
    "training.max_steps=8",
    "training.checkpoint_every=4",
    "training.log_every=4",
    "training.num_validation_samples=32",
    "sampling.num_steps=3",
    "evaluation.num_images=40",
    "optimizer.warmup_steps=2",
    "model.size=test",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pipeline leaves."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["run", "experiments/fashion/pipeline.yaml", f"output_dir={folder}", *LITTLE]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


STAGES = ("ar_pretrain", "diffusion_head", "mrar_finetune")


def test_every_stage_is_trained_sampled_and_scored(demo: Path):
    for stage in STAGES:
        assert (demo / stage / "export" / "model.safetensors").is_file()
        assert (demo / stage / "samples" / "final" / "grid.png").is_file()
        assert len(list((demo / stage / "samples" / "final").glob("class-*/seed-*.png"))) == 80
        (result,) = (demo / stage / "evaluations").glob("*.json")
        scores = json.loads(result.read_text())["scores"]
        assert set(scores) >= {
            "frechet_distance",
            "class_accuracy",
            "precision",
            "recall",
            "feature_diversity",
        }
    assert (demo / "mrar_finetune" / "samples" / "references" / "grid.png").is_file()


def test_the_comparison_holds_every_run(demo: Path):
    with open(demo / "comparison.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == set(STAGES)
    assert all(stage in (demo / "comparison.md").read_text() for stage in STAGES)
    assert Image.open(demo / "comparison.png").width > 1000


def test_wandb_runs_lie_in_the_run_folders(demo: Path):
    for stage in STAGES:
        assert list((demo / stage / "wandb").glob("offline-run-*/*.wandb"))


def test_the_same_command_again_does_nothing_twice(demo: Path, capsys: pytest.CaptureFixture[str]):
    files = {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")} | {
        path: path.stat().st_mtime_ns for path in demo.rglob("evaluations/*.json")
    }
    assert main(["run", "experiments/fashion/pipeline.yaml", f"output_dir={demo}", *LITTLE]) == 0
    assert capsys.readouterr().out.count("already trained to step 8") == 3
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_single_images_do_not_depend_on_how_many_are_drawn(demo: Path, tmp_path: Path):
    for per_class, name in ((1, "one"), (3, "three")):
        command = [
            "sample",
            "--checkpoint",
            str(demo / "mrar_finetune"),
            "--classes",
            "0,7",
            "--per-class",
            str(per_class),
        ]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
    image = "class-0007/seed-0000.png"
    one, three = (list(Image.open(tmp_path / name / image).getdata()) for name in ("one", "three"))
    assert max(abs(a - b) for a, b in zip(one, three, strict=True)) <= 1


def test_fusion_and_references_are_drawn(demo: Path, tmp_path: Path):
    command = ["sample", "--checkpoint", str(demo / "mrar_finetune"), "--classes", "1,7", "--per-class", "2"]
    command += ["--output", str(tmp_path / "drawn")]
    assert main([*command, "--fuse", "halves", "sampling.num_steps=2"]) == 0
    assert main([*command, "--references"]) == 0
    assert (tmp_path / "drawn/fusion.png").is_file()
    assert len(list((tmp_path / "drawn-2").glob("class-0001/*reference-2.png"))) == 2  # nothing is drawn over


def test_another_evaluation_stands_beside_the_first(demo: Path):
    before = len(list((demo / "ar_pretrain" / "evaluations").glob("*.json")))
    assert main(["evaluate", "--checkpoint", str(demo / "ar_pretrain"), "sampling.guidance_scale=1.0"]) == 0
    assert len(list((demo / "ar_pretrain" / "evaluations").glob("*.json"))) == before + 1


@pytest.mark.parametrize(
    "command, message",
    [
        (["sample", "--checkpoint", "{demo}/mrar"], "mrar_finetune"),
        (
            ["sample", "--checkpoint", "{demo}/ar_pretrain", "--classes", "12"],
            "--classes: got '12'; allowed: numbers 0 to 9",
        ),
        (["evaluate", "--checkpoint", "{demo}/ar_pretrain", "sampling.solver=hein"], "Did you mean 'heun'"),
        (
            ["evaluate", "--checkpoint", "{demo}/ar_pretrain", "model.width=3"],
            "override: got 'model'; allowed: sampling.*",
        ),
        (["compare", "{demo}/latents"], "latents"),
        (["train", "experiments/fashion/ar_pretrian.yaml"], "ar_pretrain.yaml"),
        (["run", "experiments/fashion/pipeline.yaml", "training.max_step=3"], "Did you mean 'max_steps'"),
        (["pack", "nowhere", "{demo}/packed"], "nowhere"),
        (["verify", "{demo}"], "index.json"),
    ],
)
def test_bad_commands_end_in_one_clear_line(
    demo: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
):
    assert main([part.format(demo=demo) for part in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lit-transdiff: ") and message in error


@pytest.mark.slow
def test_a_folder_of_colour_photographs_becomes_a_trained_and_scored_model(tmp_path: Path):
    """The README's steps for one's own images, with bundled ones written out as JPEG files of odd sizes."""
    index = read_index(ROOT / "data/fashion/evaluation")
    reader = ShardReader(index)
    for c in range(3):
        for split, samples in (("train", range(0, 24)), ("held-out", range(24, 36))):
            folder = tmp_path / "photos" / split / index.class_names[c]
            folder.mkdir(parents=True)
            for sample in [i for i in range(len(index)) if index.label[i] == c][samples.start : samples.stop]:
                image = Image.open(io.BytesIO(reader.read(sample))).convert("RGB").resize((40, 36))
                image.save(folder / f"{index.key_of(sample)}.jpg")
    runs = tmp_path / "runs"
    settings = Path(tmp_path / "pipeline.yaml")
    text = (ROOT / "experiments/folder/pipeline.yaml").read_text()
    settings.write_text(
        text.replace("runs/folder", str(runs)).replace("recipe: ", f"recipe: {ROOT}/experiments/folder/")
    )
    for split, dest in (("train", "train"), ("held-out", "evaluation")):
        assert (
            main(
                ["pack", str(tmp_path / "photos" / split), str(runs / "shards" / dest), "--image-size", "32"]
            )
            == 0
        )
    small = [
        "model.num_classes=3",
        "data.image_size=32",
        "model.latent_size=8",
        "model.num_context_tokens=16",
        "model.size=test",
    ]
    short = [
        f"training.{key}"
        for key in ("max_steps=4", "global_batch_size=8", "checkpoint_every=2", "log_every=2")
    ]
    rest = [
        "optimizer.warmup_steps=2",
        "evaluation.num_images=12",
        "sampling.num_steps=2",
        "tracking.wandb=false",
    ]
    assert main(["run", str(settings), *small, *short, *rest]) == 0
    with open(runs / "comparison.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"ar_pretrain", "mrar_finetune"}
    assert Image.open(runs / "mrar_finetune/samples/final/class-0002/seed-0001.png").mode == "RGB"


@pytest.mark.slow
def test_a_pipeline_killed_in_its_second_stage_ends_in_the_same_weights(tmp_path: Path):
    """SIGKILL while the second stage trains, then the same command: every weight as
    if nothing had happened.
    """
    settings = [*LITTLE, "training.max_steps=20", "tracking.wandb=false", "evaluation.num_images=20"]

    def start(name: str) -> Forked:
        place = f"output_dir={tmp_path / name}"
        pipeline = "experiments/fashion/pipeline.yaml"
        return forked(1, PROGRAM, "run", pipeline, place, *settings, log=tmp_path / f"{name}.log")

    assert start("whole").wait(600) == 0
    killed = start("killed")
    checkpoints = tmp_path / "killed" / "diffusion_head" / "checkpoints"
    while not list(checkpoints.glob("step-*/COMPLETE.json")):
        assert killed.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert not (tmp_path / "killed" / "diffusion_head" / "export").exists()
    assert start("killed").wait(600) == 0
    for stage in STAGES:
        whole, resumed = (
            load_file(tmp_path / name / stage / "export/model.safetensors") for name in ("whole", "killed")
        )
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), stage


@pytest.mark.slow
def test_the_stages_of_a_pipeline_share_a_process_and_equal_separate_starts(tmp_path: Path):
    """No program and no import begins anew between stages, and every weight and score is that of the commands
    of single steps, each in a process of its own.
    """
    settings = [*LITTLE, "training.max_steps=4", "tracking.wandb=false", "evaluation.num_images=20"]
    found, recipes = tmp_path / "found.json", "experiments/fashion"

    def start(name: str, *arguments: str, folder: str = "apart") -> Forked:
        place = f"output_dir={tmp_path / folder}"
        module = "tests.helpers.starts" if name == "together" else PROGRAM
        return forked(1, module, *arguments, place, *settings, log=tmp_path / f"{name}.log")

    command = [str(found), "run", f"{recipes}/pipeline.yaml"]
    assert start("together", *command, folder="together").wait(600) == 0
    heard = json.loads(found.read_text())
    assert [name for name, *_ in heard["stages"]] == [*STAGES]
    assert len({process for _, process, _ in heard["stages"]}) == 1
    assert not [text for text in heard["started"] if "python" in text or "fork" in text]
    second, third = ({*modules} for *_, modules in heard["stages"][1:])
    libraries = ("torch", "lightning", "numpy", "scipy", "pydantic", "webdataset", "PIL")
    assert not [name for name in third - second if name.startswith(libraries)]

    for source, dest, *flips in (("train", "train", "--flips"), ("evaluation", "evaluation")):
        shards, latents = f"data/fashion/{source}", str(tmp_path / "apart" / "latents" / dest)
        recipe = f"{recipes}/{STAGES[0]}.yaml"
        assert start(f"cache-{source}", "cache", recipe, shards, latents, *flips).wait(600) == 0
    reference = tmp_path / "apart" / "reference.npz"
    assert (
        start(
            "reference",
            "statistics",
            f"{recipes}/{STAGES[0]}.yaml",
            "data/fashion/evaluation",
            str(reference),
        ).wait(600)
        == 0
    )
    for stage in STAGES:
        assert start(stage, "train", f"{recipes}/{stage}.yaml", "--evaluate").wait(600) == 0
        one, other = (tmp_path / name / stage for name in ("together", "apart"))
        weights = [load_file(folder / "export/model.safetensors") for folder in (one, other)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), stage
        scores = [
            json.loads(next(folder.glob("evaluations/*.json")).read_text())["scores"]
            for folder in (one, other)
        ]
        assert scores[0] == scores[1]
