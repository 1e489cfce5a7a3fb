"""Key names of the released TransDiff checkpoints <-> ours.

The released layout is described by its state dict (arXiv 2506.09482, github.com/TransDiff/TransDiff). One tensor has no
place here: a one-step checkpoint's ``z_proj`` projects zeros that are then overwritten, so it is dropped and reported.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# (released, ours), tried in order; a released name that starts with the left side gets the right side instead.
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
# Inside a block: the same parts under other names.
PARTS: tuple[tuple[str, str], ...] = (
    (".attn1.", ".self_attention."),
    (".attn2.wq.", ".cross_attention.query."),
    (".attn2.wk.", ".cross_attention.key."),
    (".attn2.wv.", ".cross_attention.value."),
    (".attn2.", ".cross_attention."),
    (".attn.", ".attention."),
)


def our_name(released: str) -> str:
    """Our key for a released one. Raises ``KeyError`` for a key that the released models do not have."""
    for theirs, ours in PREFIXES:
        if released == theirs or (released.startswith(theirs) and theirs.endswith(".")):
            name = ours + released[len(theirs) :]
            for part, our_part in PARTS:
                name = name.replace(part, our_part)
            return name
    raise KeyError(f"{released!r} is not a key of the released checkpoints.")


def from_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict of a released one, and the released keys that have no place in it."""
    one_step = state["mask_token"].shape[1] == 1
    dropped = [key for key in state if one_step and key.startswith("z_proj.")]
    return {our_name(key): value for key, value in state.items() if key not in dropped}, dropped
