"""Blocks by kernels against their ``forward``, within a whole model; on a CPU by Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import FlowConfig, ModelConfig
from lit_transdiff.flow.straight import Flow
from lit_transdiff.kernels import gelu, norm
from lit_transdiff.models import kernel_blocks
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.stages.objective import losses_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bfloat16 matrices as integers.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each operation on a tile."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gelu, "GELU_ROWS", 16)
        monkeypatch.setattr(gelu, "GELU_TILES", 2)
        monkeypatch.setattr(norm, "NORM_TOKENS", 16)
        monkeypatch.setattr(norm, "NORM_TILES", 1)


def build(references: int, dropout: float) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(
        width=32,
        num_heads=2,
        encoder_blocks=1,
        decoder_blocks=1,
        num_references=references,
        latent_channels=2,
        latent_size=4,
        num_classes=3,
        num_class_tokens=3,
        num_context_tokens=4 * references,
        attention_dropout=dropout,
        projection_dropout=dropout,
    )
    model = build_model(config).to(DEVICE).train()
    torch.nn.init.normal_(model.decoder.final.linear.weight, std=0.1)
    return model


def losses_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of two rows and two noise draws, by autocast."""
    seeds, labels = [1, 2], torch.tensor([0, 2], device=DEVICE)
    normal = PerImageNormal(seeds, DEVICE)
    x = normal(model.config.num_references, 2, 4, 4)
    drop = torch.tensor([False, True], device=DEVICE)
    model.zero_grad()
    with torch.autocast(DEVICE.type, DTYPE):
        rows, _ = losses_of(model, Flow(FlowConfig(), "velocity"), labels, drop, x, normal, 2)
    rows.mean().backward()
    return rows.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("references", [1, 3])
def test_kernels_compute_what_the_blocks_compute(references: int, monkeypatch: pytest.MonkeyPatch):
    model = build(references, 0.0)
    rows, gradients = losses_and_gradients(model)
    calls = []
    monkeypatch.setattr(kernel_blocks, "takes_kernels", lambda x: calls.append(x) or torch.is_grad_enabled())
    blocks = [block for stack in model.block_lists().values() for block in stack]
    kernel_blocks.use_kernels(model)
    mine, of_mine = losses_and_gradients(model)
    assert len(calls) == len(blocks) + 1 and mine.sub(rows).abs().max() < 5e-3 * rows.max()
    assert of_mine.keys() == gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():  # those of the keys' biases are zero but for rounding
        error = (of_mine[name] - gradient).norm() / gradient.norm().clamp(min=1e-2 * whole)
        assert error < 2e-2, (name, float(error))


@pytest.mark.slow
def test_dropout_of_kernels_follows_the_seed(monkeypatch: pytest.MonkeyPatch):
    model = build(1, 0.5)
    monkeypatch.setattr(kernel_blocks, "takes_kernels", lambda x: True)
    kernel_blocks.use_kernels(model)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(losses_and_gradients(model)[0])
    assert results[0].equal(results[1]) and not results[0].isclose(results[2]).any()


def test_contexts_that_are_no_beginnings_of_one_are_not_taken():
    k = torch.zeros(2, 2, 6, 4)
    pair, shorter = (k, k), (k[:, :, :3], k[:, :, :3])
    assert kernel_blocks.successive((shorter, pair)) and kernel_blocks.successive((pair,))
    assert not kernel_blocks.successive((pair, (k.clone(), k.clone())))
    assert kernel_blocks.keys_of_rows((6, 6), 4, k.device) is None
    assert kernel_blocks.keys_of_rows((3, 6), 4, k.device).flatten().tolist() == [3, 3, 6, 6]
    assert kernel_blocks.keys_of_queries((1, 2, 2), k.device).tolist() == [[1, 3, 3, 5, 5]]


@pytest.mark.parametrize(("width", "heads", "has"), [(32, 2, True), (32, 8, False), (1280, 16, False)])
def test_head_dimensions_of_the_attention_kernel(width: int, heads: int, has: bool):
    with torch.device("meta"):
        block = kernel_blocks.EncoderBlock(width, heads, 4.0, 0.0, 0.0)
    assert kernel_blocks.has_kernels(block) == has
