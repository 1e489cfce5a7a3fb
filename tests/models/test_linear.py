"""The linear layer's two kernels against float64."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_transdiff.models import linear
from lit_transdiff.models.linear import HAS_ONEDNN, Linear, OneDNNLinear, takes_onednn

pytestmark = pytest.mark.numeric
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN product")
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # of up to 40 float32 terms of size 1: 40 x 2^-24 at the worst is 2e-6
SHAPES = {"matrix": (7, 12), "sequence": (2, 5, 12), "transposed": (12, 7)}


@needs_onednn
@pytest.mark.parametrize("kind", SHAPES)
def test_product_and_gradients_are_those_of_float64(kind: str):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[kind])
    x = (x.t() if kind == "transposed" else x).requires_grad_()
    layer = nn.Linear(12, 9)
    y = OneDNNLinear.apply(x, layer.weight, layer.bias)
    away = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), away))
    exact, twin = x.detach().double().requires_grad_(), nn.Linear(12, 9).double()
    twin.load_state_dict(layer.state_dict())
    z = twin(exact)
    expected = (z, *torch.autograd.grad(z, (exact, twin.weight, twin.bias), away.double()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, **SUMS)


@needs_onednn
def test_gelu_on_the_way_is_the_exact_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "takes_onednn", lambda x, weight: True)
    torch.manual_seed(0)
    layer, x = Linear(12, 9, gelu=True), 3 * torch.randn(40, 12)
    expected = nn.functional.gelu(nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()))
    assert layer(x).requires_grad
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x).double(), expected, **SUMS)


@needs_onednn
def test_only_large_float32_products_of_a_cpu_take_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "mkl_lags", lambda: True)
    monkeypatch.setattr(linear, "WORTHWHILE", 100)
    layer, x = Linear(12, 9), torch.randn(2, 12)
    assert takes_onednn(x, layer.weight) and not takes_onednn(x[:0], layer.weight)
    assert not takes_onednn(x.bfloat16(), layer.weight) and not takes_onednn(x.to("meta"), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(x, layer.weight) and layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes_onednn(x, layer.weight)
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)
    monkeypatch.setattr(linear, "mkl_lags", lambda: False)
    assert not takes_onednn(x, layer.weight)


@needs_onednn
def test_torchs_counter_counts_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "takes_onednn", lambda x, weight: True)
    x = torch.randn(2, 5, 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        Linear(12, 9)(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 12 * 9
