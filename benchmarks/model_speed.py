"""Training steps and sampling against a plain eager implementation of the paper's formulation (``plain.py``).

    python benchmarks/model_speed.py --size base                             # on a CPU: batch 1; some minutes
    python benchmarks/model_speed.py --size large --batch 64 --precision bf16 --compile    # on a GPU

Both compute the same images and the same loss from the same weights and numbers (checked first), in the same
precision (bf16: autocast). They take turns; the table gives medians, their ratio, the arithmetic of each
(counted by torch), and the share of what the fastest large matrix product of this machine reaches in the same
run. Dropout is off. ``--compile`` compiles our blocks.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import plain
from lit_transdiff.base.hardware import products
from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import SIZES, FlowConfig, ModelConfig, OptimizerConfig, RunConfig, SamplingConfig
from lit_transdiff.flow.straight import Flow
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.execution import compile_blocks
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.models.tokens import patchify
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.key_names import to_released
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.stages.optim import build_optimizer

GUIDANCE, DRIFT_SCALE, NOISE_SCALE = 1.3, 0.89, 0.95
DRAWS = {1: 4, 4: 2}  # noise draws an image, by references, as in the paper
EMA_DECAY, CLIP = 0.9999, 3.0


@dataclass
class Setup:
    """A model with random weights, its released state dict, and one batch."""

    model: TransDiff
    heads: int
    weights: dict[str, Tensor]
    labels: Tensor  # [B]
    seeds: list[int]
    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def references(self) -> int:
        return self.model.config.num_references


def set_up(
    size: str,
    references: int,
    batch: int,
    device: torch.device,
    precision: str = "fp32",
    compiled: bool = False,
) -> Setup:
    config = ModelConfig(size=size, num_references=references, attention_dropout=0.0, projection_dropout=0.0)
    torch.manual_seed(0)
    model = build_model(config).to(device)
    assert isinstance(model, TransDiff)
    torch.nn.init.normal_(model.decoder.final.linear.weight, std=0.02)  # else every velocity is zero
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    weights = to_released(state, config, {}).state
    labels = torch.arange(batch, device=device) % config.num_classes
    if compiled:
        compile_blocks([*model.encoder.blocks, *model.decoder.blocks])
    return Setup(model, config.num_heads, weights, labels, list(range(batch)), device, precision)


def tokens(latents: Tensor) -> Tensor:
    return rearrange(latents, "... c h w -> ... (h w) c")


def sampling_pair(setup: Setup, steps: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(ours, plain), each giving the last image's latents [B, c, h, w]."""
    sampling = SamplingConfig(
        num_steps=steps, guidance_scale=GUIDANCE, drift_scale=DRIFT_SCALE, noise_scale=NOISE_SCALE
    )
    sampling = replace(sampling, precision=setup.precision)
    shape = (setup.model.config.latent_channels, *[setup.model.config.latent_size] * 2)
    generator = Generator(setup.model, IdentityAutoencoder(shape[0]), RunConfig(model=setup.model.config), [])
    generator = generator.at(setup.precision)

    def ours() -> Tensor:
        generator.model.eval()
        return generator.latents(setup.labels, setup.seeds, sampling)[:, -1]

    @torch.no_grad()
    def theirs() -> Tensor:
        draw = PerImageNormal(setup.seeds, setup.device)
        noise = tokens(draw(*shape))
        fresh = [[tokens(draw(*shape)) for _ in range(steps - 1)] for _ in range(setup.references)]
        scales = [GUIDANCE] * setup.references
        with setup.autocast():
            images = plain.draw_images(
                setup.weights, setup.heads, setup.labels, noise, fresh, scales, DRIFT_SCALE, NOISE_SCALE
            )
        return rearrange(images[-1], "b (h w) c -> b c h w", h=shape[-1])

    return ours, theirs


