"""The layout of released TransDiff checkpoints, and the mapping between their key names and ours.

The layout is that of the released state dicts (arXiv 2506.09482, github.com/TransDiff/TransDiff). Two tensors
have no counterpart here: ``z_proj`` of a one-step checkpoint projects zeros that are then overwritten, so its
tensors are kept aside.

Shapes: D width, T features of a reference token, M mask tokens, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lit_transdiff.config import SIZES, ModelConfig, require
from lit_transdiff.models.state_dicts import Mapped, check_layout
from lit_transdiff.released.families import blocks_in, shapes_of

# (released, ours), tried in order; a prefix of a released name is replaced by the right side.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("fake_latent", "encoder.null_class"),
    ("mask_token", "encoder.mask_tokens"),
    ("encoder_pos_embed_learned", "encoder.position"),
    ("diffusion_pos_embed_learned", "encoder.context_position"),
    ("class_emb.", "encoder.class_embedding."),
    ("z_proj_ln.", "encoder.input_norm."),
    ("z_proj.", "encoder.reference_projection."),
    ("encoder_blocks.", "encoder.blocks."),
    ("encoder_norm.", "encoder.norm."),
    ("diffdecoder.net.diffusion_pos_embed_learned", "decoder.position"),
    ("diffdecoder.net.time_embed.time_proj.", "decoder.time_embedding.modulation."),
    ("diffdecoder.net.time_embed.time_embedder.", "decoder.time_embedding."),
    ("diffdecoder.net.cond_embed.", "decoder.context_projection."),
    ("diffdecoder.net.input_proj.", "decoder.input_projection."),
    ("diffdecoder.net.res_blocks.", "decoder.blocks."),
    ("diffdecoder.net.final_layer.", "decoder.final."),
)
# The same parts inside a block.
PARTS: tuple[tuple[str, str], ...] = (
    (".attn1.", ".self_attention."),
    (".attn2.wq.", ".cross_attention.query."),
    (".attn2.wk.", ".cross_attention.key."),
    (".attn2.wv.", ".cross_attention.value."),
    (".attn2.", ".cross_attention."),
    (".attn.", ".attention."),
)
DEAD = ("z_proj.weight", "z_proj.bias")  # keys of a one-step checkpoint that get no gradient
# Keys of every released checkpoint from which the model's shape is read: their number of dimensions.
TELLING = {
    "fake_latent": 2,
    "mask_token": 3,
    "encoder_pos_embed_learned": 3,
    "diffusion_pos_embed_learned": 3,
    "class_emb.weight": 2,
    "encoder_blocks.0.mlp.fc1.weight": 2,
    "diffdecoder.net.diffusion_pos_embed_learned": 3,
    "diffdecoder.net.res_blocks.0.mlp.fc1.weight": 2,
    "diffdecoder.net.final_layer.linear.weight": 2,
}


def is_released(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the keys of a released TransDiff checkpoint."""
    return "encoder_pos_embed_learned" in state and any(key.startswith("diffdecoder.") for key in state)


def our_name(released: str) -> str:
    """Our key for a released one. Raises ``KeyError`` for a key that the released models do not have."""
    return renamed(released, PREFIXES, PARTS)


def released_name(ours: str) -> str:
    """The inverse of ``our_name``."""
    return renamed(ours, *([(new, old) for old, new in table] for table in (PREFIXES, PARTS)))


def renamed(key: str, prefixes: Iterable[tuple[str, str]], parts: Iterable[tuple[str, str]]) -> str:
    """``key`` with the first of ``prefixes`` that it has, and all ``parts``, replaced by their partners."""
    for old, new in prefixes:
        if key == old or (key.startswith(old) and old.endswith(".")):
            name = new + key[len(old) :]
            for part, new_part in parts:
                name = name.replace(part, new_part)
            return name
    raise KeyError(f"{key!r} is not a key of the checkpoints of TransDiff.")


