"""Each kernel against its plain form, values and gradients; on a CPU by Triton's interpreter."""

from collections.abc import Callable
from copy import deepcopy
from itertools import chain

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lit_transdiff.kernels import adamw, gelu, norm
from lit_transdiff.kernels.attention import cross_attention, self_attention
from lit_transdiff.kernels.dropout import PAIR, draw_seeds
from tests.helpers.plain_kernels import (
    keep_mask,
    keep_mask_in_pairs,
    plain_adamw,
    plain_add_norm,
    plain_attention,
    plain_gelu_dropout,
    plain_self_attention,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 5e-3}  # of the largest value
# Triton's interpreter multiplies bfloat16 matrices as integers.
PRODUCTS = [torch.float16, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32]
SEED = torch.tensor([0x0123456789ABCDEF], device=DEVICE)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Weights that keep the variance of their input: larger scores would enlarge bfloat16's rounding."""
    return (torch.randn(rows, columns, device=DEVICE) / columns**0.5).to(dtype).requires_grad_()


def same(mine: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    assert mine.dtype == plain.dtype and mine.shape == plain.shape
    mine, plain = mine.detach(), plain.detach()
    error = (mine.float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-6)
    assert error < TOLERANCES[dtype], float(error)


def compare(mine: list[Tensor], plain: list[Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs, and the gradients of ``inputs`` for the same random gradients of the outputs."""
    weights = [torch.randn_like(y, dtype=torch.float32).to(y.dtype) for y in plain]
    for a, b in zip(mine, plain, strict=True):
        same(a, b, dtype)
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (mine, plain)]
    for a, b in zip(*gradients, strict=True):
        same(a, b, dtype)


@pytest.mark.parametrize("mask_of", [keep_mask, keep_mask_in_pairs])
def test_masks_drop_the_share_asked_for_and_are_independent(mask_of: Callable[..., Tensor]):
    rows = torch.arange(512)
    masks = [mask_of(torch.tensor(seed), rows, 384, 0.1).float() for seed in (7, 8, 7 + 2**32, 2**62 + 7)]
    for mask in masks:
        assert abs(mask.mean() - 0.9) < 4 * (0.09 / mask.numel()) ** 0.5
        assert (
            mask.mean(0).std() < 1.2 * (0.09 / 512) ** 0.5 and mask.mean(1).std() < 1.2 * (0.09 / 384) ** 0.5
        )
    pairs = [(masks[i], masks[j]) for i in range(4) for j in range(i)]
    pairs += [
        (masks[0][1:], masks[0][:-1]),
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][2:], masks[0][:-2]),
        (masks[0][:, PAIR:], masks[0][:, :-PAIR]),
    ]
    first = (torch.arange(384) & PAIR) == 0
    pairs += [(mask[:, first], mask[:, ~first]) for mask in masks]
    for a, b in pairs:
        assert abs(((a - 0.9) * (b - 0.9)).mean()) < 4 * 0.09 / a.numel() ** 0.5
    assert mask_of(SEED.cpu(), rows, 4, 0.0).all()


def test_seeds_follow_the_generator_of_the_device():
    torch.manual_seed(3)
    first = draw_seeds(4, DEVICE)
    torch.manual_seed(3)
    assert draw_seeds(4, DEVICE).equal(first) and len(set(first.tolist())) == 4


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each operation on a tile."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gelu, "GELU_ROWS", 16)
        monkeypatch.setattr(gelu, "GELU_TILES", 2)
        monkeypatch.setattr(norm, "NORM_TOKENS", 16)
        monkeypatch.setattr(norm, "NORM_TILES", 1)


@pytest.mark.parametrize(
    ("dtype", "shape", "p"), [(torch.float32, (1, 9, 40), 0.1), (torch.bfloat16, (2, 1030), 0.0)]
)
def test_gelu_dropout(dtype: torch.dtype, shape: tuple[int, ...], p: float):
    h, bias = numbers(*shape, dtype=dtype), numbers(shape[-1])
    mine, plain = gelu.gelu_dropout(h, bias, SEED, p), plain_gelu_dropout(h, bias, SEED, p)
    compare([mine], [plain], [h, bias], dtype)


def test_the_distribution_function_in_the_tails():
    h = torch.linspace(-9, 9, 64, device=DEVICE)[None]
    mine = gelu.gelu_dropout(h, torch.zeros(64, device=DEVICE), SEED, 0.0)
    assert (mine - torch.nn.functional.gelu(h.double())).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("stream", "p", "rows"),
    [(torch.float32, 0.2, 2), (torch.bfloat16, 0.0, 1), (torch.bfloat16, 0.2, 0)],
)
def test_the_residual_stream(stream: torch.dtype, p: float, rows: int):
    """``rows`` of the gate and the modulation: none, one for all, or one each."""
    width, dtype = 24, torch.bfloat16
    x, y = numbers(2, 3, width, dtype=stream), numbers(2, 3, width, dtype=dtype)
    bias, weight, norm_bias = (numbers(width) for _ in range(3))
    modulation = numbers(3, max(rows, 1), 2 * width)[..., :width].detach().requires_grad_()
    gate, shift, scale = modulation if rows else [None] * 3
    branch, after = norm.LayerOutput(y, bias, gate, p, SEED), norm.Norm(weight, norm_bias, shift, scale)
    inputs = [z for z in (x, y, bias, weight, norm_bias, gate, shift, scale) if z is not None]
    mine, plain = norm.add_norm(x, branch, after), plain_add_norm(x, branch, after, dtype)
    compare(list(mine), list(plain), inputs, dtype)


@pytest.mark.parametrize("only", ["branch", "norm"])
def test_one_half_of_the_residual_stream(only: str):
    x, y, bias, weight, norm_bias = numbers(1, 3, 8), numbers(1, 3, 8), numbers(8), numbers(8), numbers(8)
    if only == "branch":
        branch, after, inputs = norm.LayerOutput(y, bias, None, 0.3, SEED), None, [x, y, bias]
    else:
        branch, after, inputs = None, norm.Norm(weight, norm_bias), [x, weight, norm_bias]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mine, plain = (
            norm.add_norm(x, branch, after),
            plain_add_norm(x, branch, after, torch.bfloat16),
        )
    compare(list(mine), list(plain), inputs, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "p"), zip(PRODUCTS, (0.2, 0.0), strict=True))
@pytest.mark.parametrize("groups", [None, (64,), (6, 20, 44)])
def test_self_attention(dtype: torch.dtype, p: float, groups: tuple[int, ...] | None):
    """Tokens that fill their tiles, that do not, and block-causal ones."""
    tokens, heads, width = sum(groups or (20,)), 1, 16
    x = numbers(2 if tokens < 64 else 1, tokens, width, dtype=dtype)
    weight, bias, visible = matrix(3 * width, width, dtype), numbers(3 * width), None
    if groups and len(groups) > 1:
        ends = torch.tensor(groups).cumsum(0)
        visible = ends.repeat_interleave(torch.tensor(groups)).int().to(DEVICE)[None]
    arguments = (x, weight, bias, heads, SEED, p, visible)
    compare([self_attention(*arguments)], [plain_self_attention(*arguments)], [x, weight, bias], dtype)


@pytest.mark.parametrize(
    ("dtype", "lengths"), zip(PRODUCTS, (None, (10, 80)), strict=True), ids=["one", "successive"]
)
def test_cross_attention_of_several_views(dtype: torch.dtype, lengths: tuple[int, ...] | None):
    """Two contexts of one draw each: the rows are ordered (context, draw, image)."""
    heads, width, p = 2, 32, 0.2
    x, k, v = (numbers(rows, tokens, width, dtype=dtype) for rows, tokens in ((4, 9), (2, 80), (2, 80)))
    weight, bias, visible = matrix(width, width, dtype), numbers(width), None
    if lengths:
        visible = torch.tensor(lengths, dtype=torch.int32, device=DEVICE).repeat_interleave(2)[:, None]
    mine = cross_attention(x, weight, bias, k, v, heads, SEED, p, visible)
    q = torch.nn.functional.linear(x, weight, bias.to(dtype))
    plain = plain_attention(q, k, v, heads, SEED, p, visible)
    compare([mine], [plain], [x, weight, bias, k, v], dtype)


def group_of(*sizes: int) -> list[adamw.Updated]:
    parts = []
    for size in sizes:
        weight, gradient, mean, square, *averages = torch.randn(6, size, device=DEVICE).unbind()
        step = torch.tensor(3.0, device=DEVICE)
        parts.append(adamw.Updated(step, weight, gradient, mean, square.abs(), tuple(averages)))
    return parts


@pytest.mark.parametrize("max_norm", [None, 2.0, 1e3])
def test_adamw_with_clipping_and_averages(max_norm: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adamw, "ADAMW_CHUNK", 64)
    monkeypatch.setattr(adamw, "ADAMW_BLOCK", 32)
    mine = [group_of(5, 64, 130), group_of(16)]
    plain = deepcopy(mine)
    settings = [adamw.AdamW(1e-2, 1 - 5e-4, (0.9, 0.999), 1e-8), adamw.AdamW(1e-3, 1.0, (0.0, 0.95), 1e-6)]
    shares = [1e-3, 0.7]
    adamw.adamw_step(adamw.Tables(mine), settings, shares, max_norm)
    plain_adamw(plain, settings, shares, max_norm)
    for a, b in zip(chain(*mine), chain(*plain), strict=True):
        for x, y in zip(a.tensors, b.tensors, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_norm_of_gradients_that_are_not_numbers_is_none_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adamw, "ADAMW_CHUNK", 64)
    monkeypatch.setattr(adamw, "ADAMW_BLOCK", 64)
    parts = group_of(70)
    tables = adamw.Tables([parts])
    torch.testing.assert_close(adamw.gradient_norm(tables), parts[0].gradient.norm())
    parts[0].gradient[69] = float("nan")
    adamw.adamw_step(tables, [adamw.AdamW(1e-2, 1.0, (0.9, 0.999), 1e-8)], [0.1, 0.1], 1.0)
    assert parts[0].weight.isnan().all()
