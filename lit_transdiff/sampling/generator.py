"""From labels to images: the loop over parts, with one random generator per image.

Shapes: B rows, R references of a row, S tokens of features, D width, c h w a latent, C H W an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor

from lit_transdiff.base.hardware import fast_precision
from lit_transdiff.base.randomness import mix
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.config import RunConfig, SamplingConfig, require, require_known
from lit_transdiff.config.classes import full_names
from lit_transdiff.config.sampling import Precision
from lit_transdiff.flow.solvers import EVALUATIONS
from lit_transdiff.models.autoencoder import Autoencoder, load_autoencoder
from lit_transdiff.models.drawing_blocks import has_drawing_kernels, use_drawing_kernels
from lit_transdiff.models.execution import compile_evaluated, round_linear, twin
from lit_transdiff.models.flops import flops_of_row
from lit_transdiff.models.linear import pack_products
from lit_transdiff.models.paradigm import Paradigm, build_model
from lit_transdiff.models.state_dicts import check_layout
from lit_transdiff.sampling.graphs import CUDARecorder, Graphs, replay
from lit_transdiff.sampling.loop import Solving, check_sampling, generate

MANY_FLOPS = 3e16  # FLOPs of the solver's network, for which a GPU needs 100 s; compilation needs 20 s


@dataclass(eq=False)
class Generator:
    """A trained model for sampling images: ``load_generator("runs/x").images(labels, seeds)``.

    It samples in the precision of its run's ``sampling``, with the weights at its first use: values derived
    from them (rounded weights, the prefix of the null class) are cached. For other or changed weights, ``of``
    makes another generator; for another precision, ``at`` does. CUDA graphs are kept, too: only the first
    calls of a number of rows and a sampler record them.
    """

    model: Paradigm  # in float32
    autoencoder: Autoencoder
    run: RunConfig
    class_names: Sequence[str]
    checkpoint: str = ""
    fingerprint: str = ""
    weights: str = "in memory"  # the kind of weights: "last", or "ema" and the decay
    # torch.compile for the blocks that a solver evaluates (a failure is logged); None: for many images
    compile: bool | None = False
    cuda_graphs: bool | None = False  # CUDA graphs of the solver's steps; None: on GPUs
    kernels: bool = False  # Triton kernels in bfloat16 on a GPU, unless compiled; no GPU has run them yet

    def __post_init__(self) -> None:
        require(not self.cuda_graphs or self.device.type == "cuda", "CUDA graphs", str(self.device), "a GPU")

    def of(self, model: Paradigm) -> Generator:
        """A generator for another model, or for this one with changed weights."""
        return replace(self, model=model)

    def at(self, precision: Precision) -> Generator:
        """The generator of these weights in ``fp32``, ``bf16`` or ``auto``: itself, if it has this one."""
        require_known("sampling.precision", precision, get_args(Precision))
        precision = self.chosen(precision)
        if precision == self.precision:
            return self
        return replace(self, run=replace(self.run, sampling=replace(self.run.sampling, precision=precision)))

    def for_images(self, rows: int, sampling: SamplingConfig) -> Generator:
        """The generator for so many rows of images: where ``compile`` is None, many are worth its start."""
        if self.compile is not None:
            return self
        slow = self.device.type == "cuda" and not (self.takes_kernels and has_drawing_kernels(self.model))
        flops = rows * EVALUATIONS.get(sampling.solver, 1) * flops_of_row(self.model, sampling)
        return replace(self, compile=slow and flops >= MANY_FLOPS)

    @property
    def takes_kernels(self) -> bool:
        """Whether blocks use the kernels that they have."""
        fits = self.device.type == "cuda" and self.precision == "bf16"
        return fits and self.kernels and not self.compile

    @property
    def precision(self) -> Precision:
        return self.chosen(self.run.sampling.precision)

    def chosen(self, precision: Precision) -> Precision:
        """A precision, or the fastest of this device for ``auto``."""
        return fast_precision(self.device) if precision == "auto" else precision

    @cached_property
    def network(self) -> Paradigm:
        """The network for sampling: ``model`` or its weights, in the requested precision and speed."""
        if self.precision == "fp32" and not self.compile and self.graphs is None:
            return self.model
        network = twin(self.model)
        if self.precision == "bf16":
            round_linear(network)
            if self.device.type == "cpu" and not self.compile:
                pack_products(network)
        if self.takes_kernels:
            use_drawing_kernels(network)
        if self.compile:
            compile_evaluated(network)
        if self.graphs is not None:
            replay(network, self.graphs)
        return network

    @cached_property
    def graphs(self) -> Graphs | None:
        """The CUDA graphs of this generator, kept for all its batches."""
        wanted = self.device.type == "cuda" if self.cuda_graphs is None else self.cuda_graphs
        return Graphs(CUDARecorder(self.device)) if wanted else None

    @cached_property
    def kept(self) -> Any:
        """The values that the network computes once, such as those of the null class."""
        return self.network.keep()

    @property
    def names(self) -> list[str]:
        """A name of each class, by default its number."""
        return full_names(self.class_names, self.run.model.num_classes)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def check_labels(self, labels: Sequence[int] | Tensor) -> Tensor:
        """``labels`` as a tensor on the model's device. Raises ``ValueError`` for an unknown class.

        For a model with other conditions than classes, these are [B, *condition_shape].
        """
        tensor, shape = torch.as_tensor(labels, device=self.device), self.model.condition_shape
        if shape is not None:
            allowed = f"numbers [B, {', '.join(map(str, shape))}], the model's conditions"
            require(tuple(tensor.shape[1:]) == shape, "conditions", tuple(tensor.shape), allowed)
            return tensor
        for label in tensor.flatten().tolist():
            allowed = f"0 to {self.run.model.num_classes - 1}"
            require(0 <= label < self.run.model.num_classes, "classes", label, allowed)
        return tensor

    @torch.no_grad()
    def images(
        self,
        labels: Sequence[int] | Tensor,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        contexts: Any = None,
    ) -> Tensor:
        """Sample images [B, R, C, H, W] in [-1, 1]: R successive images per label, the last one final."""
        sampling = sampling or self.run.sampling
        check_sampling(sampling, self.run.model, self.run.sampling)
        labels = self.check_labels(labels)
        require(len(seeds) == len(labels), "seeds", len(seeds), f"one for each of the {len(labels)} labels")
        latents = self.latents(labels, seeds, sampling, contexts)
        images = self.autoencoder.decode(rearrange(latents, "b r c h w -> (b r) c h w"))
        return rearrange(images, "(b r) c h w -> b r c h w", b=len(labels))

    def latents(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        contexts: Any = None,
        solving: Solving | None = None,
    ) -> Tensor:
        """``generate`` in this generator's precision. Raises ``ValueError`` for ``sampling`` in another."""
        asked = self.chosen(sampling.precision)
        allowed = f"{self.precision!r}, the precision of this generator; use generator.at({asked!r})"
        require(asked == self.precision, "sampling.precision", asked, allowed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=asked == "bf16", cache_enabled=False):
            return generate(
                self.network, labels, sampling, seeds, contexts, self.kept, solving or self.graphs
            )

    @torch.no_grad()
    def features(self, labels: Sequence[int] | Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """Semantic features [B, R L, D] of the labels' rows, before the position embedding.

        For R > 1 they depend on the class and R - 1 references, which are sampled first with one seed per
        class.
        """
        labels = self.check_labels(labels)
        references = None
        if self.run.model.num_references > 1:
            seeds = [mix("features", label) for label in labels.tolist()]
            references = self.latents(labels, seeds, sampling or self.run.sampling)[:, :-1]
        return self.model.features(labels, references)


def load_generator(
    checkpoint: str | Path,
    device: torch.device | str = "cpu",
    *,
    autoencoder: str | None = None,
    precision: Precision | None = None,
    compile: bool | None = None,
    cuda_graphs: bool | None = None,
) -> Generator:
    """Load the trained model of a run folder or export folder, with its autoencoder, to ``device``.

    ``precision`` is ``fp32`` or ``bf16`` (default: that of the run's ``sampling``). ``autoencoder`` is the
    new folder of the same autoencoder, if it has moved. ``compile`` and ``cuda_graphs`` increase the speed
    and change numbers by rounding only; by default, a GPU has graphs, and compiles for many images. Raises
    ``ValueError`` for files that are damaged or do not belong together.
    """
    export = read_export(checkpoint)
    model = build_model(export.run.model).eval().requires_grad_(False)
    try:
        check_layout(export.state, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    except ValueError as error:
        raise ValueError(
            f"{export.folder}: model.safetensors does not belong to config.yaml: {error}"
        ) from error
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
