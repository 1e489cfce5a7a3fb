"""The KL autoencoder of latent diffusion, written plainly over its own state dict (that of ``kl16.ckpt``),
without diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
CHANNELS = (32, 32, 64)  # of a small one; three levels, attention in the last as in the released


def make(seed: int = 0, latent: int = 4, channels: tuple[int, ...] = CHANNELS) -> State:
    """Random weights under the keys of the released file."""
    generator = torch.Generator().manual_seed(seed)
    w: State = {}

    def conv(name: str, outputs: int, inputs: int, size: int) -> None:
        w[f"{name}.weight"] = (
            torch.randn(outputs, inputs, size, size, generator=generator) / (inputs * size**2) ** 0.5
        )
        w[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name: str, width: int) -> None:
        w[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        w[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", outputs, inputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", outputs, inputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(side: str, width: int) -> None:
        residual(f"{side}.mid.block_1", width, width)
        attention(f"{side}.mid.attn_1", width)
        residual(f"{side}.mid.block_2", width, width)

    last = len(channels) - 1
    conv("encoder.conv_in", channels[0], 3, 3)
    for level, width in enumerate(channels):
        before = channels[max(0, level - 1)]
        for i in range(2):
            residual(f"encoder.down.{level}.block.{i}", before if i == 0 else width, width)
            if level == last:
                attention(f"encoder.down.{level}.attn.{i}", width)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder", channels[-1])
    norm("encoder.norm_out", channels[-1])
    conv("encoder.conv_out", 2 * latent, channels[-1], 3)
    conv("decoder.conv_in", channels[-1], latent, 3)
    middle("decoder", channels[-1])
    for level, width in reversed(list(enumerate(channels))):
        before = channels[min(last, level + 1)]
        for i in range(3):
            residual(f"decoder.up.{level}.block.{i}", before if i == 0 else width, width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", channels[0])
    conv("decoder.conv_out", 3, channels[0], 3)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    return w


def conv(w: State, name: str, x: Tensor, padding: int = 0, stride: int = 1) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding, stride=stride)


def norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(w: State, name: str, x: Tensor) -> Tensor:
    h = conv(w, f"{name}.conv1", swish(norm(w, f"{name}.norm1", x)), 1)
    h = conv(w, f"{name}.conv2", swish(norm(w, f"{name}.norm2", h)), 1)
    return h + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def attention(w: State, name: str, x: Tensor) -> Tensor:
    y = norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", y).flatten(2) for part in "qkv")  # b c n
    weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)  # b n n
    return x + conv(w, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def middle(w: State, side: str, x: Tensor) -> Tensor:
    x = attention(w, f"{side}.mid.attn_1", residual(w, f"{side}.mid.block_1", x))
    return residual(w, f"{side}.mid.block_2", x)


def encode(w: State, images: Tensor) -> Tensor:
    """Images [b, 3, H, W] -> moments [b, 2c, h, w]."""
    x = conv(w, "encoder.conv_in", images, 1)
    level = 0
    while f"encoder.down.{level}.block.0.conv1.weight" in w:
        for i in range(2):
            x = residual(w, f"encoder.down.{level}.block.{i}", x)
            if f"encoder.down.{level}.attn.{i}.q.weight" in w:
                x = attention(w, f"encoder.down.{level}.attn.{i}", x)
        if f"encoder.down.{level}.downsample.conv.weight" in w:
            x = conv(w, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        level += 1
    x = swish(norm(w, "encoder.norm_out", middle(w, "encoder", x)))
    return conv(w, "quant_conv", conv(w, "encoder.conv_out", x, 1))


def decode(w: State, latents: Tensor) -> Tensor:
    """Latents, not normalised, [b, c, h, w] -> images [b, 3, H, W]."""
    x = middle(w, "decoder", conv(w, "decoder.conv_in", conv(w, "post_quant_conv", latents), 1))
    levels = len({key.split(".")[2] for key in w if key.startswith("decoder.up.")})
    for level in reversed(range(levels)):
        for i in range(3):
            x = residual(w, f"decoder.up.{level}.block.{i}", x)
        if level > 0:
            x = conv(
                w, f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"), 1
            )
    return conv(w, "decoder.conv_out", swish(norm(w, "decoder.norm_out", x)), 1)