def training_pair(setup: Setup) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(ours, plain): one step each (forward, backward, clipping, AdamW, average), giving the loss."""
    model, references, draws, batch = (
        setup.model,
        setup.references,
        DRAWS[setup.references],
        len(setup.labels),
    )
    size = model.config.latent_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, references, 16, size, size, generator=generator).to(setup.device)
    t = (torch.rand(references, draws * batch, generator=generator) * 1000).floor().to(setup.device)
    noise = torch.randn(references, draws * batch, 16, size, size, generator=generator).to(setup.device)
    drop = torch.zeros_like(setup.labels, dtype=torch.bool)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-6, ema_decay=EMA_DECAY))

    flow = Flow(FlowConfig(), "velocity")

    def ours() -> Tensor:
        model.train()
        rows = repeat(x, "b r c h w -> (r m b) c h w", m=draws)
        with setup.autocast():
            memory = model.memory(model.encode(setup.labels, x[:, :-1], drop), every_reference=True)
            e, times = noise.flatten(0, 1), t.flatten() / 1000
            x_t = flow.noised(rows, e, times)
            loss = flow.losses(model.velocity(x_t, times, memory), rows, e, times, x_t).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    w = {key: value.clone().requires_grad_() for key, value in setup.weights.items()}
    average = [value.detach().clone() for value in w.values()]
    adam = torch.optim.AdamW(w.values(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.02)

    def theirs() -> Tensor:
        images, noises = [tokens(x[:, r]) for r in range(references)], tokens(noise)
        with setup.autocast():
            if references > 1:
                past = patchify(x[:, :-1], 2).flatten(1, 2)
                loss = plain.mrar_loss(w, setup.heads, images, past, setup.labels, drop, t, noises)
            else:
                z = plain.encode(w, setup.heads, setup.labels, drop)
                loss = plain.loss(w, setup.heads, images[0], z, t[0], noises[0])
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), CLIP)
        adam.step()
        with torch.no_grad():
            for value, p in zip(average, w.values(), strict=True):
                value.mul_(EMA_DECAY).add_(p, alpha=1 - EMA_DECAY)
        return loss.detach()

    return ours, theirs


def machine(device: torch.device) -> str:
    """The machine and the versions, for the head of a table."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    return f"{where}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product, by the fastest kernel that torch has for
    it.
    """
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(seconds(partial(product, a, a), device) for product in products(device))


def counted(function: Callable[[], Tensor]) -> float:
    """Floating-point operations of the matrix products and attentions of one call."""
    # Not every release of torch counts the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def measure(
    name: str, pair: tuple[Callable[[], Tensor], Callable[[], Tensor]], rounds: int, setup: Setup
) -> str:
    """A row of the table; raises ``ValueError`` when the two do not compute the same."""
    (ours, theirs), device = pair, setup.device
    first, second = ours(), theirs()
    error = float((first - second).abs().max() / second.abs().max())
    if error > (0.1 if setup.precision == "bf16" else 1e-3):
        raise ValueError(f"{name}: ours and plain differ by {error:.1e} of the largest value")
    work = counted(ours), counted(theirs)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(rounds):
        times[0].append(seconds(ours, device))
        times[1].append(seconds(theirs, device))
        times[2].append(product_rate(device, setup.precision))
    mine, plainly, ceiling = (statistics.median(values) for values in times)
    ratios = sorted(b / a for a, b in zip(times[0], times[1], strict=True))
    share = work[0] / mine / ceiling
    return (
        f"| {name} | {mine:.2f} | {plainly:.2f} | {plainly / mine:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
        f"| {work[0] / 1e12:.3f} | {work[1] / 1e12:.3f} | {share:.0%} |"
    )


def options(text: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark of models."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(machine(device))
    how = args.precision + ", our blocks compiled" * args.compile
    print(
        f"{how}, size {args.size}, batch {args.batch}, {args.steps} solver steps, guidance {GUIDANCE}, "
        f"{args.rounds} rounds\n"
    )
    print(
        "| | ours, s | plain, s | plain / ours (range) | ours, TFLOP | plain, TFLOP | ours, share of a "
        "matrix product's rate |"
    )
    print("|---|---|---|---|---|---|---|")
    for references, name in ((1, "one-step"), (4, "MRAR")):
        setup = set_up(args.size, references, args.batch, device, args.precision, args.compile)
        print(measure(f"{name}, sampling", sampling_pair(setup, args.steps), args.rounds, setup), flush=True)
        print(measure(f"{name}, training step", training_pair(setup), args.rounds, setup), flush=True)


if __name__ == "__main__":
    main()
