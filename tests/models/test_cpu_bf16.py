"""Attention and dropout in bfloat16 on CPUs against float64 with the same masks, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_transdiff.models import cpu_bf16
from lit_transdiff.models.cpu_bf16 import CPUAttention, Dropout, applies, draw_mask_seeds, drop
from lit_transdiff.models.layers import CrossAttention, SelfAttention, attend

pytestmark = pytest.mark.numeric
SHAPES = {"self": (2, 3, 6, 6, 8), "cross": (1, 2, 10, 5, 8)}  # B, h, N, S, d


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with the instructions, with scores in several parts."""
    monkeypatch.setattr(cpu_bf16, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_bf16, "SCORES", 110)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_attention_and_its_gradients_are_those_of_float64(shape: str, p: float):
    b, h, n, s, d = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = numbers(b, n, h, d).transpose(1, 2), numbers(b, h, s, d), numbers(b, h, s, d)
    heads = max(1, 110 // (n * s))
    torch.manual_seed(1)
    masks = [
        drop(torch.ones(heads, n, s).bfloat16(), seed, p) for seed in draw_mask_seeds(-(-b * h // heads), p)
    ]
    mask = torch.cat(masks)[: b * h].view(b, h, n, s).double() / (1 - p)
    torch.manual_seed(1)
    y = CPUAttention.apply(q, k, v, p)
    exact = [z.detach().double().requires_grad_() for z in (q, k, v)]
    expected = ((exact[0] @ exact[1].mT / d**0.5).softmax(-1) * mask) @ exact[2]
    away = torch.randn(b, h, n, d)
    found = (y, *torch.autograd.grad(y, (q, k, v), away.bfloat16()))
    wanted = (expected, *torch.autograd.grad(expected, exact, away.bfloat16().double()))
    for mine, its in zip(found, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - its).abs().max() < 0.02 * its.abs().max()  # eight bits, rounded a few times


def test_masks_have_their_share_and_are_independent():
    shape, p = (256, 300), 0.1
    a, b = (drop(torch.ones(shape).bfloat16(), seed, p).float() for seed in (3, 4))
    for pair in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])):
        assert abs(((pair[0] - 0.9) * (pair[1] - 0.9)).mean()) < 4 * 0.09 / pair[0].numel() ** 0.5
    assert abs(a.mean() - 0.9) < 4 * (0.09 / a.numel()) ** 0.5 and set(a.unique().tolist()) == {0.0, 1.0}


def test_dropout_follows_the_seed_and_drops_the_same_gradients():
    layer, x = Dropout(0.25), numbers(40, 30)
    torch.manual_seed(5)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.manual_seed(5)
    assert layer(x).equal(y) and not layer(x).equal(y)
    assert (y != 0).equal(gradient != 0) and set(gradient.unique().tolist()) == {0.0, 1.3359375}  # about 4/3
    torch.testing.assert_close(y, x * gradient, rtol=0.01, atol=0)
    assert layer.eval()(x) is x or layer.eval()(x).equal(x)


@pytest.mark.parametrize("layer", [SelfAttention(16, 2, 0.0, 0.0), CrossAttention(16, 2, 0.0, 0.0)])
def test_layers_use_it_under_autocast(layer: nn.Module, monkeypatch: pytest.MonkeyPatch):
    x, calls = torch.randn(2, 6, 16), []
    apply = CPUAttention.apply
    monkeypatch.setattr(CPUAttention, "apply", lambda *args: calls.append(1) or apply(*args))

    def run() -> Tensor:
        more = ([layer.keys_values(x[:, :4])],) if isinstance(layer, CrossAttention) else ((2, 4),)
        return layer(x, *more)  # type: ignore[no-any-return]

    exact = run()
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
        assert len(calls) == (1 if isinstance(layer, CrossAttention) else 2)
        with torch.no_grad():
            run()
    assert len(calls) <= 2 and (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_it_is_for_bfloat16_with_values_and_gradients(monkeypatch: pytest.MonkeyPatch):
    x = numbers(1, 1, 2, 4)
    assert applies(x) and not applies(x.detach()) and not applies(x.float()) and not applies(x.to("meta"))
    with torch.no_grad():
        assert not applies(x)
    with FakeTensorMode():
        assert not applies(torch.ones(2, dtype=torch.bfloat16, requires_grad=True))
    monkeypatch.setattr(cpu_bf16, "multiplies_bfloat16", lambda: False)
    assert not applies(x)
    torch.testing.assert_close(attend(x, x, x), nn.functional.scaled_dot_product_attention(x, x, x))
