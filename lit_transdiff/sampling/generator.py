"""From labels to images: the loop over references, one generator per image.

Shapes: B images, R references, S context tokens, D width, c h w a latent, C H W an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch
from einops import rearrange
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal, mix
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.config import RunConfig, SamplingConfig, require, unknown
from lit_transdiff.config.sampling import Precision
from lit_transdiff.flow.guidance import GUIDANCE, Pair, guide
from lit_transdiff.flow.solvers import GRIDS, SOLVERS, Velocity, solve
from lit_transdiff.models.autoencoder import Autoencoder, load_autoencoder
from lit_transdiff.models.context import ContextFn, Contexts, ContextStream, null_contexts
from lit_transdiff.models.decoder import Memory
from lit_transdiff.models.execution import compile_blocks, replay_decoder, round_linear, twin
from lit_transdiff.models.state_dicts import check_layout
from lit_transdiff.models.transdiff import TransDiff


def check_sampling(sampling: SamplingConfig) -> None:
    """Refuse a solver, a grid or a schedule of guidance that is in no table."""
    for field, table in (("solver", SOLVERS), ("grid", GRIDS), ("guidance", GUIDANCE)):
        if getattr(sampling, field) not in table:
            raise unknown(f"sampling.{field}", getattr(sampling, field), table)


@torch.no_grad()
def generate(
    model: TransDiff,
    labels: Tensor,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    contexts: ContextFn = ContextStream,
    unconditional_contexts: Callable[[], Contexts] | None = None,
) -> Tensor:
    """Latents [B, R, c, h, w]: for each of ``labels`` [B] the R successive images of its row (arXiv 2506.09482, section 3.3).

    Image r is decoded from the class and images 0 .. r-1, clean. All numbers of a row come from its own seed, so it does not
    depend on the rest of the batch. ``contexts`` replaces the model's encoder (see ``models.fusion``), ``unconditional_contexts``
    what the model makes of the null class.
    """
    config = model.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    draw = PerImageNormal(seeds, labels.device)
    noise = draw(*shape)
    images = noise.new_zeros(len(labels), 0, *shape)
    conditional = Remembered(model, contexts(model, labels))
    unconditional = Remembered(model, (unconditional_contexts or null_contexts(model))())
    for r in range(config.num_references):
        if r > 0 and not sampling.reuse_noise:
            noise = draw(*shape)
        scale = sampling.reference_guidance[r] if sampling.reference_guidance else sampling.guidance_scale
        memory = conditional.after(images)
        velocity = velocity_of(model, memory)
        if scale > 1:
            low, high = sampling.guidance_interval
            pair, schedule = pair_of(model, memory, unconditional.after(images)), GUIDANCE[sampling.guidance]
            velocity = guide(velocity, pair, scale, (low, high), schedule)
        steps = sampling.reference_steps[r] if sampling.reference_steps else sampling.num_steps
        image = solve(velocity, noise, replace(sampling, num_steps=steps), lambda: draw(*shape))
        images = torch.cat([images, image[:, None]], dim=1)
    return images


class Remembered:
    """The decoder's memory of a context that grows: keys and values of its earlier tokens are kept."""

    def __init__(self, model: TransDiff, contexts: Contexts) -> None:
        self.model, self.contexts = model, contexts
        self.memory: Memory | None = None

    def after(self, images: Tensor) -> Memory:
        """The memory of the image after ``images`` [B, r, c, h, w]; to be asked for with a growing r."""
        new = self.model.memory(self.contexts.advance(images))
        self.memory = new if self.memory is None else self.memory.join(new)
        return self.memory


def velocity_of(model: TransDiff, memory: Memory) -> Velocity:
    """The model's velocity at a time that all rows share, in the precision of the state."""

    def velocity(x_t: Tensor, t: float) -> Tensor:
        return model.velocity(x_t, torch.full((1,), t, dtype=torch.float32, device=x_t.device), memory).to(x_t.dtype)

    return velocity


