"""Autoencoder checkpoints in the layout of latent diffusion (``kl16.ckpt``, arXiv 2112.10752) <-> diffusers' ``AutoencoderKL``.

The two describe the same network under other names; an attention's 1 x 1 convolutions are linear layers in diffusers
([C, C, 1, 1] <-> [C, C]), and the levels of the decoder are counted from the other end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_transdiff.models.layout import Mapped

TRAINING_ONLY = "loss."  # the discriminator that some checkpoints carry
# (latent diffusion, diffusers): how a key begins. {side}: encoder or decoder; {up}: a level of the decoder, reversed.
BEGINNINGS: tuple[tuple[str, str], ...] = (
    ("quant_conv.", "quant_conv."),
    ("post_quant_conv.", "post_quant_conv."),
    ("{side}.conv_in.", "{side}.conv_in."),
    ("{side}.conv_out.", "{side}.conv_out."),
    ("{side}.norm_out.", "{side}.conv_norm_out."),
    ("{side}.mid.block_1.", "{side}.mid_block.resnets.0."),
    ("{side}.mid.block_2.", "{side}.mid_block.resnets.1."),
    ("{side}.mid.attn_1.", "{side}.mid_block.attentions.0."),
    ("encoder.down.{level}.block.{i}.", "encoder.down_blocks.{level}.resnets.{i}."),
    ("encoder.down.{level}.attn.{i}.", "encoder.down_blocks.{level}.attentions.{i}."),
    ("encoder.down.{level}.downsample.conv.", "encoder.down_blocks.{level}.downsamplers.0.conv."),
    ("decoder.up.{up}.block.{i}.", "decoder.up_blocks.{up}.resnets.{i}."),
    ("decoder.up.{up}.upsample.conv.", "decoder.up_blocks.{up}.upsamplers.0.conv."),
)
# How the parts of an attention, or of a residual block, are called.
ATTENTION = (("norm.", "group_norm."), ("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("proj_out.", "to_out.0."))
RESIDUAL = (("nin_shortcut.", "conv_shortcut."),)


def is_ldm(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the keys of a latent-diffusion autoencoder."""
    return {"encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "post_quant_conv.weight"} <= state.keys()


def num_levels(state: Mapping[str, Any]) -> int:
    """Levels of the encoder; every one but the last halves the size."""
    return len({match[1] for key in state if (match := re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", key))})


def read_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of diffusers' ``AutoencoderKL`` that the shapes of a latent-diffusion state dict tell."""
    levels = range(num_levels(state))
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if f"encoder.down.{level}.attn.0.q.weight" in state else "DownEncoderBlock2D"
            for level in levels
        ),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "block_out_channels": tuple(state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in levels),
        "layers_per_block": len({key.split(".")[4] for key in state if key.startswith("encoder.down.0.block.")}),
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }


def rename(key: str, levels: int, back: bool = False) -> str:
    """diffusers' name of a key of latent diffusion, or with ``back`` the reverse; ``KeyError`` for a key that has none."""
    theirs, ours = (1, 0) if back else (0, 1)
    for beginning in BEGINNINGS:
        pattern = re.escape(beginning[theirs]).replace(r"\{side\}", "(?P<side>encoder|decoder)")
        pattern = re.sub(r"\\{(level|i|up)\\}", r"(?P<\1>[0-9]+)", pattern)
        match = re.fullmatch(pattern + "(?P<part>.+)", key)
        if match is None:
            continue
        found = match.groupdict()
        if "up" in found:
            found["up"] = levels - 1 - int(found["up"])
        part = found.pop("part")
        for names in ATTENTION if "attn" in beginning[0] else RESIDUAL:
            if part.startswith(names[theirs]):
                part = names[ours] + part[len(names[theirs]) :]
                break
        return beginning[ours].format(**found) + part
    raise KeyError(f"{key!r} has no name in the other layout.")


def to_diffusers(state: Mapping[str, Tensor]) -> Mapped:
    """diffusers' state dict of a latent-diffusion one; what only its training needed is left over.

    Raises ``ValueError`` listing the keys that have no place.
    """
    levels, result, strange = num_levels(state), {}, []
    for key, value in state.items():
        if key.startswith(TRAINING_ONLY):
            continue
        try:
            name = rename(key, levels)
        except KeyError:
            strange.append(f"{key} {list(value.shape)}")
            continue
        result[name] = value.flatten(1) if ".attentions." in name and value.ndim == 4 else value
    if strange:
        raise ValueError("the checkpoint does not fit:\n  unexpected: " + "\n  unexpected: ".join(strange))
    return Mapped(result, {key: value for key, value in state.items() if key.startswith(TRAINING_ONLY)})


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The latent-diffusion state dict of diffusers'. Raises ``KeyError`` for a key that this layout does not have."""
    levels, result = num_levels(state), {}
    for key, value in state.items():
        name = rename(key, levels, back=True)
        result[name] = value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value
    return result
