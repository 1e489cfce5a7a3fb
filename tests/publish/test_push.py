"""From an export to the Hub and back: the same images by ``hf://``, and by diffusers, and an honest card."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import ModelCard, constants
from PIL import Image
from torch import Tensor

from lit_transdiff import TransDiffPipeline, load_generator, push, train
from lit_transdiff.__main__ import main
from lit_transdiff.base.files import short_hash
from lit_transdiff.base.hub import pinned
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.checkpoints.run_folder import starts
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import load_run
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.training.build import build
from tests.helpers.hub_stub import HubStub
from tests.helpers.small import FASHION, ROOT, small_run

MODEL = FASHION / "one_step"
TRAINED = read_export(MODEL).info
AUTOENCODER = "hf://lab/fashion/run/export/autoencoder"
PLACE = "hf://lab/fashion"
SCORES = {"frechet_distance": 0.25, "inception_score": {"mean": 2.0, "std": 0.1}, "judge/precision": 0.5}
MANIFEST = {
    "run": "one_step",
    "sampling": {"solver": "heun", "num_steps": 6, "guidance_scale": 2.5},
    "date": "2026-01-01",
    "num_images": 2000,
    "seed": 0,
    "label_mode": "balanced",
    "extractor": "classifier",
    "extractor_fingerprint": "0123",
    "reference": "/home/me/runs/fashion/reference.npz",
    "reference_hash": "4567",
    "precision": "float32",
    "weights_fingerprint": short_hash(MODEL / "model.safetensors"),
}


def quiet(text: str) -> None:
    """No output."""


def user_folder(folder: Path) -> Path:
    """A folder with two results of the bundled model, one of them of other weights."""
    results = folder / "runs/bundled/one_step/evaluations"
    results.mkdir(parents=True)
    for name, change in {"mine": {}, "others": {"weights_fingerprint": "0", "num_images": 50_000}}.items():
        (results / f"{name}.json").write_text(json.dumps({"scores": SCORES, "manifest": MANIFEST | change}))
    return folder


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStub]:
    """A Hub to which the bundled model was pushed."""
    with pytest.MonkeyPatch.context() as patch, HubStub() as hub:
        hub.used_by(patch, tmp_path_factory.mktemp("push"))
        patch.chdir(user_folder(tmp_path_factory.mktemp("user")))
        place = push(MODEL, "lab/fashion", private=True, say=quiet)
        assert place == f"{PLACE}@{hub.repos['model', 'lab/fashion'].branches['main']}"
        yield hub


@pytest.fixture
def hub(pushed: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The same Hub, with an empty cache and in an empty folder."""
    before = {key: (dict(repo.commits), dict(repo.branches)) for key, repo in pushed.repos.items()}
    pushed.used_by(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    yield pushed
    pushed.trouble = None
    for key in [*pushed.repos]:
        if key not in before:
            del pushed.repos[key]
        else:
            pushed.repos[key].commits, pushed.repos[key].branches = before[key]
    assert pushed.unknown == []


def images_of(place: str | Path, seed: int = 5) -> Tensor:
    return load_generator(place).images([0, 7], [seed, seed + 1])


def test_a_repository_has_the_export_its_autoencoder_and_the_scores_of_its_weights(hub: HubStub):
    repo = hub.repos["model", "lab/fashion"]
    assert repo.private and repo.messages == [f"lit_transdiff: one_step, step {TRAINED['step']:,}"]
    assert set(repo.files) == {
        *(
            ".gitattributes",
            "README.md",
            "samples.png",
            "model_index.json",
            "pipeline.py",
            "run/trained_run.py",
        ),
        *(f"run/export/{name}" for name in ("config.yaml", "export.json", "model.safetensors")),
        *(f"run/export/autoencoder/{file.name}" for file in (FASHION / "autoencoder").iterdir()),
        "run/evaluations/mine.json",
    }
    assert repo.files["run/export/model.safetensors"] == (MODEL / "model.safetensors").read_bytes()


def test_the_card_says_what_was_trained_and_how_it_was_scored(hub: HubStub, tmp_path: Path):
    files = hub.repos["model", "lab/fashion"].files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "frechet_distance": 0.25,
        "inception_score": 2.0,
        "precision": 0.5,
    }
    conditions = results["frechet_distance"].metric_args
    assert (conditions["num_images"], conditions["extractor"]) == (2000, "classifier")
    assert results["inception_score"].metric_args["std"] == 0.1
    assert results["frechet_distance"].dataset_name == "reference.npz (4567)"  # not where it is on a machine
    for text in (
        "2,000 images (balanced labels, seed 0)",
        f"{TRAINED['images_seen']:,}",
        f"{TRAINED['step']:,} of 64 rows",
        "ema 0.99",
        "t-shirt",
    ):
        assert text in card.text, text
    assert "Frechet distance ↓ | 0.25" in card.text and "/home/me" not in card.text
    assert Image.open(write(tmp_path / "samples.png", files["samples.png"])).size[0] > 300


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def test_the_command_of_the_card_draws_its_picture(hub: HubStub, tmp_path: Path):
    files = hub.repos["model", "lab/fashion"].files
    (command,) = re.findall(r"^lit-transdiff (.+)$", files["README.md"].decode(), flags=re.MULTILINE)
    assert main(shlex.split(command)) == 0
    drawn = tmp_path / "runs/hub/lab/fashion/samples/drawn/grid.png"
    assert np.array_equal(
        np.array(Image.open(drawn)), np.array(Image.open(write(Path("s.png"), files["samples.png"])))
    )


