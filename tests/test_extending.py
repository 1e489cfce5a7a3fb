"""Every block of docs/extending.md runs, and its entries are used in a run."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_transdiff
from lit_transdiff.config.loading import run_from
from lit_transdiff.evaluation.statistics import reference_statistics, save_statistics
from lit_transdiff.planning.planner import plan
from lit_transdiff.training.build import check_run
from tests.helpers.small import ROOT, SETTINGS, small_run

TEXT = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", TEXT, flags=re.MULTILINE | re.DOTALL)


pytestmark = pytest.mark.usefixtures("fresh_tables")


def test_there_is_a_block_for_every_table():
    added = {name for _, code in BLOCKS for name in re.findall(r"^([A-Z_]+)\[", code, flags=re.MULTILINE)}
    assert added == {*lit_transdiff.TABLES}
    listed = {name for name in re.findall(r"^\| \[?`([A-Z_]+)`", TEXT, flags=re.MULTILINE)}
    assert listed == {*lit_transdiff.TABLES}


def test_a_run_of_all_the_examples(tmp_path: Path):
    for _, code in BLOCKS:
        exec(code, {})
    changes: dict[str, Any] = {
        "autoencoder": {"kind": "halves"},
        "flow": {"objective": "absolute", "loss_terms": {"energy": 0.01}, "density": "towards_noise"},
        "optimizer": {"name": "nadam", "schedule": "linear"},
        "sampling": {
            "solver": "midpoint",
            "grid": "square",
            "guidance": "late",
            "guidance_scale": 2.0,
            "num_steps": 2,
        },
        "evaluation": {
            "extractor": "brightness",
            "extractor_weights": __file__,
            "num_images": 4,
            "batch_size": 4,
        },
        "training": {"max_steps": 3, "callbacks": ["milestones"]},
    }
    run = small_run(tmp_path, **changes)
    assert lit_transdiff.train(run, say=lambda text: None).step == 3
    reference = reference_statistics([torch.rand(20, 1, 32, 32)], lit_transdiff.EXTRACTORS["brightness"](""))
    save_statistics(reference, tmp_path / "reference.npz")
    settings = replace(
        run.evaluation,
        metrics=["mean_distance", "frechet_distance"],
        reference=str(tmp_path / "reference.npz"),
    )
    found = lit_transdiff.evaluate(
        lit_transdiff.load_generator(run.folder), settings, run.sampling, output=tmp_path / "scores"
    )
    assert 0 < found["scores"]["mean_distance"] ** 2 <= found["scores"]["frechet_distance"]


def test_the_midpoint_rule_of_the_page_is_of_second_order():
    exec(dict(BLOCKS)["Solvers, grids and guidance"], {})
    solver = lit_transdiff.SOLVERS["midpoint"]
    errors = []
    for steps in (10, 20):  # dx/dt = x from t = 1 to 0: x(0) = x(1) / e
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        x = solver(lambda x, t: x, torch.ones(1, dtype=torch.float64), times, None, None)
        errors.append(abs(x.item() - math.exp(-1)))
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_a_family_a_decoder_and_an_encoder_of_the_page_train_and_draw(tmp_path: Path):
    for _, code in BLOCKS:
        exec(code, {})
    guided = {"num_steps": 2, "guidance_scale": 2.0, "part_guidance": "from_the_second"}
    family = {"paradigm": "plain_mlp", "width": 16}
    settings = {"output_dir": str(tmp_path), "stage": "pretrain", "model": family, "sampling": guided}
    whole = run_from({key: value for key, value in SETTINGS.items() if key not in settings} | settings)
    ablation = small_run(
        tmp_path, name="ablation", model={"decoder": "timeless", "encoder": "shuffled"}, sampling=guided
    )
    lit_transdiff.PARADIGMS["plain_mlp"].network.process = "short_flow"
    for run in (whole, ablation):
        lit_transdiff.train(run, say=lambda text: None)
        generator = lit_transdiff.load_generator(run.folder)
        one, two = generator.images([3, 4], [1, 2]), generator.images([4], [2])
        torch.testing.assert_close(one[1:], two)
        assert one.isfinite().all()
        assert "parameters" in plan(run, 1, "h100", 0.4)


def test_a_cached_vector_takes_the_place_of_the_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The vectors are stored beside the latents; the loss and sampled images depend on them."""
    exec(dict(BLOCKS)["Conditions"], {})
    run = small_run(tmp_path, model={"condition": "vectors"})
    vectors = torch.randn(12_000, 3, generator=torch.Generator().manual_seed(0))
    torch.save(vectors, tmp_path / "vectors.pt")

    class WithVectors(lit_transdiff.DataModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return replace(batch, conditions=torch.load(tmp_path / "vectors.pt")[batch.samples[:, -1]])

    monkeypatch.setattr("lit_transdiff.training.build.DataModule", WithVectors)
    lit_transdiff.train(run, say=lambda text: None)
    generator = lit_transdiff.load_generator(run.folder)
    first, second = generator.images(vectors[:2], [1, 1])
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"conditions: got \(1,\); allowed: numbers \[B, 3\]"):
        generator.images([0], [1])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model": {"paradigm": "transdif"}},
            r"model\.paradigm: 'transdif' is not known\. Did you mean 'transdiff'",
        ),
        ({"model": {"decoder": "croos_attention"}}, r"model\.decoder: .* Did you mean 'cross_attention'"),
        ({"model": {"condition": "clas"}}, r"model\.condition: .* Did you mean 'class'"),
        (
            {"sampling": {"num_parts": 3}},
            r"sampling\.num_parts: got 3; allowed: null with model\.paradigm transdiff",
        ),
        ({"sampling": {"part_guidance": "grow"}}, r"sampling\.part_guidance: 'grow' is not known"),
        (
            {"training": {"activation_checkpointing": "decodr"}},
            r"activation_checkpointing: got 'decodr'; allowed: 'none' or 'all'",
        ),
    ],
)
def test_what_does_not_fit_a_family_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        check_run(small_run(tmp_path, **changes))


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        (
            "diffusion_head",
            {"init_from": "x"},
            r"got 'plain_mlp'; allowed: transdiff, transdiff_parts, flowar, ardiff, mar in stage",
        ),
        ("mrar_finetune", {}, r"model\.paradigm: got 'plain_mlp'; allowed: transdiff in stage mrar_finetune"),
    ],
)
def test_a_stage_refuses_a_family_that_it_does_not_fit(
    tmp_path: Path, stage: str, changes: dict[str, Any], message: str
):
    exec(dict(BLOCKS)["Families of models"], {})
    settings = {"output_dir": str(tmp_path), "stage": stage, "model": {"paradigm": "plain_mlp"}, **changes}
    with pytest.raises(ValueError, match=message):
        check_run(run_from({key: value for key, value in SETTINGS.items() if key not in settings} | settings))
