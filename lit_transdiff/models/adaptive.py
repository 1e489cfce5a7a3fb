"""Layers modulated by a condition (adaLN-Zero, arXiv 2212.09748), used by most families.

The names of their weights are those of the released files. Shapes: B rows, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_transdiff.models import layers
from lit_transdiff.models.layers import TIME_FEATURES, layer_norm, modulate


class TimeMLP(nn.Module):
    """A two-layer network on sinusoidal features of a number, which is multiplied by ``scale``."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """``t`` [B] -> [B, D]."""
        return self.mlp(layers.sinusoids(self.scale * t).to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]


def scale_of_time(process: str) -> float:
    """The factor of times of a process that makes them the numbers up to 1000 of discrete steps."""
    return 1000.0 if process == "flow" else 1.0


def whole_time(t: Tensor) -> Tensor:
    """1000 t without its fraction, as xAR and FlowAR are told the times ``t`` in [0, 1] of a flow."""
    return torch.floor(1000.0 * t)


class Modulation(nn.Sequential):
    """``parts`` shifts, scales and gates from a condition, initialised to zero."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[..., D] -> ``parts`` times [..., D]."""
        return super().forward(condition).chunk(self.parts, dim=-1)  # type: ignore[no-any-return]


class AdaptiveOutput(nn.Module):
    """Modulated normalisation (by default without weights) and a projection initialised to zero."""

    def __init__(self, width: int, out_features: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_final = layer_norm(width, affine=False) if norm is None else norm
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [..., D] and a condition that broadcasts to it -> [..., out]."""
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(condition)))


def initialise_adaptive(module: nn.Module) -> None:
    """After ``initialise``: N(0, 0.02) weights of the time network; zero modulations and last projection."""
    if isinstance(module, TimeMLP):
        for i in (0, 2):
            nn.init.normal_(module.mlp[i].weight, std=0.02)  # type: ignore[arg-type]
    zero = {Modulation: lambda m: m[1], AdaptiveOutput: lambda m: m.linear}
    for kind, layer in zero.items():
        if isinstance(module, kind):
            nn.init.zeros_(layer(module).weight)
