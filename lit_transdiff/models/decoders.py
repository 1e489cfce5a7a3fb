"""The table of decoders, and those that know the context in another way than by cross-attention.

Shapes: B images, M draws of a share of the rows, N tokens, S context tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from einops import repeat
from torch import Tensor, nn

from lit_transdiff.models.decoder import DecoderBlock, DiffusionDecoder, Memory
from lit_transdiff.models.tokens import unpatchify

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig


class SelfBlock(DecoderBlock):
    """The decoder's block without cross-attention."""

    crosses = False


class ContextDecoder(DiffusionDecoder):
    """A decoder of ``SelfBlock``s, whose memory is the projected context, the same for all blocks."""

    block = SelfBlock

    def memory_layers(self) -> list[nn.Module]:
        return [self.context_projection]

    def memory(self, context: Tensor, visible: tuple[int, ...]) -> Memory:
        """The context stands in the place of both keys and values, as of one head and one block."""
        projected = self.context_projection(context)[:, None]
        return Memory((tuple((projected[:, :, :s], projected[:, :, :s]) for s in visible),))

    def shares(self, x: Tensor, memory: Memory) -> Iterator[tuple[Tensor, Tensor]]:
        """Equal shares [(M B), ...] of rows, each with its context, repeated for the draws: [(M B), S, D]."""
        contexts = [context[:, 0] for context, _ in memory.blocks[0]]
        for rows, context in zip(x.chunk(len(contexts)), contexts, strict=True):
            yield rows, repeat(context, "b s d -> (m b) s d", m=len(rows) // len(context))


class ModulationDecoder(ContextDecoder):
    """The mean of the context tokens is added to the embedding of the time, which modulates the blocks."""

    def forward(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        x = self.tokens_of(x_t)
        means = torch.cat([context.mean(dim=1) for _, context in self.shares(x, memory)])
        embedding = self.time_embedding.embedding(t) + means
        modulation = self.time_embedding.modulations(embedding)
        for block in self.blocks:
            x = block(x, modulation)
        return unpatchify(self.final(x, embedding), self.patch_size, x_t.shape[-2])


class ConcatenationDecoder(ContextDecoder):
    """The context tokens stand before the image's, and pass the blocks with them."""

    def forward(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        x = self.tokens_of(x_t)
        embedding, modulation = self.time_embedding(t)
        parts = []
        of_shares = modulation.chunk(len(memory.blocks[0])) if len(modulation) > 1 else None
        for i, (rows, context) in enumerate(self.shares(x, memory)):
            y = torch.cat([context, rows], dim=1)
            for block in self.blocks:
                y = block(y, modulation if of_shares is None else of_shares[i])
            parts.append(y[:, context.shape[1] :])
        return unpatchify(self.final(torch.cat(parts), embedding), self.patch_size, x_t.shape[-2])


# An entry creates a subclass of ``DiffusionDecoder``, or a module with the same interface.
DECODERS: dict[str, Callable[[ModelConfig], DiffusionDecoder]] = {
    "cross_attention": DiffusionDecoder,
    "modulation": ModulationDecoder,
    "concatenation": ConcatenationDecoder,
}
