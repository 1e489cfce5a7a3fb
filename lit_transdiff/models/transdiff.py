"""TransDiff: one model for every number of references. It knows no loss and no solver.

Shapes: B images (rows), R references of a row, M noise draws, L tokens per reference, V views (references
times draws), C H W a latent, which is one token of the seam: the decoder cuts patches of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.config import require_known
from lit_transdiff.models.adapt import Adaptation, broadcast_mask_tokens, resize_positions, spread_patch
from lit_transdiff.models.conditions import CONDITIONS
from lit_transdiff.models.context import ContextFn, Contexts, ContextStream, Remembered, null_contexts
from lit_transdiff.models.decoder import DiffusionDecoder, Memory
from lit_transdiff.models.decoders import DECODERS
from lit_transdiff.models.encoder import ENCODERS, ARTransformer
from lit_transdiff.models.fusion import fused, fusion_pattern
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack, in_one_pass, times_of_rows

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig, SamplingConfig


class TransDiff(Paradigm):
    """Encoder and decoder of arXiv 2506.09482; R = 1 is one-step AR, R > 1 is MRAR.

    A part is an image of the row.
    """

    stacks: ClassVar = {
        "encoder": Stack("encoder.blocks", "encoder_blocks"),
        "decoder": Stack("decoder.blocks", "decoder_blocks"),
    }
    head_prefixes = ("decoder.",)
    undecayed = ("decoder.",)
    methods = ("condition", "predict", "encode", "memory", "velocity")
    static = ("encoder.begin", "encoder.extend", "memory", "longer", "stacked")
    has_features = True
    adaptation = Adaptation(
        classes="encoder.class_embedding.weight",
        rules={"encoder.mask_tokens": (broadcast_mask_tokens, "one mask token repeated for every position")},
        sized={
            "decoder.position": (resize_positions, "bicubic interpolation"),
            "encoder.reference_projection.weight": (spread_patch, "of the mean over the finer pixels"),
        },
        shaped=(
            "encoder.position",
            "encoder.context_position",
            "encoder.mask_tokens",
            "encoder.reference_projection.weight",
            "decoder.position",
            "decoder.input_projection.weight",
            "decoder.final.linear.weight",
            "decoder.final.linear.bias",
        ),
        optional=("encoder.reference_projection.",),
    )
    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.part_sizes = (1,) * config.num_references
        self.token = (config.latent_channels, config.latent_size, config.latent_size)
        self.encoder = ENCODERS[config.encoder](config)
        self.decoder = DECODERS[config.decoder](config)
        self.condition_shape = getattr(self.encoder.class_embedding, "condition_shape", None)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuse unknown encoders, decoders and conditions."""
        for field, table in (("encoder", ENCODERS), ("decoder", DECODERS), ("condition", CONDITIONS)):
            require_known(f"model.{field}", getattr(config, field), table)

    # --- the two networks

    def encode(self, labels: Tensor, references: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Context [B, (n + 1) L, D] of ``labels`` [B] and a row's first n < R latents [B, n, C, H, W].

        Where ``drop`` [B] is true the label is replaced by the null class: the unconditional context.
        """
        return self.encoder(self.encoder.class_vectors(labels, drop), references)

    def memory(self, context: Tensor, every_reference: bool = False) -> Memory:
        """The decoder's keys and values of ``context`` [B, n L, D].

        By default all rows see the whole context (sampling the next image). With ``every_reference``, rows of
        reference r = 0 .. n-1 see its prefix of (r + 1) L tokens (training all images of a row at once).
        """
        size, length = context.shape[1], self.config.tokens_per_reference
        return self.decoder.memory(
            context, tuple(range(length, size + 1, length)) if every_reference else (size,)
        )

    def longer(self, memory: Memory, context: Tensor) -> Memory:
        """``memory`` with the keys and values of the next tokens of its context, [B or 1, L, D]."""
        return memory.join(self.memory(context))

    def both(self, memory: Memory, other: Memory, rows: int) -> Memory:
        """Two memories for twice as many ``rows`` of the decoder: one context, if each has all its rows."""
        whole = memory.num_rows == other.num_rows == rows
        return self.stacked(memory, other) if whole else memory.beside(other)

    def stacked(self, memory: Memory, other: Memory) -> Memory:
        """Two memories of one context each, with a row for each row of the decoder, as one context."""
        return memory.stacked(other)

    def velocity(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Velocity of ``x_t`` [(V B), C, H, W], ordered (reference, draw, image), at ``t`` [(V B)] or [1]."""
        return self.decoder(x_t, t, memory)

    # --- the seam

    def parts(self, x: Tensor) -> Tensor:
        return x

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> Memory:
        """The memory of each row: image r attends to the class and the clean images before it."""
        if self.has_few_contexts(labels):
            return self.memory_of_classes().rows(torch.where(drop, self.config.num_classes, labels))
        return self.memory(self.encode(labels, x[:, :-1], drop), every_reference=True)

    def has_few_contexts(self, labels: Tensor) -> bool:
        """Whether contexts, one for each class, are fewer than the rows.

        Only of this project's networks, and on CPUs: elsewhere the order in which the gradients of a
        context's rows are added is not fixed.
        """
        few = self.config.num_classes + 1 < len(labels) and labels.device.type == "cpu"
        ours = type(self.encoder) is ARTransformer and type(self.decoder) is DiffusionDecoder
        return few and ours and self.encoder.has_one_context_a_class

    def memory_of_classes(self) -> Memory:
        """The memory of each class and, last, of the null class, of which rows are taken."""
        classes = torch.arange(self.config.num_classes + 1)
        null = classes == self.config.num_classes
        return self.memory(self.encode(classes.masked_fill(null, 0), None, null))

    def predict(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        rows = rearrange(x_t, "b r c h w -> (r b) c h w")
        return rearrange(
            self.velocity(rows, rearrange(t, "b r -> (r b)"), memory), "(r b) c h w -> b r c h w", b=len(x_t)
        )

    def decode(
        self,
        labels: Tensor,
        sampling: SamplingConfig,
        normal: Normal,
        kept: Callable[[], Contexts] | None = None,
        contexts: ContextFn | None = None,
    ) -> Generator[Problem, Tensor, Tensor]:
        """The R successive images of a row, each from the class and those before (arXiv 2506.09482, 3.3)."""
        conditional = Remembered(self, (contexts or ContextStream)(self, labels))
        unconditional = Remembered(self, (kept or null_contexts(self))())
        images = torch.zeros(len(labels), 0, *self.token, device=labels.device)
        for r in range(self.config.num_references):
            scale = sampling.reference_guidance[r] if sampling.reference_guidance else sampling.guidance_scale
            memory = conditional.after(images)
            both = self.both(memory, unconditional.after(images), len(labels)) if scale > 1 else memory
            image = yield Problem(
                self.token,
                partial(self.at_one_time, memory),
                partial(in_one_pass, self.at_one_time, both),
                progress=(r + 1) / self.config.num_references,
                scale=scale if sampling.reference_guidance else None,
                num_steps=sampling.reference_steps[r] if sampling.reference_steps else None,
                reuses_noise=r > 0 and sampling.reuse_noise,
            )
            images = torch.cat([images, image[:, None]], dim=1)
        return images

    def at_one_time(self, memory: Memory, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The velocity at a time of all rows, or of each, in the precision of the state."""
        return self.velocity(x_t, times_of_rows(t, x_t), memory).to(x_t.dtype)

    def stand_in(self, latest: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The image of the row before."""
        return latest

    def keep(self) -> Callable[[], Contexts]:
        return null_contexts(self)

    def features(self, labels: Tensor, references: Tensor | None) -> Tensor:
        return self.encoder.features(self.encoder.class_vectors(labels), references)

    def fusion(self, second: Tensor, kind: str, seed: int) -> ContextFn:
        return fused(second, fusion_pattern(self.config.num_context_tokens, kind, seed))

    @property
    def evaluated(self) -> nn.Module:
        return self.decoder

    def units(self) -> Iterator[nn.Module | list[nn.Module]]:
        """All layers for the decoder's keys and values together; then block by block."""
        yield self.decoder.memory_layers()
        yield from super().units()