def test_the_same_images_come_back_also_where_the_model_was_not_made(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
):
    expected = images_of(MODEL)
    monkeypatch.setattr("lit_transdiff.config.checks.roots", lambda: ())  # nothing is bundled there
    assert torch.equal(images_of(PLACE), expected)
    export = read_export(pinned(PLACE))
    assert export.run.autoencoder.path == str(export.folder / "autoencoder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(images_of(PLACE), expected)


def test_diffusers_draws_the_images_of_sample(hub: HubStub, tmp_path: Path):
    options = ["--classes", "0,7", "--per-class", "2", "--seed", "3", "--output", "drawn"]
    assert main(["sample", "--checkpoint", str(MODEL), *options]) == 0
    expected = [np.array(Image.open(file)) for file in sorted(Path("drawn").rglob("seed*.png"))]
    of_hub = DiffusionPipeline.from_pretrained("lab/fashion", trust_remote_code=True)
    of_hub.save_pretrained("again")
    pipelines = {
        "diffusers, the Hub": of_hub,
        "diffusers, a folder": DiffusionPipeline.from_pretrained("again", trust_remote_code=True),
        "ours, a folder": TransDiffPipeline.from_pretrained(MODEL),
        "ours, the Hub": TransDiffPipeline.from_pretrained("lab/fashion", revision="main"),
    }
    for name, pipeline in pipelines.items():
        images = pipeline(["t-shirt", 7], per_class=2, seed=3).images
        assert all(np.array_equal(one, two) for one, two in zip(images, expected, strict=True)), name
    pipeline = pipelines["ours, a folder"].to("cpu")
    numbers = pipeline([7], per_class=2, seed=3, output_type="np", return_dict=False)[0]
    assert np.allclose(numbers[..., 0] * 255, np.stack(expected[2:]), atol=0.51) and numbers.shape == (
        2,
        32,
        32,
        1,
    )
    other = pipeline(
        7, per_class=2, seed=3, num_inference_steps=2, guidance_scale=1.0, output_type="pt"
    ).images
    assert other.shape == (2, 1, 32, 32) and not np.allclose(other[:, 0], numbers[..., 0])
    with pytest.raises(
        ValueError, match=r"setting of sampling: 'num_step' is not known. Did you mean 'num_steps'"
    ):
        pipeline(num_step=3)
    with pytest.raises(ValueError, match=r"again holds .*Nothing is overwritten"):
        pipeline.save_pretrained("again")


def test_every_new_export_is_a_pipeline_of_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = small_run(tmp_path, training={"max_steps": 2, "sample_every": 0})
    train(run, say=quiet)
    pipeline = DiffusionPipeline.from_pretrained(run.folder / "export", trust_remote_code=True)
    images = pipeline([1], per_class=1, seed=2, output_type="pt").images
    ours = TransDiffPipeline.from_pretrained(run.folder)([1], per_class=1, seed=2, output_type="pt").images
    assert torch.equal(images, ours)


@pytest.mark.parametrize("stage", ["autoencoder", "judge"])
def test_what_a_preparatory_stage_trained_is_used_from_the_hub(
    hub: HubStub, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
):
    run = preparatory_run(tmp_path / "runs", stage)
    train(run, say=quiet)
    assert main(["export", str(run.folder), "--hub", "lab/prepared", "--license", "cc0-1.0"]) == 0
    repo, place = hub.repos["model", "lab/prepared"], capsys.readouterr().out.split()[-1]
    assert place == f"hf://lab/prepared@{repo.branches['main']}"
    export = run.folder / "export"
    assert set(repo.files) == {".gitattributes", "README.md", *(file.name for file in export.iterdir())}
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.license, card.data.tags) == ("cc0-1.0", ["lit-transdiff", stage])
    used = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)[0])
    assert "val/" in card.text and "1 of 4 rows" in card.text
    if stage == "autoencoder":
        there = load_autoencoder(**used["autoencoder"], image_channels=1)
        assert there.fingerprint == load_autoencoder("kl", export, 1).fingerprint
        model = AutoencoderKL.from_pretrained("lab/prepared")
        assert model.config.latents_mean == pytest.approx(there.latents_mean.flatten().tolist())
    else:
        there = load_extractor(stage, used["evaluation"]["extractor_weights"])
        assert there.fingerprint == load_extractor(stage, export / "judge.safetensors").fingerprint
        with pytest.raises(
            FileNotFoundError, match=r"extractor_weights: hf://lab/prepared does not exist; exp"
        ):
            load_extractor("classifier", "hf://lab/prepared")
    assert main(["export", str(run.folder), "--step", "1"]) == 2
    assert f"one of stage {stage} has no other model" in capsys.readouterr().err
    (export / "config.yaml").write_text("name: other")
    assert "config.yaml" in refusal(hub, capsys, "--hub", "lab/prepared", run=export)