def pair_of(model: TransDiff, conditional: Memory, unconditional: Memory) -> Pair:
    """The velocities of both memories, in one pass of the decoder."""
    velocity = velocity_of(model, conditional.beside(unconditional))

    def pair(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        c, u = velocity(torch.cat([x_t, x_t]), t).chunk(2)
        return c, u

    return pair


@dataclass(eq=False)
class Generator:
    """A trained model ready to draw images: ``load_generator("runs/x").images(labels, seeds)``.

    It draws in the precision of its run's ``sampling``, with the weights as they are when it draws first: what it makes of
    them once (rounded weights, the beginning of the null class) it keeps. For other weights, or changed ones, ``of`` makes
    another generator; for another precision ``at`` does.
    """

    model: TransDiff  # in float32
    autoencoder: Autoencoder
    run: RunConfig
    class_names: Sequence[str]
    checkpoint: str = ""
    fingerprint: str = ""
    weights: str = "in memory"  # which the model has: "last", or "ema" and the decay
    compile: bool = False  # the decoder's blocks through torch.compile; where it does not work, a log says so
    cuda_graphs: bool = False  # the decoder as CUDA graphs

    def __post_init__(self) -> None:
        require(not self.cuda_graphs or self.device.type == "cuda", "CUDA graphs", str(self.device), "a GPU")

    def of(self, model: TransDiff) -> Generator:
        """The same of another model, or of this one with changed weights."""
        return replace(self, model=model)

    def at(self, precision: Precision) -> Generator:
        """The generator of these weights in a precision, ``fp32`` or ``bf16``: this one, if it is its own."""
        if precision not in get_args(Precision):
            raise unknown("sampling.precision", precision, get_args(Precision))
        if precision == self.precision:
            return self
        return replace(self, run=replace(self.run, sampling=replace(self.run.sampling, precision=precision)))

    @property
    def precision(self) -> Precision:
        return self.run.sampling.precision

    @cached_property
    def network(self) -> TransDiff:
        """What draws: ``model``, or its weights in modules that compute as asked for."""
        if self.precision == "fp32" and not (self.compile or self.cuda_graphs):
            return self.model
        network = twin(self.model)
        if self.precision == "bf16":
            round_linear(network)
        if self.compile:
            compile_blocks(network.decoder.blocks)
        if self.cuda_graphs:
            replay_decoder(network)
        return network

    @cached_property
    def null_contexts(self) -> Callable[[], Contexts]:
        """Contexts of the null class, whose beginning is computed once."""
        return null_contexts(self.network)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def check_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """``labels`` as a tensor on the model's device; raises ``ValueError`` for a class that the model does not have."""
        tensor = torch.as_tensor(labels, device=self.device)
        for label in tensor.flatten().tolist():
            require(0 <= label < self.run.model.num_classes, "classes", label, f"0 to {self.run.model.num_classes - 1}")
        return tensor

    @torch.no_grad()
    def images(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        contexts: ContextFn = ContextStream,
    ) -> Tensor:
        """Images [B, R, C, H, W] in [-1, 1], the R successive images of each label's row; the last is the final one."""
        sampling = sampling or self.run.sampling
        check_sampling(sampling)
        labels = self.check_labels(labels)
        require(len(seeds) == len(labels), "seeds", len(seeds), f"one for each of the {len(labels)} labels")
        latents = self.latents(labels, seeds, sampling, contexts)
        images = self.autoencoder.decode(rearrange(latents, "b r c h w -> (b r) c h w"))
        return rearrange(images, "(b r) c h w -> b r c h w", b=len(labels))

    def latents(
        self, labels: Tensor, seeds: Sequence[int], sampling: SamplingConfig, contexts: ContextFn = ContextStream
    ) -> Tensor:
        """``generate`` in this generator's precision; raises ``ValueError`` for a ``sampling`` in another."""
        asked = sampling.precision
        allowed = f"{self.precision!r}, in which this generator draws; generator.at({asked!r}) is the one for it"
        require(asked == self.precision, "sampling.precision", asked, allowed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=asked == "bf16", cache_enabled=False):
            return generate(self.network, labels, sampling, seeds, contexts, self.null_contexts)

    @torch.no_grad()
    def features(self, labels: Sequence[int] | Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """Semantic features [B, R L, D] of the labels' rows, before the position embedding.

        For R > 1 they follow from the class and R - 1 references, which are drawn first, with one seed a class.
        """
        labels = self.check_labels(labels)
        classes, references = self.model.encoder.class_vectors(labels), None
        if self.run.model.num_references > 1:
            seeds = [mix("features", label) for label in labels.tolist()]
            references = self.latents(labels, seeds, sampling or self.run.sampling)[:, :-1]
        return self.model.encoder.features(classes, references)


def load_generator(
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    *,
    autoencoder: str | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
) -> Generator:
    """The trained model of a run folder or export folder, with its autoencoder, on ``device``.

    It draws in ``precision`` (``fp32`` or ``bf16``; without one, in that of its run's ``sampling``). ``autoencoder`` is its
    folder, where it no longer lies where the run or the export has it; it must be the same. ``compile`` and ``cuda_graphs``
    change its speed (see ``Generator``), and its numbers by rounding. Raises ``ValueError`` for files that are damaged or do
    not belong together.
    """
    export = read_export(checkpoint)
    model = TransDiff(export.run.model).eval().requires_grad_(False)
    try:
        check_layout(export.state, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    except ValueError as error:
        raise ValueError(f"{export.folder}: model.safetensors does not belong to config.yaml: {error}") from error
    model.load_state_dict(export.state)
    settings = replace(export.run.autoencoder, path=autoencoder or export.run.autoencoder.path)
    run = replace(export.run, autoencoder=settings)
    network = load_autoencoder(settings.kind, settings.path, run.data.image_channels)
    trained_with = export.info["autoencoder"]
    allowed = f"the autoencoder {trained_with} of {checkpoint}; say where it lies with autoencoder.path=..."
    require(network.fingerprint == trained_with, "autoencoder.path", settings.path, allowed)
    if compile:
        network.compile_parts()
    generator = Generator(
        model.to(device),
        network.to(device),
        run,
        export.info["class_names"],
        str(checkpoint),
        export.fingerprint,
        export.info["weights"],
        compile,
        cuda_graphs,
    )
    return generator.at(precision or generator.precision)