def check_telling(state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` with the keys in TELLING that are missing, empty or wrongly shaped."""
    missing = [key for key in TELLING if key not in state]
    if missing:
        raise ValueError(f"not a released TransDiff checkpoint; missing: {', '.join(missing)}")
    wrong = [f"{key} {list(state[key].shape)}" for key, ndim in TELLING.items() if state[key].ndim != ndim]
    if wrong:
        raise ValueError(f"not a released TransDiff checkpoint; wrong dimensions: {', '.join(wrong)}")
    empty = [f"{key} {list(state[key].shape)}" for key in TELLING if state[key].numel() == 0]
    if empty:
        raise ValueError(f"not a released TransDiff checkpoint; empty: {', '.join(empty)}")


def read_shape(state: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """The settings of ``ModelConfig`` implied by the shapes in a released state dict.

    The shapes do not determine the number of heads: it is taken from the row of ``SIZES`` with the same width
    and blocks, or from ``num_heads``. Raises ``ValueError`` for missing keys and wrong shapes, for an unknown
    size without ``num_heads``, and for a ``num_heads`` that differs from that of a known size.
    """
    check_telling(state)
    width = state["fake_latent"].shape[1]
    channels = state["diffdecoder.net.final_layer.linear.weight"].shape[0]
    context, masks = state["diffusion_pos_embed_learned"].shape[1], state["mask_token"].shape[1]
    if context % masks:
        raise ValueError(
            f"mask_token: got {masks} tokens; allowed: 1, or as many as divide the {context} context tokens"
        )
    stacks = {"encoder_blocks": "encoder_blocks", "decoder_blocks": "diffdecoder.net.res_blocks"}
    counts = {name: blocks_in(state, stack) for name, stack in stacks.items()}
    shape = {"width": width, **counts}
    size, row = next(((n, row) for n, row in SIZES.items() if row.items() >= shape.items()), ("", {}))
    heads = row.get("num_heads") if num_heads is None else num_heads
    if row and heads != row["num_heads"]:
        allowed = f"{row['num_heads']}, as the checkpoint is of size {size!r}"
        raise ValueError(f"model.num_heads: got {heads}; allowed: {allowed}")
    if heads is None:
        raise ValueError(f"model.num_heads: no known size has width {width} and {counts}; give num_heads")
    return {
        **({"size": size} if size else {}),
        **shape,
        "num_heads": heads,
        "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["class_emb.weight"].shape[0],
        "num_class_tokens": state["encoder_pos_embed_learned"].shape[1] - context,
        "latent_channels": channels,
        "latent_size": math.isqrt(state["diffdecoder.net.diffusion_pos_embed_learned"].shape[1]),
        "patch_size": 1,
        "num_context_tokens": context,
        "num_references": 1 if masks == 1 else context // masks,
    }


def check_model(config: ModelConfig) -> None:
    """Refuse a model that the released layout cannot represent.

    The layout has the default networks, no decoder patches above 1, and in MRAR (released for 256 px only) no
    references at another resolution than the context's.
    """
    for name in ("encoder", "decoder", "condition"):
        allowed = f"{getattr(ModelConfig, name)}, as in the released files"
        fits = getattr(config, name) == getattr(ModelConfig, name)
        require(fits, f"model.{name}", getattr(config, name), allowed)
    multi = config.num_references > 1
    if config.patch_size != 1 or (multi and config.latent_size**2 != config.num_context_tokens):
        raise ValueError(
            "the released layout has model.patch_size=1 and, for MRAR, as many context tokens as the latent "
            f"has pixels; got patch_size={config.patch_size}, num_references={config.num_references}, "
            f"{config.num_context_tokens} context tokens for {config.latent_size} x {config.latent_size} "
            "pixels"
        )


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All keys of the released layout with their shapes, in the order of the released parameters.

    Raises ``ValueError`` for a model that the layout cannot represent.
    """
    check_model(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes_of(config).items():
        shapes[released_name(name)] = shape
        if name == "encoder.class_embedding.weight" and config.num_references == 1:
            shapes |= zip(DEAD, ((config.width, config.latent_channels), (config.width,)), strict=True)
    return shapes


def from_released(state: Mapping[str, Tensor], config: ModelConfig) -> Mapped:
    """Convert a released state dict to ours, tensors unchanged. Raises ``ValueError`` with all wrong keys."""
    check_layout(state, released_shapes(config))
    dead = DEAD if config.num_references == 1 else ()
    return Mapped(
        {our_name(key): value for key, value in state.items() if key not in dead},
        {key: state[key] for key in dead},
    )


def to_released(state: Mapping[str, Tensor], config: ModelConfig, left_over: Mapping[str, Tensor]) -> Mapped:
    """Convert our state dict to a released one in the released order, with ``left_over`` put back.

    Tensors that never existed are filled with zeros and are the ``left_over`` of the result. Raises
    ``ValueError`` with all wrong keys.
    """
    shapes = released_shapes(config)
    dead = DEAD if config.num_references == 1 else ()
    names = {key: our_name(key) for key in shapes if key not in dead}
    kind = next(iter(state.values()))
    made = {key: kind.new_zeros(shapes[key]) for key in dead if key not in left_over}
    result = {key: state[names[key]] for key in names if names[key] in state} | dict(left_over) | made
    extra = {f"{key} (ours)": value for key, value in state.items() if key not in names.values()}
    check_layout(result | extra, shapes)
    return Mapped({key: result[key] for key in shapes}, made)