def preparatory_run(folder: Path, stage: str) -> RunConfig:
    """A run of one step of a preparatory stage."""
    training = {"max_steps": 1, "sample_every": 0, "global_batch_size": 4, "num_validation_samples": 4}
    small = {"block_channels": [8, 8], "latent_channels": 2, "norm_groups": 4, "num_statistics_images": 4}
    return small_run(
        folder, stage=stage, training=training, optimizer={"warmup_steps": 0}, autoencoder_training=small
    )


def test_a_second_upload_replaces_the_export_and_keeps_the_rest(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
):
    repo = hub.repos["model", "lab/fashion"]
    repo.commit({**repo.files, "notes.md": b"mine", "run/export/left_over.safetensors": b"old"})
    monkeypatch.setattr("lit_transdiff.publish.push.picture_by", lambda generator: b"picture")
    place = push(MODEL, "lab/fashion", revision="next", licence="cc-by-4.0", say=quiet)
    new = repo.commits[repo.branches["next"]]
    assert place == f"{PLACE}@{repo.branches['next']}" and "notes.md" in new
    assert "run/export/left_over.safetensors" not in new
    assert "license: cc-by-4.0" in new["README.md"].decode() and "None yet." in new["README.md"].decode()
    assert "run/export/left_over.safetensors" in repo.files  # the other branch is as it was


def refusal(hub: HubStub, capsys: pytest.CaptureFixture[str], *options: str, run: Path = MODEL) -> str:
    """The line of a refused ``export``, which has drawn and uploaded nothing."""
    before = len(hub.downloads), {key: len(repo.commits) for key, repo in hub.repos.items()}
    assert main(["export", str(run), *options]) in (1, 2)
    assert before == (len(hub.downloads), {key: len(repo.commits) for key, repo in hub.repos.items()})
    printed = capsys.readouterr()
    assert "drawing" not in printed.out
    return printed.err.strip().splitlines()[-1]


