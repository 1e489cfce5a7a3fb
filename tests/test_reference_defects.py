"""The 27 known defects of the released implementation, by number: none of them is ours.

What another test shows is named in ``ELSEWHERE``; the rest is tested here.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from lit_transdiff.__main__ import main
from lit_transdiff.checkpoints.run_folder import last_checkpoint
from lit_transdiff.config import SIZES, FlowConfig, ModelConfig, OptimizerConfig, SamplingConfig
from lit_transdiff.flow.guidance import guide
from lit_transdiff.flow.loss import draw_times
from lit_transdiff.flow.solvers import time_grid
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.key_names import read_shape, released_shapes
from lit_transdiff.sampling.loop import generate
from lit_transdiff.stages.optim import lr_factor
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run
from tests.helpers.small_model import build as small_model

# Number -> what it was, and the test (module:function) that shows that it is not ours.
ELSEWHERE = {
    1: (
        "no evaluation without naming a sampler",
        "test_imagenet:test_reproduce_from_released_files_to_the_table",
    ),
    3: (
        "fine-tuning cannot start from the released weights",
        "test_imagenet:test_training_goes_on_from_released_weights",
    ),
    4: ("loose loading hides keys", "test_house:test_public_code_is_documented_and_nothing_is_loose"),
    6: (
        "evaluation needs several processes",
        "test_imagenet:test_reproduce_from_released_files_to_the_table",
    ),
    13: ("accumulated gradients are summed", "training.test_training:test_accumulation_is_an_average"),
    14: (
        "evaluation repeats and pollutes seeds",
        "sampling.test_generator:test_seeds_and_labels_matter_and_the_global_generator_does_not",
    ),
    19: ("devices written into the code", "test_house:test_public_code_is_documented_and_nothing_is_loose"),
    20: ("MRAR cannot read cached latents", "test_imagenet:test_training_goes_on_from_released_weights"),
    21: (
        "cached and direct training cut otherwise",
        "data.test_latents:test_cached_latents_are_those_of_the_images",
    ),
    22: ("no MRAR at 512", "test_imagenet:test_one_optimizer_step_of_a_narrow_copy"),
    23: (
        "online evaluation disturbs training",
        "training.test_online_evaluation:test_training_is_the_same_to_the_bit_with_scores_and_without",
    ),
    24: ("unlisted dependencies", "test_house:test_dependencies_stand_in_one_list"),
    27: ("no resume inside an epoch", "training.test_training:test_resumed_equals_uninterrupted"),
}
# there is no such thing
NOT_OURS = {15: "a diversity loss that no flag reaches", 18: "qk_norm of the cross-attention crashes"}
HERE = {
    int(number) for number in re.findall(r"^def test_(\d\d)_", Path(__file__).read_text(), flags=re.MULTILINE)
}


def test_every_defect_has_its_test():
    assert sorted([*ELSEWHERE, *NOT_OURS, *HERE]) == list(range(1, 28))
    for _, test in ELSEWHERE.values():
        module, function = test.split(":")
        assert hasattr(importlib.import_module(f"tests.{module}"), function), test


def test_02_a_checkpoint_says_itself_that_it_is_mrar():
    shapes = released_shapes(ModelConfig(num_references=4))
    assert (
        read_shape({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})[
            "num_references"
        ]
        == 4
    )


def test_05_evaluating_what_was_never_trained_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "--checkpoint", str(tmp_path)]) == 2
    assert "holds no trained model" in capsys.readouterr().err


@pytest.mark.parametrize("num_steps", [1, 3])
def test_07_the_number_of_steps_is_the_one_asked_for(num_steps: int):
    model, calls = small_model(), []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    generate(model, torch.tensor([1]), SamplingConfig(num_steps=num_steps), [0])
    assert len(calls) == num_steps


def test_08_guidance_below_one_is_refused_and_an_interval_mixes_no_batches():
    with pytest.raises(ValueError, match="guidance_scale"):
        SamplingConfig(guidance_scale=0.9)
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    guided = guide(lambda x, t: ones, lambda x, t: (ones, zeros), 2.0, (0.3, 0.6))
    x = torch.zeros(2, 3)
    assert [float(guided(x, t).mean()) for t in (0.9, 0.5, 0.1)] == [1.0, 2.0, 1.0]


def test_09_a_scale_of_one_may_be_an_integer():
    sampling = SamplingConfig(num_steps=1, guidance_scale=1)
    assert generate(small_model(4), torch.tensor([1]), sampling, [0]).shape == (1, 4, 2, 4, 4)


def test_10_evaluation_reads_a_prefix_of_the_references():
    model, references = small_model(4), torch.randn(2, 4, 2, 4, 4)
    for n in range(4):
        assert model.encode(torch.tensor([1, 2]), references[:, :n]).shape == (2, (n + 1) * 4, 16)


def test_11_sampling_builds_no_graph():
    model = small_model()
    assert all(p.requires_grad for p in model.parameters())
    assert not generate(model, torch.tensor([1]), SamplingConfig(num_steps=2), [0]).requires_grad


@pytest.mark.parametrize("precision, kind", [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_12_averages_are_float32_and_move_and_so_are_weights_unless_asked_otherwise(
    precision: str, kind: torch.dtype, tmp_path: Path
):
    run = small_run(
        tmp_path, training={"max_steps": 3, "precision": precision}, optimizer={"ema_decay": 0.9999}
    )
    train(run, say=lambda text: None)
    checkpoint = last_checkpoint(run).index()

    def is_bfloat16(state: str) -> bool:
        tensors = [checkpoint.tensor(name, state) for name in checkpoint.shapes]
        return all(torch.equal(value, value.bfloat16().float()) for value in tensors)

    assert is_bfloat16("weight") == (kind == torch.bfloat16)
    assert not is_bfloat16("ema")  # in bfloat16 an average would not move at all


def test_16_a_one_step_model_has_no_projection_of_references():
    assert not any("reference_projection" in name for name, _ in small_model(1).named_parameters())


def test_17_groups_need_no_mask_that_is_bound_to_a_device_or_to_their_number():
    for num_references, tokens in ((2, 128), (4, 256), (8, 128)):
        grids = dict(latent_size=32, num_context_tokens=tokens)
        model = TransDiff(ModelConfig(**SIZES["test"], **grids, num_references=num_references))
        assert not list(model.buffers()) and all(
            p.device.type == "meta" for p in model.to("meta").parameters()
        )


def test_25_times_come_from_the_run_and_are_continuous_by_default():
    normal = torch.randn(1000)
    t = draw_times(normal, FlowConfig())
    assert torch.equal(t, draw_times(normal, FlowConfig())) and not torch.equal(
        t, torch.floor(1000 * t) / 1000
    )
    assert (
        time_grid(SamplingConfig(num_steps=10))[0] == 1.0
        and float(draw_times(torch.tensor(20.0), FlowConfig())) == 1.0
    )


def test_26_the_first_update_has_a_rate():
    assert lr_factor(0, 100, OptimizerConfig(warmup_steps=10)) == pytest.approx(0.1)
    # the reference's, on demand
    assert lr_factor(0, 100, OptimizerConfig(warmup_steps=10, warmup_offset=0.0)) == 0.0
