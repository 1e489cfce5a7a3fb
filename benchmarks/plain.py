"""TransDiff as the released code formulates it, written plainly over a released state dict and independently
of ours.

Tokens, not latents: x [b, N, c], references [b, L, c p p]; t in [0, 1000]. torch's own kernels, eager;
everything is computed where the paper's formulation has it. The tests compare ours with it, and the fixtures
keep it honest (tests/models/test_plain_parity.py); the benchmarks measure against it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def norm(w: State, name: str, x: Tensor) -> Tensor:
    affine = (w[f"{name}.weight"], w[f"{name}.bias"]) if name else (None, None)
    return F.layer_norm(x, x.shape[-1:], *affine, eps=1e-6)


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention; ``mask`` is added to the scores."""
    b, n, d = q.shape
    q, k, v = (z.reshape(b, -1, heads, d // heads).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, d)


def mlp(w: State, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x)))


def blocks(w: State, pattern: str) -> range:
    return range(sum(1 for key in w if key.startswith(pattern) and key.endswith("mlp.fc1.bias")))


def encode(w: State, heads: int, labels: Tensor, drop: Tensor, references: Tensor | None = None) -> Tensor:
    """z with its position embedding; one-step without ``references``, else MRAR with as many groups as they
    fill plus one.
    """
    d = w["fake_latent"].shape[1]
    masks, context = w["mask_token"], w["diffusion_pos_embed_learned"].shape[1]
    buffer = w["encoder_pos_embed_learned"].shape[1] - context
    keep = (~drop)[:, None].float()
    vector = keep * w["class_emb.weight"][labels] + (1 - keep) * w["fake_latent"]
    one_step = masks.shape[1] == 1
    group = masks.expand(len(labels), context if one_step else -1, d)
    images = group if references is None else torch.cat([group, linear(w, "z_proj", references)], dim=1)
    x = torch.cat([vector[:, None].expand(-1, buffer, -1), images], dim=1)
    n = x.shape[1]
    x = norm(w, "z_proj_ln", x + w["encoder_pos_embed_learned"][:, :n])
    mask = None
    if not one_step:
        block = torch.tensor(
            [0] * buffer + [1 + i // masks.shape[1] for i in range(n - buffer)], device=x.device
        )
        mask = torch.where(block[:, None] >= block[None], 0.0, -1e30)
    for i in blocks(w, "encoder_blocks."):
        name = f"encoder_blocks.{i}"
        q, k, v = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)).chunk(3, dim=-1)
        x = x + linear(w, f"{name}.attn.proj", attend(q, k, v, heads, mask))
        x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x))
    z = norm(w, "encoder_norm", x)[:, buffer:]
    return z + w["diffusion_pos_embed_learned"][:, : z.shape[1]]