def test_refusals_come_before_any_work(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    hub.add("lab/theirs", {"model.bin": b"theirs"})
    told = {
        ("--hub", "lab/theirs"): "hf://lab/theirs holds model.bin, which push did not write",
        (
            "--hub",
            "lab/theirs",
            "--private",
        ): "--private: got 'lab/theirs'; allowed: a repository that is private",
        ("--hub", "fashion"): "--hub: got 'hf://fashion'; allowed: ",
        ("--hub", "others/fashion"): "hf://others/fashion: the token that is used is not allowed to: ",
        ("--private",): "--private: got True; allowed: only with --hub.",
    }
    for options, line in told.items():
        assert line in refusal(hub, capsys, *options)
    hub.trouble = 500
    assert "answers 500" in refusal(hub, capsys, "--hub", "lab/fashion")
    hub.trouble = 0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    assert "does not answer" in refusal(hub, capsys, "--hub", "lab/fashion")
    hub.trouble = None
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 10)
    assert "the token is not valid (hf auth login" in refusal(hub, capsys, "--hub", "lab/fashion")
    monkeypatch.delenv("HF_TOKEN")
    assert "after logging in only: hf auth login" in refusal(hub, capsys, "--hub", "lab/fashion")


def run_from_hub(folder: Path) -> RunConfig:
    """A run of one step that starts from the pushed model, with the autoencoder beside it."""
    model = load_run(MODEL / "config.yaml").model
    names = (
        "size",
        "encoder_blocks",
        "latent_channels",
        "latent_size",
        "patch_size",
        "num_class_tokens",
        "num_context_tokens",
    )
    training = {"max_steps": 1, "sample_every": 0, "global_batch_size": 4, "num_validation_samples": 4}
    return small_run(
        folder,
        autoencoder={"path": AUTOENCODER, "kind": "kl"},
        init_from=PLACE,
        model={name: getattr(model, name) for name in names},
        optimizer={"warmup_steps": 0},
        training=training,
    )


def test_a_run_records_the_commits_and_goes_on_with_them(hub: HubStub, tmp_path: Path):
    run = run_from_hub(tmp_path / "runs")
    train(run, say=quiet)
    commit = hub.repos["model", "lab/fashion"].branches["main"]
    (start,) = starts(run.folder)
    tail = "/run/export/autoencoder"
    assert start["hub"] == {PLACE: f"{PLACE}@{commit}", AUTOENCODER: f"{PLACE}@{commit}{tail}"}
    saved = load_run(run.folder / "config.yaml")
    assert (saved.init_from, saved.autoencoder.path) == (f"{PLACE}@{commit}", f"{PLACE}@{commit}{tail}")
    hub.add("lab/fashion", {"notes.md": b"the branch has moved"})
    hub.trouble = 500  # and the Hub is down
    assert build(run).run == saved
    assert train(run, say=quiet).step == 1
    assert torch.isfinite(images_of(run.folder)).all()
    hub.trouble = None
    (run.folder / "environment.json").unlink()
    with pytest.raises(ValueError, match=rf"other settings .*init_from: '{PLACE}@{commit}' there, '{PLACE}@"):
        build(run)


def test_weights_of_extractors_and_autoencoders_come_from_the_hub(hub: HubStub):
    hub.add("lab/extractors", {"classifier.safetensors": (FASHION / "classifier.safetensors").read_bytes()})
    ours = load_extractor("classifier", FASHION / "classifier.safetensors")
    assert (
        load_extractor("classifier", "hf://lab/extractors/classifier.safetensors").fingerprint
        == ours.fingerprint
    )
    there = load_autoencoder("kl", AUTOENCODER, 1)
    assert there.fingerprint == load_autoencoder("kl", FASHION / "autoencoder", 1).fingerprint
    assert main(["convert", AUTOENCODER, "kl.ckpt"]) == 0 and Path("kl.ckpt").is_file()


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs/hub.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_page(hub: HubStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(ROOT / "experiments/fashion", tmp_path / "experiments/fashion")
    hub.repos.clear()
    commands = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert "initialised from" in capsys.readouterr().out
    assert sorted(Path("runs/hub").rglob("seed*.png"))


@pytest.mark.parametrize("number", range(3))
def test_the_python_of_the_page(hub: HubStub, number: int):
    exec(blocks("python")[number], {})
