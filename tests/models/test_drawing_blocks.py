"""Sampling by kernels against sampling by the blocks' ``forward``; on a CPU by Triton's interpreter."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from lit_transdiff.config import ModelConfig, SamplingConfig
from lit_transdiff.kernels import gelu, norm
from lit_transdiff.models import drawing_blocks, kernel_blocks
from lit_transdiff.models.execution import twin
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.sampling.loop import generate

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each operation on a tile."""
    if not GPU:
        monkeypatch.setattr(gelu, "GELU_ROWS", 32)
        monkeypatch.setattr(norm, "NORM_TOKENS", 16)


@pytest.mark.slow
@pytest.mark.parametrize(("references", "labels"), [(1, [0, 2]), (4, [1])])
def test_kernels_draw_what_the_blocks_draw(
    references: int, labels: list[int], monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    shape = dict(width=32, num_heads=2, encoder_blocks=1, decoder_blocks=1, num_classes=3, num_class_tokens=3)
    tokens = dict(latent_channels=2, latent_size=4, num_context_tokens=16)
    model = build_model(ModelConfig(**shape, **tokens, num_references=references)).eval().to(DEVICE)
    for p in model.requires_grad_(False).parameters():
        torch.nn.init.normal_(p, std=0.3)
    network, calls = twin(model), []
    monkeypatch.setattr(drawing_blocks, "draws_by_kernels", lambda x: not calls.append(len(x)))
    drawing_blocks.use_drawing_kernels(network)
    sampling, rows = SamplingConfig(num_steps=2, guidance_scale=1.5), torch.tensor(labels, device=DEVICE)
    # Triton's interpreter multiplies no bfloat16; sums of float16 overflow nowhere here
    with torch.autocast(DEVICE.type, torch.bfloat16 if GPU else torch.float16):
        draw = partial(generate, labels=rows, sampling=sampling, seeds=[*range(len(labels))])
        found, expected, again = draw(network), draw(model), draw(network)
    assert len(calls) > 3 * references and torch.equal(found, again)
    exact = draw(model)
    assert (found - exact).abs().max() < 2 * (expected - exact).abs().max() + 1e-3 * exact.abs().max()


def test_without_a_gpu_nothing_changes():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not drawing_blocks.draws_by_kernels(torch.ones(1))


def test_kernels_that_do_not_work_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*args):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(norm, "add_norm", broken)
    kernel_blocks.kernels_work.cache_clear()
    assert not kernel_blocks.kernels_work(torch.device("cpu"), torch.bfloat16)
    assert not kernel_blocks.kernels_work(torch.device("cpu"), torch.bfloat16)
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernels do not work here, the blocks run without: RuntimeError: no C compiler"
    ]
    kernel_blocks.kernels_work.cache_clear()
