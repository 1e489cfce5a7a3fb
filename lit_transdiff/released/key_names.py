"""The layout of released TransDiff checkpoints, and the mapping between their key names and ours.

The layout is that of the released state dicts (arXiv 2506.09482, github.com/TransDiff/TransDiff). Two tensors
have no counterpart here: ``z_proj`` of a one-step checkpoint projects zeros that are then overwritten, so its
tensors are kept aside.

Shapes: D width, T features of a reference token, M mask tokens, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_transdiff.config import SIZES, ModelConfig
from lit_transdiff.models.state_dicts import Mapped, check_layout

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
    ("diffdecoder.net.time_embed.time_embedder.", "decoder.time_embedding."),
    ("diffdecoder.net.time_embed.time_proj.", "decoder.time_embedding.modulation."),
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
    for theirs, ours in PREFIXES:
        if released == theirs or (released.startswith(theirs) and theirs.endswith(".")):
            name = ours + released[len(theirs) :]
            for part, our_part in PARTS:
                name = name.replace(part, our_part)
            return name
    raise KeyError(f"{released!r} is not a key of the released checkpoints.")


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
    blocks = {
        "encoder_blocks": r"encoder_blocks\.(\d+)\.",
        "decoder_blocks": r"diffdecoder\.net\.res_blocks\.(\d+)\.",
    }
    counts = {
        name: len({m[1] for key in state if (m := re.match(pattern, key))})
        for name, pattern in blocks.items()
    }
    size, row = next(
        (
            (name, row)
            for name, row in SIZES.items()
            if row["width"] == width and {k: row[k] for k in counts} == counts
        ),
        ("", {}),
    )
    heads = row.get("num_heads") if num_heads is None else num_heads
    if row and heads != row["num_heads"]:
        allowed = f"{row['num_heads']}, as the checkpoint is of size {size!r}"
        raise ValueError(f"model.num_heads: got {heads}; allowed: {allowed}")
    if heads is None:
        raise ValueError(f"model.num_heads: no known size has width {width} and {counts}; give num_heads")
    return {
        **({"size": size} if size else {}),
        "width": width,
        "num_heads": heads,
        **counts,
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

    The layout has no decoder patches above 1, and in MRAR (released for 256 px only) no references at another
    resolution than the context's.
    """
    multi = config.num_references > 1
    if config.patch_size != 1 or (multi and config.latent_size**2 != config.num_context_tokens):
        raise ValueError(
            "the released layout has model.patch_size=1 and, for MRAR, as many context tokens as the latent "
            "has pixels; got "
            f"patch_size={config.patch_size}, num_references={config.num_references}, "
            f"{config.num_context_tokens} context tokens for {config.latent_size} x {config.latent_size} "
            "pixels"
        )


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All keys of the released layout with their shapes, in the order of the released parameters.

    Raises ``ValueError`` for a model that the layout cannot represent.
    """
    check_model(config)
    multi = config.num_references > 1
    patch = config.reference_patch_size if multi else 1
    d, hidden, tokens = config.width, int(config.width * config.mlp_ratio), config.num_context_tokens
    mlp = {"mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
    shapes: dict[str, tuple[int, ...]] = {
        "fake_latent": (1, d),
        "mask_token": (1, config.tokens_per_reference if multi else 1, d),
        "encoder_pos_embed_learned": (1, config.num_class_tokens + tokens, d),
        "diffusion_pos_embed_learned": (1, tokens, d),
        "class_emb.weight": (config.num_classes, d),
        **linear("z_proj", d, config.latent_channels * patch**2),
        **norm("z_proj_ln", d),
    }
    for i in range(config.encoder_blocks):
        name = f"encoder_blocks.{i}."
        shapes |= (
            norm(f"{name}norm1", d) | linear(f"{name}attn.qkv", 3 * d, d) | linear(f"{name}attn.proj", d, d)
        )
        shapes |= norm(f"{name}norm2", d)
        for part, shape in mlp.items():
            shapes |= linear(name + part, *shape)
    shapes |= norm("encoder_norm", d)
    net = "diffdecoder.net."
    shapes[f"{net}diffusion_pos_embed_learned"] = (1, config.num_tokens, d)
    shapes |= linear(f"{net}time_embed.time_embedder.linear_1", d, 256) | linear(
        f"{net}time_embed.time_embedder.linear_2", d, d
    )
    shapes |= linear(f"{net}time_embed.time_proj", 6 * d, d) | linear(f"{net}cond_embed", d, d)
    shapes |= linear(f"{net}input_proj", d, config.latent_channels)
    for i in range(config.decoder_blocks):
        name = f"{net}res_blocks.{i}."
        shapes[f"{name}scale_shift_table"] = (1, 6, d)
        shapes |= (
            norm(f"{name}norm1", d) | linear(f"{name}attn1.qkv", 3 * d, d) | linear(f"{name}attn1.proj", d, d)
        )
        shapes |= norm(f"{name}norm2", d)
        for part in ("wq", "wk", "wv", "proj"):
            shapes |= linear(f"{name}attn2.{part}", d, d)
        shapes |= norm(f"{name}norm3", d)
        for part, shape in mlp.items():
            shapes |= linear(name + part, *shape)
    shapes[f"{net}final_layer.scale_shift_table"] = (1, 2, d)
    return shapes | linear(f"{net}final_layer.linear", config.latent_channels, d)


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


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
