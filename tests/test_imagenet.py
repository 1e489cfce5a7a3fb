"""The ImageNet recipes and ``reproduce``, on tiny images of 1,000 classes and random weights of the released
layouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_transdiff.__main__ import main
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import load_run
from lit_transdiff.data.index import index_shards
from lit_transdiff.data.shards import ShardWriter
from lit_transdiff.evaluation.prepare import cache
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.convert import convert
from lit_transdiff.released.key_names import our_name, released_shapes
from lit_transdiff.training.build import outline
from lit_transdiff.training.trainer import train
from tests.helpers import plain_autoencoder
from tests.helpers.reference import FIXTURES
from tests.helpers.small import ROOT

FOLDERS = ("imagenet256", "imagenet512")
SHARED = ("data.yaml", "common.yaml", "ar.yaml", "mrar.yaml", "mar.yaml")
ALL = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / "experiments" / folder).glob("*.yaml"))
    if path.name not in SHARED
]
RECIPES = [path for path in ALL if load_run(path).model.paradigm == "transdiff"]
OTHERS = [path for path in ALL if path not in RECIPES]  # of other families
BASELINES = json.loads((ROOT / "experiments" / "baselines.json").read_text())["rows"]
# A copy of reduced width: all tokens and latents are as in the recipe, but one pixel of the image is one of
# the latent.
NARROW = ["model.width=16", "model.num_heads=2", "model.encoder_blocks=1", "model.decoder_blocks=1"]
NARROW_STACK = ["model.width=16", "model.num_heads=2", "model.num_blocks=1"]
NARROW_OTHERS = {
    "sit": NARROW_STACK,
    "dit": [*NARROW_STACK, "sampling.num_steps=2"],
    "acdit": [*NARROW_STACK, "sampling.num_steps=2"],
    "xar": [*NARROW, "sampling.num_steps=2"],
    "flowar": [*NARROW, "model.head_width=16", "model.head_blocks=1", "sampling.num_steps=2"],
    "ardiff": [*NARROW_STACK, "model.head_width=16", "model.head_blocks=1", "sampling.num_steps=2"],
    "mar": [
        *NARROW,
        "model.head_width=16",
        "model.head_blocks=1",
        "sampling.num_parts=2",
        "sampling.num_steps=2",
    ],
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def write_shards(folder: Path, num: int) -> Path:
    """``num`` tiny images, image i of class i modulo a quarter of that, under the names of 1,000 classes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with ShardWriter(folder / "train-000000.tar") as writer:
        for i in range(num):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (12, 10, 3), np.uint8)).save(buffer, "PNG")
            writer.write(f"{i:06d}", i % (num // 4), "png", buffer.getvalue())
    index_shards(folder, class_names=[str(c) for c in range(1000)], progress=False)
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 1,000 classes with four tiny images each, and autoencoders of 16 channels: of factor 16 and
    of factor 1.
    """
    folder = tmp_path_factory.mktemp("imagenet")
    write_shards(folder / "shards", 4000)
    for name, channels in (("autoencoder", (32,) * 5), ("same_size", (32,))):
        torch.save({"model": plain_autoencoder.make(latent=16, channels=channels)}, folder / f"{name}.ckpt")
        convert(folder / f"{name}.ckpt", folder / name, scaling_factor=1.0)
    return folder


def overrides(imagenet: Path, output: Path, autoencoder: str = "autoencoder") -> list[str]:
    data = [f"data.train={imagenet / 'shards'}", "data.num_workers=0", "tracking.wandb=false"]
    return [*data, f"autoencoder.path={imagenet / autoencoder}", f"output_dir={output}"]


def narrow(path: Path, imagenet: Path, output: Path, *more: str) -> RunConfig:
    """The recipe with less width, depth and length; precision, optimizer and token counts stay."""
    model = load_run(path).model
    few = NARROW_OTHERS.get(model.paradigm, NARROW)
    short = [
        "training.max_steps=1",
        "training.log_every=1",
        "optimizer.warmup_steps=1",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
    ]
    size = [f"data.image_size={model.latent_size}", "sampling.num_steps=1"]
    return load_run(path, [*overrides(imagenet, output, "same_size"), *short, *size, *few, *more])


@pytest.fixture(scope="module")
def start(imagenet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow one-step run of 256 px, from which others are fine-tuned."""
    first = narrow(
        ROOT / "experiments/imagenet256/ar_base.yaml",
        imagenet,
        tmp_path_factory.mktemp("start"),
        "training.precision=fp32",
    )
    return train(first, say=lambda text: None).folder


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_dry_runs_with_the_published_number_of_parameters(
    path: Path, imagenet: Path, tmp_path: Path
):
    run = load_run(path, overrides(imagenet, tmp_path))
    text = outline(run, earlier_outputs=[run.init_from] if run.init_from else [])
    counts = json.loads((FIXTURES / "state_dict_shapes.json").read_text())["param_counts"]
    kind = "mrar" if run.model.num_references > 1 else "onestep"
    released = counts.get(f"{kind}_{run.model.size}_{run.data.image_size}")
    with torch.device("meta"):
        total = sum(p.numel() for p in TransDiff(run.model).parameters())
    assert f"{total:,}" in text
    assert ("weights in bfloat16" in text) == (run.training.precision == "bf16-true")
    if released is None:
        assert name_of(path) == "imagenet512/mrar_large.yaml"  # not in the paper
    else:
        # the released one-step z_proj, which has no gradient
        dead = 17 * run.model.width if kind == "onestep" else 0
        assert total == released["total"] - dead


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_what_it_takes_and_what_to_expect(path: Path):
    text, run = path.read_text(), load_run(path)
    commands = (
        f"lit_transdiff train experiments/{name_of(path)}",
        f"lit_transdiff evaluate --checkpoint {run.folder}",
    )
    for part in (
        *commands,
        "64 A100: about",
        "Expected: FID" if "512/mrar" not in str(path) else "no expected score",
    ):
        assert part in text
    row = next((row for row in BASELINES.values() if row["recipe"] == name_of(path)), None)
    if row is not None:
        assert f"Expected: FID {row['fid']}, IS {row['inception_score']}" in text
        assert row["resolution"] == run.data.image_size
        released = 17 * run.model.width if run.model.num_references == 1 else 0
        with torch.device("meta"):
            assert row["parameters"] == sum(p.numel() for p in TransDiff(run.model).parameters()) + released
    assert (
        run.evaluation.num_images == 50_000
        and run.sampling.num_steps == 100
        and run.optimizer.gradient_clip == 3.0
    )


def test_every_published_row_has_its_recipe():
    assert {row["recipe"] for row in BASELINES.values()} | {"imagenet512/mrar_large.yaml"} == {
        name_of(path) for path in RECIPES
    }


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_a_recipe_of_another_family_dry_runs_and_says_its_size(path: Path, imagenet: Path, tmp_path: Path):
    text, run = path.read_text(), load_run(path, overrides(imagenet, tmp_path))
    with torch.device("meta"):
        total = sum(p.numel() for p in build_model(run.model).parameters() if p.requires_grad)
    assert f"{total:,}" in outline(run) and f"{round(total / 1e6)} M parameters" in text
    commands = (
        f"lit_transdiff train experiments/{name_of(path)}",
        f"evaluate --checkpoint {load_run(path).folder}",
    )
    assert all(part in text for part in (*commands, "ublished"))
    assert run.evaluation.num_images == 50_000


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_one_optimizer_step_of_a_narrow_copy(path: Path, imagenet: Path, start: Path, tmp_path: Path):
    """In the precision of the recipe; a fine-tuning starts from a narrow copy of what it starts from."""
    more = [f"init_from={start}", "init_positions=interpolate"] if load_run(path).init_from else []
    said: list[str] = []
    result = train(narrow(path, imagenet, tmp_path, *more), say=said.append)
    assert result.step == 1 and np.isfinite(result.metrics["train/loss"])
    assert all(value.isfinite().all() for value in read_export(result.folder).state.values())
    if "imagenet512" in str(path):
        assert any(
            "adapted: decoder.position (bicubic interpolation, [1, 256, 16] -> [1, 1024, 16])" in text
            for text in said
        )


@pytest.mark.parametrize("recipe", ["imagenet256/mrar_base.yaml", "imagenet512/head_large.yaml"])
def test_training_goes_on_from_released_weights(recipe: str, imagenet: Path, tmp_path: Path):
    """From the average of a released one-step file of 256 px, at step 0; MRAR on cached latents."""
    config = narrow(ROOT / "experiments/imagenet256/ar_base.yaml", imagenet, tmp_path)
    model, model_ema = (
        {k: 0.05 * torch.randn(shape) for k, shape in released_shapes(config.model).items()} for _ in "12"
    )
    args = argparse.Namespace(epochs=800)
    torch.save(
        {"model": model, "model_ema": model_ema, "epoch": 799, "optimizer": {}, "args": args},
        tmp_path / "released.pth",
    )
    convert(tmp_path / "released.pth", tmp_path / "start", autoencoder=imagenet / "same_size", recipe=config)
    more = [f"init_from={tmp_path / 'start'}", "training.precision=fp32", "optimizer.lr=1e-9"]
    multi = "mrar" in recipe
    if multi:
        data = dataclasses.replace(config.data, crop="center")
        fabric = Fabric(accelerator="cpu", devices=1)
        few = write_shards(tmp_path / "few", 16)
        cache(few, tmp_path / "latents", autoencoder=config.autoencoder, data=data, fabric=fabric, flips=True)
        more += [f"data.train={tmp_path / 'latents'}", "data.crop=center"]
    said: list[str] = []
    run = train(narrow(ROOT / "experiments" / recipe, imagenet, tmp_path, *more), say=said.append)
    assert run.step == 1
    state = read_export(run.folder).state
    changed = (
        {our_name(key) for key in ("z_proj.weight", "z_proj.bias", "mask_token")}
        if multi
        else {"decoder.position"}
    )
    names = {
        key: our_name(key)
        for key in model_ema
        if our_name(key) not in changed and not key.startswith("z_proj.")
    }
    assert all(torch.allclose(state[ours], model_ema[key], atol=1e-7) for key, ours in names.items())
    assert state.keys() == set(names.values()) | changed
    assert f"{len(names)} tensors copied" in "".join(said)
    if multi:
        repeated = model_ema["mask_token"].expand(1, 64, -1)
        assert torch.allclose(state["encoder.mask_tokens"], repeated, atol=1e-7)
    else:
        assert "newly made: decoder.position [1, 1024, 16], which was [1, 256, 16]" in "".join(said)


def released_files(folder: Path, recipe: RunConfig) -> None:
    """The files of a user, with random weights: checkpoint, autoencoder, InceptionV3,
    reference statistics.
    """
    state = {key: 0.05 * torch.randn(shape) for key, shape in released_shapes(recipe.model).items()}
    torch.save(
        {"model": state, "model_ema": state, "epoch": 39, "args": argparse.Namespace(mrar=True)},
        folder / "checkpoint-last.pth",
    )
    torch.save({"model": plain_autoencoder.make(latent=16, channels=(32,))}, folder / "kl16.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), folder / "inception.pth")
    np.savez(folder / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))


@pytest.mark.slow
def test_reproduce_from_released_files_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Reduced in width, steps and images; everything else as a lab starts it."""
    monkeypatch.chdir(ROOT)
    small = [
        *NARROW,
        "data.image_size=16",
        "sampling.num_steps=2",
        "evaluation.num_images=10",
        "evaluation.batch_size=5",
    ]
    released_files(tmp_path, load_run(ROOT / "experiments/imagenet256/mrar_large.yaml", small))
    names = {
        "weights": tmp_path,
        "vae": "kl16.ckpt",
        "inception": "inception.pth",
        "reference": "reference.npz",
    }
    files = [word for option, name in names.items() for word in (f"--{option}", str(tmp_path / name))]
    command = ["reproduce", "L-MRAR", *files, "--output", str(tmp_path / "out"), *small]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "TransDiff-L, MRAR, 256 x 256" in said and "1.49" in said and "282.2" in said
    assert "10 images, balanced labels, euler_maruyama 2 steps, guidance 1.3, scales 0.925 and 0.95" in said
    assert "not the paper's settings: model.width=16" in said
    assert main(command) == 0  # everything is there: nothing is converted or drawn again
    assert said.splitlines()[-6:] == capsys.readouterr().out.splitlines()[-6:]
    torch.save({"model": plain_autoencoder.make(seed=1, latent=16, channels=(32,))}, tmp_path / "kl16.ckpt")
    assert main(command) == 2  # another file of the same name
    assert re.search(
        r"out/autoencoder: got 'converted from another kl16\.ckpt than .*kl16\.ckpt'", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "row, changes, message",
    [
        ("L-MRA", {}, "Did you mean 'L-MRAR'"),
        ("L-MRAR", {"vae": "nowhere.ckpt"}, r"files: got 'vae: .*nowhere\.ckpt'"),
        ("L-MRAR", {"weights": "."}, r"files: got 'weights: .*/checkpoint-last\.pth'"),
        (
            "L-MRAR",
            {},
            r"evaluation\.extractor_weights: .*here is not the file of weights .*InceptionV3 in the layout",
        ),
        ("L-MRAR", {"reference": "here"}, r"evaluation\.reference: .*here is not an \.npz file"),
    ],
)
def test_reproduce_refuses_before_it_starts(
    row: str, changes: dict[str, str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "here").touch()
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    names = {"weights": "here", "vae": "here", "inception": "here", "reference": "reference.npz"} | changes
    files = [word for option, name in names.items() for word in (f"--{option}", str(tmp_path / name))]
    assert main(["reproduce", row, *files, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
