"""The fastest of torch's matrix products for CPUs, in the linear layers of a model.

torch multiplies float32 matrices on CPUs by MKL, which does its best on its maker's processors only; oneDNN,
also within torch, is then 1.1 to 1.2 times as fast, and applies a GELU on the way (benchmarks/README.md).
Both are float32 throughout and differ by rounding. ``torch.backends.mkldnn.flags(enabled=False)`` leaves
everything to MKL.

In bfloat16, oneDNN puts the weights into an order of its own, again in every product. For a model that only
draws they are kept in it: 1.2 to 1.3 times as fast again, with the same bits, except for the GELU, which is
then of sums that were not rounded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from lit_transdiff.base.hardware import has_fast_bfloat16, mkl_lags
from lit_transdiff.models.layers import MLP

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
WORTHWHILE = 8e6  # multiply-adds of a product from which oneDNN's longer call pays


def use_faster_product(model: nn.Module) -> None:
    """Use oneDNN's product in the linear layers of a model on CPUs where it is faster."""
    if HAS_ONEDNN and mkl_lags():
        choose_product(model)


def pack_products(model: nn.Module) -> None:
    """Keep the bfloat16 weights of a model that only draws in oneDNN's order, too, on CPUs with bfloat16."""
    if not has_fast_bfloat16() or not packs():
        return
    choose_product(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and "forward" in vars(module):
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())


@cache
def packs() -> bool:
    """Whether oneDNN orders bfloat16 weights here, which its own settings can forbid, too."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(2, 2, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):  # no such operation; not on this processor
        return False
    return True


def choose_product(model: nn.Module) -> None:
    """Let the linear layers choose between products, and apply a GELU on the way."""
    for module in list(model.modules()):  # parents precede their layers
        if isinstance(module, MLP) and isinstance(module.gelu, nn.GELU) and module.gelu.approximate == "none":
            module.fc1.forward, module.gelu = partial(product_of, module.fc1, gelu=True), nn.Identity()  # type: ignore[method-assign]
        elif (
            isinstance(module, nn.Linear)
            and type(module).forward is nn.Linear.forward
            and "forward" not in vars(module)
        ):
            module.forward = partial(product_of, module)  # type: ignore[method-assign]


def product_of(layer: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
    """The forward pass of a layer, [..., in] -> [..., out]; with ``gelu`` the exact GELU of it."""
    packed = getattr(layer, "packed", None)
    if torch.compiler.is_compiling():
        y = F.linear(x, layer.weight, layer.bias)
    elif packed is not None and takes_packed(x, layer.weight):
        return product(x.to(layer.weight.dtype), packed, layer.bias, "gelu" if gelu else "none")
    elif not takes_onednn(x, layer.weight):
        y = F.linear(x, layer.weight, layer.bias)
    elif gelu and not torch.is_grad_enabled():
        return product(x, layer.weight, layer.bias, "gelu")
    else:
        y = OneDNNLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return F.gelu(y) if gelu else y


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is large, in float32 and on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and prod(x.shape[:-1]) * weight.numel() >= WORTHWHILE
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def takes_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of packed weights is large."""
    large = prod(x.shape[:-1]) * weight.numel() >= WORTHWHILE
    return large and not torch.is_grad_enabled() and bool(torch.backends.mkldnn.enabled)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x W^T + b, or its exact GELU (``gelu``), by oneDNN: [..., k] and [n, k] of any strides -> [..., n]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")  # type: ignore[no-any-return]


def product_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **settings: Any) -> int:
    """The FLOPs of ``product``, for torch's counter."""
    return 2 * prod(x) * weight[0]


if HAS_ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(product_flops)


class OneDNNLinear(torch.autograd.Function):
    """x W^T + b and its gradients, all by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            product(gradient, weight.t()) if of_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
