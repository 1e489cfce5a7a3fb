"""Released files of the families beside TransDiff: their tensors have our names; their shapes give settings.

Shapes: D width, T class tokens, L tokens of an image, c numbers of a token, K classes, p patch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.config import ModelSettings, require
from lit_transdiff.config.acdit import ACDIT_SIZES
from lit_transdiff.config.ardiff import ARDIFF_SIZES
from lit_transdiff.config.flowar import FLOWAR_SIZES
from lit_transdiff.config.mar import MAR_SIZES
from lit_transdiff.config.sit import SIT_SIZES
from lit_transdiff.config.xar import XAR_SIZES
from lit_transdiff.models.paradigm import network_class
from lit_transdiff.models.sit import position_table
from lit_transdiff.models.state_dicts import Mapped, check_layout

State = Mapping[str, Tensor]
Sizes = Mapping[str, Mapping[str, int]]
FIXED = "pos_embed"  # the positions of SiT and DiT: a formula, which a file may leave out
# buffers without weights
NO_WEIGHTS = re.compile(r"(^|[._])(rope|rotary|freqs?|mask|pos(ition)?_ids)([._]|$)")


@dataclass(frozen=True)
class Hints:
    """Facts that the tensors of a file do not tell."""

    latent_channels: int  # channels of the autoencoder's latents
    latent_size: int  # latent pixels per side: of the recipe's model, or of images of 256 px
    num_heads: int | None = None


def blocks_in(state: State, stack: str) -> int:
    """The number of blocks of a list of them."""
    return len({m[1] for key in state if (m := re.match(rf"{re.escape(stack)}\.(\d+)\.", key))})


def square_root(number: float, what: str) -> int:
    """The side of a square of so many. Raises ``ValueError`` if there is none."""
    root = math.isqrt(max(int(number), 0))
    require(root >= 1 and root**2 == number, what, number, "the square of a whole number")
    return root


def patch_of(features: int, hints: Hints) -> int:
    """The patch size of tokens of so many numbers."""
    return square_root(features / hints.latent_channels, "numbers of a token / channels of the autoencoder")


def ratio_of(hidden: int, width: int, gated: bool = False) -> float:
    """The ratio of an MLP; a gated one has 2/3 of the hidden width."""
    ratio = hidden / width * (1.5 if gated else 1.0)
    for near in (round(ratio), ratio, math.nextafter(ratio, math.inf)):
        if int(width * near * 2 / 3 if gated else width * near) == hidden:
            return float(near)
    raise ValueError(
        f"mlp: got a hidden width of {hidden}; allowed: what a ratio to the width {width} gives."
    )


def size_of(shape: dict[str, int], sizes: Sizes, num_heads: int | None) -> dict[str, Any]:
    """The name of the size with these numbers, if there is one, and the heads, which the tensors do not tell.

    The heads of a model without a size are those of a size of the same transformer, or ``num_heads``.
    """
    of_transformer = {k: n for k, n in shape.items() if not k.startswith("head_")}
    same = {name: row for name, row in sizes.items() if row.items() >= shape.items()}
    alike = [row["num_heads"] for row in sizes.values() if row.items() >= of_transformer.items()]
    heads = alike[0] if alike and num_heads is None else num_heads
    given = f"no known size has {shape}; give num_heads"
    if heads is None:
        raise ValueError(f"model.num_heads: {given}")
    allowed = f"{alike[0] if alike else heads}, as the file is of a known size"
    require(not same or heads == alike[0], "model.num_heads", heads, allowed)
    return {**({"size": next(iter(same))} if same else {}), **shape, "num_heads": heads}


def has_variances(state: State) -> bool:
    """Whether SiT or DiT has twice as many outputs as inputs."""
    inputs = math.prod(state["x_embedder.proj.weight"].shape[1:])
    return state["final_layer.linear.weight"].shape[0] == 2 * inputs


def sit_shape(state: State, hints: Hints) -> dict[str, Any]:
    width, channels, p, _ = state["x_embedder.proj.weight"].shape
    tokens = state[FIXED].shape[1] if FIXED in state else (hints.latent_size // p) ** 2
    return {
        **size_of(dict(width=width, num_blocks=blocks_in(state, "blocks")), SIT_SIZES, hints.num_heads),
        "mlp_ratio": ratio_of(state["blocks.0.mlp.fc1.weight"].shape[0], width),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "latent_channels": channels,
        "latent_size": square_root(tokens, "pos_embed: tokens") * p,
        "patch_size": p,
        "learn_sigma": has_variances(state),
    }


def acdit_shape(state: State, hints: Hints) -> dict[str, Any]:
    width, features = state["x_embedder.weight"].shape
    heads = width // state["blocks.0.attn.q_norm.weight"].shape[0]
    return {
        **size_of(dict(width=width, num_blocks=blocks_in(state, "blocks")), ACDIT_SIZES, heads),
        "mlp_ratio": ratio_of(state["blocks.0.mlp.fc1.weight"].shape[0], width),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "latent_channels": hints.latent_channels,
        "latent_size": hints.latent_size,
        "patch_size": patch_of(features, hints),
    }


def of_two_halves(state: State, hints: Hints, sizes: Sizes, **head: int) -> dict[str, Any]:
    """The settings that tensors of xAR and FlowAR tell in the same way."""
    width, features = state["z_proj.weight"].shape
    blocks = {f"{half}_blocks": blocks_in(state, f"{half}_blocks") for half in ("encoder", "decoder")}
    hidden = state["encoder_blocks.0.mlp.fc1_g.weight"].shape[0]
    return {
        **size_of(dict(width=width) | blocks | head, sizes, hints.num_heads),
        "mlp_ratio": ratio_of(hidden, width, gated=True),
        "num_classes": state["class_emb.weight"].shape[0] - 1,
        "latent_channels": hints.latent_channels,
        "patch_size": patch_of(features, hints),
    }


def xar_shape(state: State, hints: Hints) -> dict[str, Any]:
    shape = of_two_halves(state, hints, XAR_SIZES)
    grid = square_root(state["encoder_pos_embed_learned"].shape[1], "encoder_pos_embed_learned: tokens")
    return {**shape, "latent_size": grid * shape["patch_size"]}


def flowar_shape(state: State, hints: Hints) -> dict[str, Any]:
    head = dict(
        head_width=state["flownet.input_proj.weight"].shape[0],
        head_blocks=blocks_in(state, "flownet.res_blocks"),
        head_version=2 if any(".crossattn." in key for key in state) else 1,
    )
    shape = of_two_halves(state, hints, FLOWAR_SIZES, **head)
    tokens = state["encoder_pos_embed_learned"].shape[1]  # 1 + 4 + ... + grid^2 = (4 grid^2 - 1) / 3
    grid = square_root((3 * tokens + 1) / 4, "encoder_pos_embed_learned: tokens of the last scale")
    return {**shape, "latent_size": grid * shape["patch_size"]}


def token_head(state: State) -> dict[str, int]:
    """The size of the network that denoises a token."""
    width = state["diffloss.net.input_proj.weight"].shape[0]
    return {"head_width": width, "head_blocks": blocks_in(state, "diffloss.net.res_blocks")}


def mar_shape(state: State, hints: Hints) -> dict[str, Any]:
    (width, features), tokens = state["z_proj.weight"].shape, state["diffusion_pos_embed_learned"].shape[1]
    blocks = {f"{half}_blocks": blocks_in(state, f"{half}_blocks") for half in ("encoder", "decoder")}
    of_decoder, p = state["decoder_embed.weight"].shape[0], patch_of(features, hints)
    return {
        **size_of(dict(width=width) | blocks | token_head(state), MAR_SIZES, hints.num_heads),
        "decoder_width": None if of_decoder == width else of_decoder,
        "mlp_ratio": ratio_of(state["encoder_blocks.0.mlp.fc1.weight"].shape[0], width),
        "num_classes": state["class_emb.weight"].shape[0],
        "num_class_tokens": state["encoder_pos_embed_learned"].shape[1] - tokens,
        "latent_channels": hints.latent_channels,
        "latent_size": square_root(tokens, "diffusion_pos_embed_learned: tokens") * p,
        "patch_size": p,
    }


def ardiff_shape(state: State, hints: Hints) -> dict[str, Any]:
    width, features = state["x_embedder.weight"].shape
    p, stack = patch_of(features, hints), "transformer.blocks"
    shape = dict(width=width, num_blocks=blocks_in(state, stack)) | token_head(state)
    return {
        **size_of(shape, ARDIFF_SIZES, hints.num_heads),
        "mlp_ratio": ratio_of(state[f"{stack}.0.mlp.fc1.weight"].shape[0], width),
        "num_classes": state["class_emb.weight"].shape[0],
        "latent_channels": hints.latent_channels,
        "latent_size": square_root(state["target_pos_embed"].shape[1], "target_pos_embed: tokens") * p,
        "patch_size": p,
    }


@dataclass(frozen=True)
class FamilyLayout:
    """The released files of a family, whose tensors have our names."""

    paradigm: str
    telling: tuple[str, ...]  # names of tensors that all of its files have, and those of no other family
    shape: Callable[[State, Hints], dict[str, Any]]
    sampling: Mapping[str, Any]  # the released sampler, unless a recipe is given

    def has(self, state: State) -> bool:
        """Whether a state dict is one of the family's; DiT's has outputs for variances, SiT's may."""
        if not all(key in state for key in self.telling):
            return False
        return self.paradigm != "dit" or has_variances(state)

    def settings(self, state: State, hints: Hints) -> dict[str, Any]:
        """The settings of a run that the file implies: of the section model, and the stage."""
        try:
            shape = self.shape(state, hints)
        except (KeyError, IndexError, ValueError) as error:
            if isinstance(error, ValueError) and ": got " in str(error):
                raise
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"not a released {self.paradigm} checkpoint; {reason}") from error
        return {"stage": "pretrain", "model": {"paradigm": self.paradigm, **shape}, "sampling": self.sampling}

    def check_model(self, model: ModelSettings) -> None:
        """Refuse a model that the layout cannot hold: none."""

    def summary(self, model: ModelSettings) -> str:
        """The model in a few words."""
        with torch.device("meta"):
            number = sum(p.numel() for p in network_class(model)(model).parameters())  # type: ignore[call-arg]
        return f"{self.paradigm}, {number / 1e6:.4g} million parameters, {model.num_classes} classes"

    def from_released(self, state: State, config: ModelSettings) -> Mapped:
        """A released state dict as ours; tables that are no weights are kept aside.

        Raises ``ValueError`` with all wrong keys.
        """
        shapes = shapes_of(config)
        aside = {key: value for key, value in state.items() if key not in shapes and NO_WEIGHTS.search(key)}
        found = {key: value for key, value in state.items() if key not in aside}
        made = tuple({FIXED} & (shapes.keys() - found.keys()) if self.paradigm in ("sit", "dit") else ())
        for name in made:
            _, number, width = shapes[name]
            found[name] = position_table(width, math.isqrt(number))[None]
        check_layout(found, shapes)
        return Mapped({key: found[key] for key in shapes}, aside, made)

    def to_released(self, state: State, config: ModelSettings, left_over: State) -> Mapped:
        """Our state dict as a released one, with ``left_over`` put back."""
        shapes = shapes_of(config)
        check_layout(state, shapes)
        return Mapped({key: state[key] for key in shapes} | dict(left_over), {})


def shapes_of(config: ModelSettings) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model."""
    with torch.device("meta"):
        state = network_class(config)(config).state_dict()  # type: ignore[call-arg]
    return {key: tuple(value.shape) for key, value in state.items()}
