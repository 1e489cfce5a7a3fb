"""The blocks of encoder and decoder in sampling on GPUs, by the kernels of ``lit_transdiff.kernels``.

Each step between the matrix products and torch's attention, which has no dropout here, is one kernel: bias,
gate, residual stream and the next normalisation; bias and GELU. The stream stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from lit_transdiff.models.decoder import DecoderBlock, FinalLayer, KeysValuesPair
from lit_transdiff.models.encoder import EncoderBlock
from lit_transdiff.models.kernel_blocks import HAS_TRITON, branch, final_norm, kernels_work, mlp, norm_of
from lit_transdiff.models.layers import KeysValues


def use_drawing_kernels(model: nn.Module) -> None:
    """Let the modules of a model that only draws use their kernels wherever they apply."""
    for module in model.modules() if HAS_TRITON else ():
        kernels = DRAWING.get(type(module))
        if kernels is not None:
            module.forward = partial(kernels, module, module.forward)  # type: ignore[method-assign]


def has_drawing_kernels(model: nn.Module) -> bool:
    """Whether there are kernels for blocks of a model."""
    return HAS_TRITON and any(type(module) in DRAWING for module in model.modules())


def draws_by_kernels(x: Tensor) -> bool:
    """Whether kernels apply: without gradients, in autocast's precision, on a GPU on which they work."""
    kind = x.device.type
    wanted = kind == "cuda" and not torch.is_grad_enabled() and torch.is_autocast_enabled(kind)
    return wanted and kernels_work(x.device, torch.get_autocast_dtype(kind))


def draw_encoder_block(
    block: EncoderBlock,
    plain: Callable[..., Tensor],
    x: Tensor,
    groups: tuple[int, ...] | None = None,
    past: KeysValues | None = None,
) -> Tensor:
    """``EncoderBlock.forward``; ``plain`` is that of the block."""
    if not draws_by_kernels(x):
        return plain(x, groups, past)
    from lit_transdiff.kernels.norm import add_norm

    within, seed = block.attention, no_seed(x.device)
    x, z = add_norm(x, None, norm_of(block.norm1))
    y = within.heads(z, groups, past)
    x, z = add_norm(x, branch(within.proj, y, within.dropout, seed), norm_of(block.norm2))
    return add_norm(x, mlp(block.mlp, z, (seed, seed)), None)[0]


def draw_decoder_block(
    block: DecoderBlock,
    plain: Callable[..., Tensor],
    x: Tensor,
    modulation: Tensor,
    keys_values: tuple[KeysValuesPair, ...],
) -> Tensor:
    """``DecoderBlock.forward``; ``plain`` is that of the block."""
    if not draws_by_kernels(x):
        return plain(x, modulation, keys_values)
    from lit_transdiff.kernels.norm import add_norm

    rows = (block.scale_shift_table + modulation).float().unbind(1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
    within, across, seed = block.self_attention, block.cross_attention, no_seed(x.device)
    x, z = add_norm(x, None, norm_of(block.norm1, shift_attention, scale_attention))
    added = branch(within.proj, within.heads(z), within.dropout, seed, gate_attention)
    x, z = add_norm(x, added, norm_of(block.norm2))
    added = branch(across.proj, across.heads(z, keys_values), across.dropout, seed)
    x, z = add_norm(x, added, norm_of(block.norm3, shift_mlp, scale_mlp))
    return add_norm(x, mlp(block.mlp, z, (seed, seed), gate_mlp), None)[0]


def draw_final_layer(layer: FinalLayer, plain: Callable[..., Tensor], x: Tensor, embedding: Tensor) -> Tensor:
    """``FinalLayer.forward``; ``plain`` is that of the layer."""
    if not draws_by_kernels(x):
        return plain(x, embedding)
    return layer.linear(final_norm(layer, x, embedding))  # type: ignore[no-any-return]


@cache  # captured graphs read it
def no_seed(device: torch.device) -> Tensor:
    """A seed for dropout, which is off."""
    return torch.zeros(1, dtype=torch.int64, device=device)


DRAWING: dict[type[nn.Module], Callable[..., Tensor]] = {
    EncoderBlock: draw_encoder_block,
    DecoderBlock: draw_decoder_block,
    FinalLayer: draw_final_layer,
}
