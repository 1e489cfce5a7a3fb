"""Every family beside TransDiff through the commands: trained, planned, sampled, scored and swept; and what
does not fit it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lit_transdiff.__main__ import main
from lit_transdiff.config.loading import load_run
from lit_transdiff.models.adapt import match
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.training.build import build
from lit_transdiff.training.trainer import train
from tests.helpers.small import FAMILIES, FASHION, SETTINGS, small_run

SCORES = {
    "num_images": 20,
    "batch_size": 10,
    "extractor": "classifier",
    "extractor_weights": str(FASHION / "classifier.safetensors"),
    "metrics": ["class_accuracy", "inception_score"],
}


def recipe(folder: Path, name: str) -> Path:
    """The small run of a family as a file."""
    base = OmegaConf.create(
        {**SETTINGS, "model": {}, "evaluation": SCORES, "output_dir": str(folder), "name": name}
    )
    (folder / f"{name}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.merge(base, FAMILIES[name])))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run of every family."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        train(load_run(recipe(folder, name)), say=lambda text: None)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_and_scored(trained: Path, name: str):
    run, images = trained / name, trained / f"images-{name}"
    more = ["sampling.guidance_scale=2"] + (
        ["sampling.part_guidance=growing", "sampling.num_parts=3"] if name == "mar" else []
    )
    draw = [
        "sample",
        "--checkpoint",
        str(run),
        "--classes",
        "0,7",
        "--per-class",
        "2",
        "--output",
        str(images),
    ]
    assert main([*draw, *more]) == 0
    assert len(list(images.glob("class-*/seed-*.png"))) == 4
    assert main(["evaluate", "--checkpoint", str(run), *more]) == 0
    (result,) = (run / "evaluations").glob("*.json")
    assert 0 <= json.loads(result.read_text())["scores"]["class_accuracy"] <= 100


@pytest.mark.parametrize("name", FAMILIES)
def test_planned(trained: Path, name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(trained / f"{name}.yaml"), "--gpus", "8", "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    assert f"{name}, size test" in said and "fsdp" in said


@pytest.mark.slow
def test_a_setting_of_a_family_is_swept(tmp_path: Path):
    """By evaluations of a trained model in processes of their own."""
    train(load_run(recipe(tmp_path, "mar")), say=lambda text: None)
    program = ["${env}", "${interpreter}", "-m", "lit_transdiff"]
    sweep = {
        "name": "sweep-mar",
        "method": "grid",
        "metric": {"name": "eval/class_accuracy", "goal": "maximize"},
        "parameters": {"sampling.num_parts": {"values": [2, 4]}},
        "command": [*program, "evaluate", "--checkpoint", str(tmp_path / "mar"), "${args_no_hyphens}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "sweep")]) == 0
    assert len(list((tmp_path / "sweep").rglob("evaluations/*.json"))) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_depends_on_its_seed_alone(trained: Path, name: str):
    """Independent of the other images of the batch up to rounding, because orders and noise follow from its
    seed.
    """
    generator = load_generator(trained / name)
    together = generator.images([3, 7, 3], seeds=[1, 2, 5])
    torch.testing.assert_close(generator.images([7], seeds=[2]), together[1:2], rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mar", {"sampling": {"solver": "euler"}}, r"sampling\.solver: 'euler' is not known\. "),
        (
            "mar",
            {"sampling": {"solver": "ancestral", "num_parts": 17}},
            r"num_parts: got 17; allowed: null, or 1 to 16",
        ),
        (
            "mar",
            {"sampling": {"solver": "ancestral", "num_steps": 2000}},
            r"sampling\.num_steps: got 2000; allowed: 2 to 1000",
        ),
        (
            "mar",
            {"sampling": {"solver": "ancestral", "shift": 2.0}},
            r"sampling\.shift: got 2\.0; allowed: 1\.0 with a diffusion in discrete steps, which",
        ),
        (
            "mar",
            {"flow": {"density": "uniform"}},
            r"flow\.density: got 'uniform'; allowed: 'logit_normal', which",
        ),
        (
            "dit",
            {"flow": {"loss_terms": {"direction": 0.1}}},
            r"flow\.loss_terms: got \{'direction': 0\.1\}; allowed: \{\}, which",
        ),
        (
            "dit",
            {"model": {"learn_sigma": False}},
            r"model\.learn_sigma: got False; allowed: true with model\.paradigm dit",
        ),
        ("sit", {"sampling": {"solver": "ancestral"}}, r"sampling\.solver: 'ancestral' is not known"),
        (
            "sit",
            {"sampling": {"num_parts": 2}},
            r"sampling\.num_parts: got 2; allowed: null with model\.paradigm sit",
        ),
        (
            "sit",
            {"model": {"guided_channels": 3}},
            r"model\.guided_channels: got 3; allowed: null or 1 to model\.latent_channels=1",
        ),
        ("sit", {"model": {"num_context_tokens": 4}}, r"model\.num_context_tokens"),
        ("sit", {"model": {"size": "huge"}}, r"model\.size: 'huge' is not known"),
        (
            "sit",
            {"stage": "diffusion_head"},
            r"paradigm: got 'sit'; allowed: transdiff, transdiff_parts, flowar, ardiff, mar in stage diff",
        ),
        (
            "sit",
            {"sampling": {"reference_steps": [3]}},
            r"sampling\.reference_steps: got \[3\]; allowed: null with model\.paradigm sit",
        ),
        (
            "acdit",
            {"sampling": {"solver": "dpmpp_2m", "grid": "nonzero", "num_steps": 1000}},
            r"got 1000; allowed: 2 to 999, the steps",
        ),
        (
            "xar",
            {"sampling": {"num_parts": 2}},
            r"got 2; allowed: null with model\.paradigm xar, whose parts are",
        ),
        (
            "xar",
            {"stage": "diffusion_head"},
            r"got 'xar'; allowed: transdiff, transdiff_parts, flowar, ardiff, mar in stage",
        ),
        ("flowar", {"sampling": {"solver": "ancestral"}}, r"sampling\.solver: 'ancestral' is not known"),
        (
            "flowar",
            {"model": {"scales": [1, 2]}},
            r"scales: got \[1, 2\]; allowed: .* the 4 tokens of a side",
        ),
        (
            "ardiff",
            {"flow": {"density": "uniform"}},
            r"flow\.density: got 'uniform'; allowed: 'logit_normal'",
        ),
        (
            "sit",
            {"stage": "mrar_finetune"},
            r"model\.paradigm: got 'sit'; allowed: transdiff in stage mrar_finetune",
        ),
        (
            "sit",
            {"evaluation": {**SCORES, "every": 2, "metrics": ["feature_diversity"]}},
            "needs a model.paradigm with semantic features",
        ),
        (
            "mar",
            {"training": {"activation_checkpointing": "blocks"}},
            r"'encoder' or 'decoder' or 'head' in stage pretrain",
        ),
        *[
            (
                name,
                {"stage": "ar_pretrain"},
                rf"stage with model\.paradigm {name}: got 'ar_pretrain'; allowed: 'pretrain', the stage of",
            )
            for name in FAMILIES
        ],
        *[
            (
                name,
                {"sampling": {"reuse_noise": False}},
                rf"sampling\.reuse_noise: got False; allowed: True with model\.paradigm {name}, as rows have",
            )
            for name in FAMILIES
        ],
        *[
            (
                name,
                {"model": one, "sampling": {"part_guidance": "growing"}},
                rf"got 'growing'; allowed: 'constant' with model\.paradigm {name}, as an image is",
            )
            for name, one in (
                *(("sit", {}), ("dit", {}), ("flowar", {"scales": [4]})),
                *((name, {"parts_per_side": 1}) for name in ("acdit", "xar")),
            )
        ],
        (
            "flowar",
            {"model": {"scales": [1, 3, 4]}},
            r"model\.scales: got \[1, 3, 4\]; allowed: some of \[1, 2, 4\], which divide the 4 tokens",
        ),
        (
            "mar",
            {"model": {"paradigm": "marr"}},
            r"model\.paradigm: 'marr' is not known\. Did you mean 'mar'",
        ),
    ],
)
def test_what_does_not_fit_a_family_is_refused_before_training(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
):
    family = OmegaConf.to_container(OmegaConf.merge(FAMILIES[name], changes))
    with pytest.raises(ValueError, match=message) as error:
        build(small_run(tmp_path, **family))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "small").exists()


def test_a_run_of_another_family_is_no_beginning(trained: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"init_from: got .*; allowed: a run of model\.paradigm mar; this one is of sit"
    ):
        build(small_run(tmp_path, **FAMILIES["mar"], init_from=str(trained / "sit")))


OF_CLASSES = "y_embedder.embedding_table.weight"
# of classes, and its rows
TABLES = {
    "sit": (OF_CLASSES, 8),
    "acdit": (OF_CLASSES, 8),
    "xar": ("class_emb.weight", 8),
    "flowar": ("class_emb.weight", 8),
    "ardiff": ("class_emb.weight", 7),
    "mar": ("class_emb.weight", 7),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_family_starts_from_other_classes_and_a_larger_latent(tmp_path: Path, name: str):
    """The null row of a table is no class, and SiT's positions are a formula: they are those of the new
    model.
    """
    table, rows = TABLES[name]
    old, new = (
        build_model(
            small_run(tmp_path, **{**FAMILIES[name], "model": FAMILIES[name]["model"] | changes}).model
        )
        for changes in ({}, {"num_classes": 7, "latent_size": 64})
    )
    fresh, before = new.state_dict(), old.state_dict()
    found, report = match(new, before, shapes="new", classes=[9, None, 0, 1, 2, 3, 4])
    assert found[table].shape[0] == rows and table in report.adapted
    assert torch.equal(found[table][[0, 2, 6]], before[table][[9, 0, 4]])
    if rows == 8:
        assert torch.equal(found[table][7], before[table][10])  # of no class
    if name == "sit":
        assert torch.equal(found["pos_embed"], fresh["pos_embed"])
    new.load_state_dict(found)


def test_the_head_of_mar_is_trained_alone(trained: Path, tmp_path: Path):
    run = small_run(
        tmp_path, **{**FAMILIES["mar"], "stage": "diffusion_head"}, init_from=str(trained / "mar")
    )
    stage = build(run).stage
    assert {
        name.startswith("model.diffloss.") for name, p in stage.named_parameters() if p.requires_grad
    } == {True}


def test_a_recorded_setting_without_effect_is_no_obstacle(trained: Path):
    """A run may be from before such a setting was refused; as an override it is refused."""
    generator = load_generator(trained / "sit")
    growing = replace(generator.run.sampling, part_guidance="growing")
    with pytest.raises(ValueError, match=r"sampling\.part_guidance: got 'growing'; allowed: 'constant'"):
        generator.images([3], [1], growing)
    earlier = replace(generator, run=replace(generator.run, sampling=growing))
    assert torch.equal(earlier.images([3], [1]), generator.images([3], [1]))
