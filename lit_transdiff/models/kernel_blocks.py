"""The blocks of encoder and decoder in training on GPUs, by the kernels of ``lit_transdiff.kernels``.

Between the matrix products, which stay those of torch, each kernel reads and writes memory once: the
residual stream with the next normalisation, the GELU with its dropout, and attention with its dropout. They
compute what ``forward`` of the blocks computes, with other random numbers for dropout. ``forward`` remains in
use wherever they do not apply: on CPUs, in float32, without gradients, and with cached keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.kernels.counting import is_counting
from lit_transdiff.models.decoder import DecoderBlock, FinalLayer, KeysValuesPair
from lit_transdiff.models.encoder import EncoderBlock
from lit_transdiff.models.layers import MLP, KeysValues, SelfAttention

if TYPE_CHECKING:
    from lit_transdiff.kernels.norm import LayerOutput, Norm

log = logging.getLogger(__name__)
HAS_TRITON = find_spec("triton") is not None
Constant = TypeVar("Constant")
HEAD_DIMENSIONS = (16, 32, 64, 128)  # the dimensions that the attention kernel takes


def has_kernels(module: nn.Module) -> bool:
    """Whether there are kernels for a module, on a GPU."""
    attentions = (child for child in module.children() if isinstance(child, SelfAttention))
    dimensions = {attention.proj.in_features // attention.num_heads for attention in attentions}
    return HAS_TRITON and type(module) in KERNELS and dimensions.issubset(HEAD_DIMENSIONS)


def use_kernels(model: nn.Module) -> None:
    """Let modules that have kernels use them wherever they apply."""
    for module in model.modules():
        if has_kernels(module):
            kernels = KERNELS[type(module)]
            module.forward = partial(kernels, module, module.forward)  # type: ignore[method-assign]


def takes_kernels(x: Tensor) -> bool:
    """Whether kernels apply: with gradients, in autocast's bfloat16 or float16, on a GPU where they work."""
    if is_counting():
        return torch.is_grad_enabled()
    kind = x.device.type
    wanted = kind == "cuda" and torch.is_grad_enabled() and torch.is_autocast_enabled(kind)
    return wanted and kernels_work(x.device, torch.get_autocast_dtype(kind))


@cache
def kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles the kernels for a device; if not, log why."""
    try:
        from lit_transdiff.kernels.norm import LayerOutput, Norm, add_norm

        x, ones = torch.ones(1, 1, 16, device=device), torch.ones(16, device=device)
        add_norm(x, LayerOutput(x.to(dtype), ones), Norm(ones, ones))
    except Exception as error:  # compilers and their tools have no common error class
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        log.warning("the Triton kernels do not work here, the blocks run without: %s", reason)
        return False
    return True


def encoder_block(
    block: EncoderBlock,
    plain: Callable[..., Tensor],
    x: Tensor,
    groups: tuple[int, ...] | None = None,
    past: KeysValues | None = None,
) -> Tensor:
    """``EncoderBlock.forward``; ``plain`` is that of the block."""
    if past is not None or not takes_kernels(x):
        return plain(x, groups, past)
    from lit_transdiff.kernels.norm import add_norm

    seeds = seeds_of(4, x)
    visible = None if groups is None else keys_of_queries(groups, x.device)
    x, z = add_norm(x, None, norm_of(block.norm1))
    y = attended(block.attention, z, seeds[0], visible)
    x, z = add_norm(
        x, branch(block.attention.proj, y, block.attention.dropout, seeds[1]), norm_of(block.norm2)
    )
    return add_norm(x, mlp(block.mlp, z, seeds[2:]), None)[0]


def decoder_block(
    block: DecoderBlock,
    plain: Callable[..., Tensor],
    x: Tensor,
    modulation: Tensor,
    keys_values: tuple[KeysValuesPair, ...],
) -> Tensor:
    """``DecoderBlock.forward``; ``plain`` is that of the block."""
    if not takes_kernels(x) or not successive(keys_values):
        return plain(x, modulation, keys_values)
    from lit_transdiff.kernels.attention import cross_attention
    from lit_transdiff.kernels.norm import add_norm

    seeds, across = seeds_of(6, x), block.cross_attention
    rows = (block.scale_shift_table + modulation).float().unbind(1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
    x, z = add_norm(x, None, norm_of(block.norm1, shift_attention, scale_attention))
    y = attended(block.self_attention, z, seeds[0])
    dropout = block.self_attention.dropout
    x, z = add_norm(
        x, branch(block.self_attention.proj, y, dropout, seeds[1], gate_attention), norm_of(block.norm2)
    )
    k, v = (rearrange(z, "b h s d -> b s (h d)") for z in keys_values[-1])
    visible = keys_of_rows(tuple(key.shape[2] for key, _ in keys_values), len(x), x.device)
    p = across.attention_dropout if block.training else 0.0
    query = across.query
    y = cross_attention(z, query.weight, query.bias, k, v, across.num_heads, seeds[2], p, visible)
    x, z = add_norm(
        x, branch(across.proj, y, across.dropout, seeds[3]), norm_of(block.norm3, shift_mlp, scale_mlp)
    )
    return add_norm(x, mlp(block.mlp, z, seeds[4:], gate_mlp), None)[0]


def final_layer(layer: FinalLayer, plain: Callable[..., Tensor], x: Tensor, embedding: Tensor) -> Tensor:
    """``FinalLayer.forward``; ``plain`` is that of the layer."""
    if not takes_kernels(x):
        return plain(x, embedding)
    return F.linear(final_norm(layer, x, embedding), layer.linear.weight, layer.linear.bias)


def final_norm(layer: FinalLayer, x: Tensor, embedding: Tensor) -> Tensor:
    """The modulated normalisation of a final layer."""
    from lit_transdiff.kernels.norm import Norm, add_norm

    shift, scale = (layer.scale_shift_table + embedding[:, None]).float().unbind(1)
    ones = torch.ones(x.shape[-1], device=x.device)
    return add_norm(x, None, Norm(ones, torch.zeros_like(ones), shift, scale, layer.norm.eps))[1]


def seeds_of(count: int, x: Tensor) -> tuple[Tensor, ...]:
    """New seeds of dropout masks, each [1]."""
    from lit_transdiff.kernels.dropout import draw_seeds

    return draw_seeds(count, x.device).split(1)


def norm_of(layer: nn.LayerNorm, shift: Tensor | None = None, scale: Tensor | None = None) -> Norm:
    from lit_transdiff.kernels.norm import Norm

    return Norm(layer.weight, layer.bias, shift, scale, layer.eps)


def branch(
    layer: nn.Linear, x: Tensor, dropout: nn.Dropout, seed: Tensor, gate: Tensor | None = None
) -> LayerOutput:
    """A layer's product with ``x``, to which the stream adds its bias, dropout and gate."""
    from lit_transdiff.kernels.norm import LayerOutput

    return LayerOutput(
        F.linear(x, layer.weight), layer.bias, gate, dropout.p if dropout.training else 0.0, seed
    )


