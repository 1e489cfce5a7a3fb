"""Conversion of latent-diffusion autoencoders (``kl16.ckpt``, arXiv 2112.10752) to and from diffusers.

Both describe the same network with different names; an attention's 1 x 1 convolutions are linear layers in
diffusers ([C, C, 1, 1] <-> [C, C]), and the levels of the decoder are numbered in reverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_transdiff.config.checks import listed
from lit_transdiff.models.state_dicts import Mapped, check_layout

TRAINING_ONLY = "loss."  # the discriminator in some checkpoints
# (latent diffusion, diffusers): key prefixes. {side}: encoder or decoder; {up}: a level of the decoder,
# reversed.
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
# The names of the parts of attentions and residual blocks.
ATTENTION = (
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)
RESIDUAL = (("nin_shortcut.", "conv_shortcut."),)


def is_ldm(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the keys of a latent-diffusion autoencoder."""
    first = "encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"
    return {*first, "post_quant_conv.weight"} <= state.keys()


def num_levels(state: Mapping[str, Any]) -> int:
    """Levels of the encoder; every one but the last halves the size."""
    return 1 + max(
        int(match[1]) for key in state if (match := re.match(r"encoder\.down(?:_blocks)?\.(\d{1,2})\.", key))
    )


def read_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of diffusers' ``AutoencoderKL`` for the shapes of a latent-diffusion state dict.

    Raises ``ValueError`` listing required keys that are missing or have another number of dimensions.
    """
    levels = range(num_levels(state))
    outputs = [f"encoder.down.{level}.block.0.conv2.weight" for level in levels]
    telling = ["encoder.conv_in.weight", *outputs, "decoder.conv_out.weight", "post_quant_conv.weight"]
    wrong = [f"missing: {key}" for key in telling if key not in state]
    flat = [key for key in telling if key in state and state[key].ndim != 4]
    wrong += [f"no convolution: {key} {list(state[key].shape)}" for key in flat]
    if wrong:
        raise ValueError(f"the checkpoint does not fit: {listed(wrong, between='; ')}")
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D"
            if any(key.startswith(f"encoder.down.{level}.attn.") for key in state)
            else "DownEncoderBlock2D"
            for level in levels
        ),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "block_out_channels": tuple(state[key].shape[0] for key in outputs),
        "layers_per_block": max(num_blocks(state, level) for level in levels),
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "mid_block_add_attention": any(".mid.attn_1." in key for key in state),
    }


def num_blocks(state: Mapping[str, Any], level: int) -> int:
    """The number of residual blocks of an encoder level, up to the first missing one."""
    there = {
        int(match[1]) for key in state if (match := re.match(rf"encoder\.down\.{level}\.block\.(\d+)\.", key))
    }
    return next(i for i in range(len(there) + 1) if i not in there)


def rename(key: str, levels: int, back: bool = False) -> str:
    """diffusers' name of a key of latent diffusion, or with ``back`` the reverse; ``KeyError`` if none."""
    theirs, ours = (1, 0) if back else (0, 1)
    for beginning in BEGINNINGS:
        pattern = re.escape(beginning[theirs]).replace(r"\{side\}", "(?P<side>encoder|decoder)")
        pattern = re.sub(r"\\{(level|i|up)\\}", r"(?P<\1>[0-9]+)", pattern)
        match = re.fullmatch(pattern + "(?P<part>.+)", key)
        if match is None:
            continue
        groups = match.groupdict()
        if "up" in groups:
            groups["up"] = levels - 1 - int(groups["up"])
        part = groups.pop("part")
        for names in ATTENTION if "attn" in beginning[0] else RESIDUAL:
            if part.startswith(names[theirs]):
                part = names[ours] + part[len(names[theirs]) :]
                break
        return beginning[ours].format(**groups) + part
    raise KeyError(f"{key!r} has no name in the other layout.")


def check_ldm(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` with the keys, under its own names, where a state dict does not fit ``model``."""
    shapes = {key: tuple(value.shape) for key, value in from_diffusers(model).items()}
    check_layout({key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}, shapes)


def to_diffusers(state: Mapping[str, Tensor]) -> Mapped:
    """diffusers' state dict of a latent-diffusion one; keys used only in training are left over.

    Raises ``KeyError`` for a key that diffusers does not have.
    """
    levels, result = num_levels(state), {}
    for key, value in state.items():
        if not key.startswith(TRAINING_ONLY):
            name = rename(key, levels)
            result[name] = value.flatten(1) if ".attentions." in name and value.ndim == 4 else value
    return Mapped(result, {key: value for key, value in state.items() if key.startswith(TRAINING_ONLY)})


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The latent-diffusion state dict of diffusers'.

    Raises ``KeyError`` for a key that this layout does not have.
    """
    levels, result = num_levels(state), {}
    for key, value in state.items():
        name = rename(key, levels, back=True)
        result[name] = value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value
    return result
