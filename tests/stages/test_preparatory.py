"""The stages that train the autoencoder and the classifier: they learn, they measure the scale, they export
what loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import load_run, run_from
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.models.autoencoder import check_latents, load_autoencoder
from lit_transdiff.models.classifier import Judge, load_classifier
from lit_transdiff.stages import PREPARATORY
from lit_transdiff.stages.autoencoder import AutoencoderStage, edge_error, psnr
from lit_transdiff.stages.classifier import ClassifierStage
from lit_transdiff.stages.judge import DISTORTIONS, JudgeStage, distorted

pytestmark = pytest.mark.numeric
RECIPES = Path(__file__).parents[2] / "experiments/fashion"


def small_run(stage: str) -> RunConfig:
    return run_from(
        {
            "stage": stage,
            "data": {"image_size": 16, "image_channels": 1},
            "model": {"num_classes": 4},
            "autoencoder_training": {
                "block_channels": [8, 8, 8],
                "norm_groups": 4,
                "latent_channels": 3,
                "num_statistics_images": 40,
            },
            "optimizer": {"lr": 2e-4 if stage == "judge" else 3e-3, "schedule": "cosine"},
            "training": {"max_steps": 20, "global_batch_size": 16},
        }
    )


def batch_of(images: Tensor) -> Batch:
    """Images [B, C, H, W] with the labels 0, 1, 2, 3, 0, ..."""
    positions = torch.arange(len(images))
    return Batch(images[:, None], positions % 4, positions[:, None], positions)


def squares(count: int = 16) -> Batch:
    """White squares in one of four corners, the label says in which; some noise."""
    images = torch.full((count, 1, 16, 16), -1.0)
    for i in range(count):
        top, left = 8 * (i % 4 // 2), 8 * (i % 2)
        images[i, 0, top + 2 : top + 6, left + 2 : left + 6] = 1.0
    return batch_of((images + 0.1 * torch.randn(images.shape)).clamp(-1, 1))


@pytest.mark.parametrize("name", PREPARATORY)
def test_training_lowers_the_loss_of_a_fixed_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = PREPARATORY[name](small_run(name))
    for method in ("log", "log_dict"):
        monkeypatch.setattr(stage, method, lambda *args, **kwargs: None)
    setup, batch = stage.configure_optimizers(), squares()
    optimizer, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    losses = []
    for step in range(12):
        torch.manual_seed(0)  # the same noise and dropout: only the weights change
        loss = stage.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_is_the_sum_of_its_parts() -> None:
    run = small_run("autoencoder")
    losses = AutoencoderStage(run).losses(squares().values[:, 0])
    expected = losses["square"] + losses["edge"] + run.autoencoder_training.kl_weight * losses["kl"]
    torch.testing.assert_close(losses["loss"], expected)


def test_edge_error_and_psnr_by_hand() -> None:
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 2.0  # one vertical edge: 4 of 12 horizontal differences are 2
    assert edge_error(step).item() == pytest.approx(4 / 3)
    assert psnr(torch.full((3, 1, 4, 4), 0.2), torch.zeros(3, 1, 4, 4)).item() == pytest.approx(
        20.0, abs=1e-4
    )


def test_export_measures_the_scale_of_the_latents(tmp_path: Path) -> None:
    stage = AutoencoderStage(small_run("autoencoder"))
    images = squares(48).values[:, 0]
    stage.export(tmp_path, [batch_of(part) for part in images.split(16)])  # 40 of the 48 images count
    autoencoder = load_autoencoder("kl", tmp_path, image_channels=1)
    moments = autoencoder.encode(images[:40])
    draws = torch.stack([autoencoder.sample(moments, torch.randn(40, 3, 4, 4)) for _ in range(50)])
    check_latents(draws)
    std, mean = torch.std_mean(draws, dim=(0, 1, 3, 4))
    torch.testing.assert_close(mean, torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="batches: got none"):
        stage.measure([])


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_a_distortion_grows_with_its_strength_and_is_none_at_zero(
    distortion: Callable[[Tensor, Tensor], Tensor],
) -> None:
    images = torch.rand(6, 1, 16, 16) * 2 - 1
    strength = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])[:, None, None, None]
    torch.manual_seed(0)
    change = (distortion(images, strength) - images).abs().mean(dim=(1, 2, 3))
    assert (change[:2] == 0).all()
    assert (change[2:] > 0).all()
    assert change[4:].sum() > change[2:4].sum()


def test_distorted_images_are_images_and_the_others_are_unchanged() -> None:
    images = torch.rand(200, 1, 16, 16) * 2 - 1
    changed, strengths = distorted(images)
    assert changed.abs().max() <= 1
    whole = (strengths == 0).all(dim=1)
    assert 20 < whole.sum() < 80  # 0.7^4 of 200
    torch.testing.assert_close(changed[whole], images[whole])
    assert (strengths > 0).float().mean(dim=0) == pytest.approx([0.3] * 4, abs=0.12)


def test_the_layer_that_names_the_distortion_is_not_exported(tmp_path: Path) -> None:
    stage = JudgeStage(small_run("judge"))
    stage.export(tmp_path, [])
    kept = load_classifier(tmp_path / "judge.safetensors", Judge).state_dict()
    assert kept.keys() == {
        name.removeprefix("classifier.") for name in stage.state_dict() if "distortion" not in name
    }


def test_exported_classifier_is_the_trained_one(tmp_path: Path) -> None:
    stage = ClassifierStage(small_run("classifier"))
    stage.export(tmp_path / "export", [])
    loaded = load_classifier(tmp_path / "export/classifier.safetensors")
    images = squares().values[:, 0]
    assert torch.equal(loaded(images), stage.eval().classifier(images))


@pytest.mark.parametrize("name", PREPARATORY)
def test_recipe_builds_its_stage(name: str) -> None:
    run = load_run(RECIPES / f"{name}.yaml")
    assert run.stage == name
    PREPARATORY[name](run)