def mlp(layers: MLP, z: Tensor, seeds: tuple[Tensor, ...], gate: Tensor | None = None) -> LayerOutput:
    """The branch of an MLP, with the ``seeds`` of its two dropouts."""
    from lit_transdiff.kernels.gelu import gelu_dropout

    p = layers.dropout.p if layers.training else 0.0
    inner = gelu_dropout(F.linear(z, layers.fc1.weight), layers.fc1.bias, seeds[0], p)
    return branch(layers.fc2, inner, layers.dropout, seeds[1], gate)


def attended(attention: SelfAttention, z: Tensor, seed: Tensor, visible: Tensor | None = None) -> Tensor:
    """The heads' outputs [B, N, D], before their projection."""
    from lit_transdiff.kernels.attention import self_attention

    p = attention.attention_dropout if attention.training else 0.0
    qkv = attention.qkv
    return self_attention(z, qkv.weight, qkv.bias, attention.num_heads, seed, p, visible)


def successive(keys_values: tuple[KeysValuesPair, ...]) -> bool:
    """Whether all contexts are beginnings of the last one, as those of training are."""
    last = keys_values[-1]
    return is_counting() or all(
        mine.data_ptr() == its.data_ptr() and mine.stride() == its.stride() and len(mine) == len(its)
        for pair in keys_values
        for mine, its in zip(pair, last, strict=True)
    )


def made_once(make: Callable[..., Constant]) -> Callable[..., Constant]:
    """``make`` with one result for equal arguments, which captured graphs read, unless it has no values."""
    kept = cache(make)

    @wraps(make)
    def get(*arguments: Any) -> Constant:
        return make(*arguments) if is_counting() else kept(*arguments)

    return get


@made_once
def keys_of_queries(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of keys that each query sees in block-causal attention: int32 [1, N]."""
    ends = chain.from_iterable([end] * size for size, end in zip(groups, accumulate(groups), strict=True))
    return torch.tensor(list(ends), dtype=torch.int32, device=device)[None]


@made_once
def keys_of_rows(lengths: tuple[int, ...], rows: int, device: torch.device) -> Tensor | None:
    """The number of keys that each row of queries sees, if contexts differ in length: int32 [rows, 1]."""
    if len(set(lengths)) == 1:
        return None
    shares = chain.from_iterable([length] * (rows // len(lengths)) for length in lengths)
    return torch.tensor(list(shares), dtype=torch.int32, device=device)[:, None]


KERNELS: dict[type[nn.Module], Callable[..., Tensor]] = {
    EncoderBlock: encoder_block,
    DecoderBlock: decoder_block,
    FinalLayer: final_layer,
}
