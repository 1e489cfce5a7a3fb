"""The faster of torch's two float32 matrix products for CPUs, in the linear layers of a model.

torch multiplies float32 matrices on CPUs by MKL, which does its best on its maker's processors only; oneDNN,
also within torch, is then 1.1 to 1.2 times as fast, and applies a GELU on the way (benchmarks/README.md).
Both are float32 throughout and differ by rounding. ``torch.backends.mkldnn.flags(enabled=False)`` leaves
everything to MKL.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from lit_transdiff.base.hardware import mkl_lags
from lit_transdiff.models.layers import MLP

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
WORTHWHILE = 8e6  # multiply-adds of a product from which oneDNN's longer call pays


def use_faster_product(model: nn.Module) -> None:
    """Use oneDNN's product in the linear layers of a model on CPUs where it is faster."""
    if not HAS_ONEDNN or not mkl_lags():
        return
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
    if torch.compiler.is_compiling() or not takes_onednn(x, layer.weight):
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