def time_features(t: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def velocity(w: State, heads: int, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    net = "diffdecoder.net."
    hidden = linear(w, f"{net}time_embed.time_embedder.linear_1", time_features(t).to(x.dtype))
    temb = linear(w, f"{net}time_embed.time_embedder.linear_2", hidden * torch.sigmoid(hidden))
    shared = linear(w, f"{net}time_embed.time_proj", temb * torch.sigmoid(temb)).reshape(len(t), 6, -1)
    c = linear(w, f"{net}cond_embed", z)
    h = linear(w, f"{net}input_proj", x) + w[f"{net}diffusion_pos_embed_learned"]
    for i in blocks(w, f"{net}res_blocks."):
        name = f"{net}res_blocks.{i}"
        # shift, scale, gate of attention; of the MLP
        rows = (w[f"{name}.scale_shift_table"] + shared)[:, :, None]
        q, k, v = linear(
            w, f"{name}.attn1.qkv", norm(w, f"{name}.norm1", h) * (1 + rows[:, 1]) + rows[:, 0]
        ).chunk(3, -1)
        h = h + rows[:, 2] * linear(w, f"{name}.attn1.proj", attend(q, k, v, heads))
        q = linear(w, f"{name}.attn2.wq", norm(w, f"{name}.norm2", h))
        k, v = linear(w, f"{name}.attn2.wk", c), linear(w, f"{name}.attn2.wv", c)
        h = h + linear(w, f"{name}.attn2.proj", attend(q, k, v, heads))
        h = h + rows[:, 5] * mlp(
            w, f"{name}.mlp", norm(w, f"{name}.norm3", h) * (1 + rows[:, 4]) + rows[:, 3]
        )
    shift, scale = (w[f"{net}final_layer.scale_shift_table"] + temb[:, None]).chunk(2, dim=1)
    return linear(w, f"{net}final_layer.linear", norm(w, "", h) * (1 + scale) + shift)


def loss(w: State, heads: int, x: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """One image's loss; ``t`` [m b] integers and ``noise`` [m b, N, c] of the tiled rows, row r for image r
    mod b.
    """
    tiles = len(t) // len(x)
    x, z = x.repeat(tiles, 1, 1), z.repeat(tiles, 1, 1)
    share = (t / 1000)[:, None, None]
    return (velocity(w, heads, (1 - share) * x + share * noise, t, z) - (noise - x)).square().mean()


def mrar_loss(
    w: State,
    heads: int,
    images: list[Tensor],
    references: Tensor,
    labels: Tensor,
    drop: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean over the images [b, N, c] of a row; ``references`` [b, (R-1) L, c p p]; ``t`` [R, m b], ``noise``
    [R, m b, N, c].
    """
    z = encode(w, heads, labels, drop, references)
    length = z.shape[1] // len(images)
    return sum(
        loss(w, heads, x, z[:, : (i + 1) * length], t[i], noise[i]) for i, x in enumerate(images)
    ) / len(images)


def sample(
    w: State,
    heads: int,
    z: Tensor,
    z_null: Tensor,
    noise: Tensor,
    steps: list[Tensor],
    guidance: float,
    scale_0: float,
    scale_1: float,
) -> Tensor:
    """The released sampler by way of the score; ``steps`` are the Gaussian numbers of
    all steps but the last.
    """
    n = len(steps) + 1
    times = [*torch.linspace(1, 0.04, n).tolist(), 0.0]
    x = noise
    for i in range(n):
        t, dt = times[i], times[i + 1] - times[i]
        rows = [x, x] if guidance > 1 else [x]
        context = torch.cat([z, z_null]) if guidance > 1 else z
        t_rows = torch.full((len(context),), 1000 * t, device=x.device)
        drifts = []
        for v in velocity(w, heads, torch.cat(rows), t_rows, context).chunk(len(rows)):
            score = ((t - 1) * v - x) / t
            drifts.append(v - t * score)
        drift = drifts[1] + guidance * (drifts[0] - drifts[1]) if guidance > 1 else drifts[0]
        last = i == n - 1
        x = (
            x + drift * dt
            if last
            else x + scale_0 * drift * dt + scale_1 * math.sqrt(2 * t) * math.sqrt(-dt) * steps[i]
        )
    return x


def draw_images(
    w: State,
    heads: int,
    labels: Tensor,
    noise: Tensor,
    fresh: list[list[Tensor]],
    guidance: list[float],
    scale_0: float,
    scale_1: float,
) -> list[Tensor]:
    """The successive images [b, N, c] of each label's row, the last of which the released code keeps.

    ``noise`` [b, N, c] begins every image; ``fresh`` are the Gaussian numbers of each image's steps but the
    last, ``guidance`` its scales. The encoder runs on the whole prefix each time, in MRAR on references of 2
    x 2 patches.
    """
    made: list[Tensor] = []
    side = math.isqrt(noise.shape[1])
    for steps, scale in zip(fresh, guidance, strict=True):
        references = torch.cat([to_patches(x, side, 2) for x in made], dim=1) if made else None
        z, null = (
            encode(w, heads, labels, torch.full_like(labels, dropped, dtype=torch.bool), references)
            for dropped in (False, True)
        )
        made.append(sample(w, heads, z, null, noise, steps, scale, scale_0, scale_1))
    return made


def to_patches(x: Tensor, side: int, p: int) -> Tensor:
    """Tokens of one pixel [b, side side, c] -> of p x p pixels [b, (side / p)^2, c p p]: channel, patch row,
    patch column.
    """
    b, _, c = x.shape
    grid = x.reshape(b, side // p, p, side // p, p, c)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(b, (side // p) ** 2, c * p * p)


class Optimizer:
    """AdamW with the released groups, clipping, warm-up by micro-step and average, on the tensors of a state
    dict.
    """

    def __init__(
        self,
        w: State,
        lr: float,
        warmup: float,
        accumulate: int,
        decay: float,
        clip: float,
        rate: float,
        eps: float = 1e-8,
    ) -> None:
        self.w, self.lr, self.warmup, self.accumulate, self.eps = w, lr, warmup, accumulate, eps
        self.decay, self.clip, self.rate = decay, clip, rate
        self.moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in w.items()}
        self.ema = {key: p.detach().clone() for key, p in w.items()}
        self.steps = 0

    def step(self, gradients: State) -> None:
        """One update with the summed gradients of the accumulated passes."""
        total = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        shrink = min(1.0, self.clip / (total + 1e-6))
        lr = self.lr * min(
            1.0, (self.steps * self.accumulate + self.accumulate - 1) / (self.warmup * self.accumulate)
        )
        self.steps += 1
        for key, p in self.w.items():
            g = gradients[key] * shrink
            first, second = self.moments[key]
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.95).add_(g * g, alpha=0.05)
            decayed = p.ndim > 1 and not key.endswith(".bias") and "diffdecoder" not in key
            with torch.no_grad():
                p.mul_(1 - lr * self.decay * decayed)
                p.sub_(
                    lr
                    * (first / (1 - 0.9**self.steps))
                    / ((second / (1 - 0.95**self.steps)).sqrt() + self.eps)
                )
                self.ema[key].mul_(self.rate).add_(p, alpha=1 - self.rate)
