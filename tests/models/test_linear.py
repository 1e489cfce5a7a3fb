"""The faster product of a model's linear layers against float64, and where it is taken."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_transdiff.config import ModelConfig
from lit_transdiff.models import linear
from lit_transdiff.models.execution import twin
from lit_transdiff.models.layers import MLP
from lit_transdiff.models.linear import HAS_ONEDNN, OneDNNLinear, takes_onednn, use_faster_product
from lit_transdiff.models.paradigm import build_model

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


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU for which oneDNN is the faster, with small products."""
    monkeypatch.setattr(linear, "mkl_lags", lambda: True)
    monkeypatch.setattr(linear, "WORTHWHILE", 100)


@needs_onednn
@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_on_the_way_is_the_exact_one(tanh: bool):
    torch.manual_seed(0)
    mlp, x = MLP(12, 2.0, 0.0, tanh), 3 * torch.randn(40, 12)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = mlp.double()(x.double())
    mlp.float()
    names, calls = list(mlp.state_dict()), []
    use_faster_product(mlp)
    use_faster_product(mlp)
    mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    assert list(mlp.state_dict()) == names
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = mlp(x)
        assert y.requires_grad == grad
        torch.testing.assert_close(y.double(), expected, **SUMS)
    assert len(calls) == 2  # hooks stay


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_only_large_float32_products_of_a_cpu_take_it():
    layer, x = nn.Linear(12, 9), torch.randn(2, 12)
    use_faster_product(layer)
    assert takes_onednn(x, layer.weight) and not takes_onednn(x[:0], layer.weight)
    assert not takes_onednn(x.bfloat16(), layer.weight) and not takes_onednn(x.to("meta"), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(x, layer.weight) and layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes_onednn(x, layer.weight)
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)


@needs_onednn
def test_it_is_a_matter_of_the_cpu_and_of_plain_layers(monkeypatch: pytest.MonkeyPatch):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    def touched(model: nn.Module) -> int:
        return sum("forward" in vars(module) for module in model.modules())

    config = ModelConfig(width=32, num_heads=2, encoder_blocks=1, decoder_blocks=1)
    monkeypatch.setattr(linear, "mkl_lags", lambda: False)
    assert touched(build_model(config)) == 0
    monkeypatch.setattr(linear, "mkl_lags", lambda: True)
    model = build_model(config)
    assert (
        touched(model)
        == touched(twin(model))
        == sum(isinstance(module, nn.Linear) for module in model.modules())
        > 10
    )
    own = Own(2, 2)
    use_faster_product(own)
    assert touched(own) == 0


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_torchs_counter_counts_it():
    layer, x = nn.Linear(12, 9), torch.randn(2, 5, 12, requires_grad=True)
    use_faster_product(layer)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 12 * 9


@pytest.mark.skipif(not linear.packs(), reason="no packed bfloat16 weights on this processor")
@pytest.mark.parametrize("tanh", [False, True])
def test_packed_weights_give_the_products_of_bfloat16(tanh: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(linear, "WORTHWHILE", 100)
    torch.manual_seed(0)
    mlp, x = MLP(32, 2.0, 0.0, tanh).bfloat16(), torch.randn(2, 20, 32)
    names, exact = list(mlp.state_dict()), MLP(32, 2.0, 0.0, tanh).double()
    exact.load_state_dict(mlp.state_dict())
    with torch.no_grad():
        plain = mlp(x.bfloat16())
        linear.pack_products(mlp)
        found, few = mlp(x), mlp(x[:1, :0].bfloat16())
        expected = exact(x.bfloat16().double())
        # with other weights, the copies would be those of the old ones: they are only for models that draw
        assert torch.equal(
            mlp.fc2(x.repeat(1, 1, 2)),
            nn.functional.linear(x.repeat(1, 1, 2).bfloat16(), mlp.fc2.weight, mlp.fc2.bias),
        )
    assert found.dtype == torch.bfloat16 and few.shape == (1, 0, 32) and list(mlp.state_dict()) == names
    assert (found - expected).abs().max() <= 1.1 * (plain - expected).abs().max() + 1e-3
    assert mlp(x.bfloat16()).requires_grad  # as before
