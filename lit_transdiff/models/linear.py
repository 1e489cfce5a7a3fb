"""A linear layer that takes the faster of the two float32 matrix products that torch holds for CPUs.

torch multiplies float32 matrices on CPUs by MKL, which does its best on its maker's processors only; oneDNN, also within torch,
is then 1.1 to 1.2 times as fast, and applies a GELU on the way (benchmarks/README.md). Both are float32 throughout and differ by
rounding. ``torch.backends.mkldnn.flags(enabled=False)`` leaves everything to MKL.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from lit_transdiff.base.hardware import mkl_lags

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
WORTHWHILE = 8e6  # multiply-adds of a product from which oneDNN's longer call pays


class Linear(nn.Linear):
    """``nn.Linear``: [..., in] -> [..., out]; with ``gelu`` the exact GELU of it."""

    def __init__(self, in_features: int, out_features: int, gelu: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not takes_onednn(x, self.weight):
            y = super().forward(x)
        elif self.gelu and not torch.is_grad_enabled():
            return product(x, self.weight, self.bias, "gelu")
        else:
            y = OneDNNLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return F.gelu(y) if self.gelu else y


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is a large one of float32 matrices on a CPU for which oneDNN is the faster."""
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and prod(x.shape[:-1]) * weight.numel() >= WORTHWHILE
        and mkl_lags()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x W^T + b, or its exact GELU (``gelu``), by oneDNN: [..., k] and [n, k] of any strides -> [..., n]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")  # type: ignore[no-any-return]


def product_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **settings: Any) -> int:
    """Operations of ``product``, for torch's counter."""
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
