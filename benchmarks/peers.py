"""Sampling against diffusers' DiT, the class-conditional latent transformer that a user would take from a
library.

    python benchmarks/peers.py                        # base on a CPU, float32
    python benchmarks/peers.py --size large --batch 16

Both draw 16 x 16 x 16 latents from random weights, with classifier-free guidance, at the same number of
steps; the DiT has our width and heads, patches of one latent pixel (as many tokens as ours), and as many
blocks as bring it nearest to our parameter count. It runs as ``DiTPipeline`` runs it (DDIM, conditional and
unconditional rows in one batch), without autoencoders. They take turns; the table gives medians.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.model_speed import GUIDANCE, Setup, counted, machine, options, sampling_pair, seconds, set_up
from lit_transdiff.config import ModelConfig


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build_dit(config: ModelConfig, blocks: int) -> DiTTransformer2DModel:
    head = config.width // config.num_heads
    return DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=head,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=blocks,
        sample_size=config.latent_size,
        patch_size=1,
        num_embeds_ada_norm=config.num_classes,
        dropout=0.0,
    )


def nearest_dit(setup: Setup) -> DiTTransformer2DModel:
    """The DiT whose parameter count is nearest to our model's."""
    config, wanted = setup.model.config, parameters(setup.model)
    with torch.device("meta"):
        one, two = (parameters(build_dit(config, blocks)) for blocks in (1, 2))
    blocks = round((wanted - one) / (two - one)) + 1
    return build_dit(config, blocks).to(setup.device).eval()


def dit_sampling(dit: DiTTransformer2DModel, setup: Setup, steps: int) -> Callable[[], Tensor]:
    """The loop of ``DiTPipeline``, from labels to latents."""
    scheduler, classes = DDIMScheduler(), setup.model.config.num_classes
    labels = torch.cat([setup.labels, torch.full_like(setup.labels, classes)])
    shape = (len(setup.labels), setup.model.config.latent_channels, *[setup.model.config.latent_size] * 2)

    @torch.no_grad()
    def draw() -> Tensor:
        scheduler.set_timesteps(steps)
        x = torch.randn(shape, device=setup.device)
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            times = t.to(setup.device).expand(len(both))
            conditional, unconditional = dit(both, timestep=times, class_labels=labels).sample.chunk(2)
            x = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), t, x).prev_sample
        return x

    return draw


def main() -> None:
    args = options(__doc__).parse_args()
    device = torch.device(args.device)
    setups = {
        f"ours, {name}": set_up(args.size, references, args.batch, device)
        for name, references in (("one-step", 1), ("MRAR", 4))
    }
    first = next(iter(setups.values()))
    dit = nearest_dit(first)
    contestants = {"diffusers' DiT": (dit_sampling(dit, first, args.steps), parameters(dit))}
    contestants |= {
        name: (sampling_pair(setup, args.steps)[0], parameters(setup.model)) for name, setup in setups.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(args.rounds + 1):
        for name, (draw, _) in contestants.items():
            took = seconds(draw, device)
            if i > 0:  # the first round warms up
                times[name].append(took)
    print(machine(device))
    print(
        f"size {args.size}, batch {args.batch}, {args.steps} steps, guidance {GUIDANCE}, {args.rounds} "
        "rounds\n"
    )
    print("| | parameters | TFLOP | s | time / the DiT's |\n|---|---|---|---|---|")
    base = statistics.median(times["diffusers' DiT"])
    for name, (draw, size) in contestants.items():
        median = statistics.median(times[name])
        print(
            f"| {name} | {size / 1e6:.0f} M | {counted(draw) / 1e12:.2f} | {median:.2f} | "
            f"{median / base:.2f} |"
        )


if __name__ == "__main__":
    main()
