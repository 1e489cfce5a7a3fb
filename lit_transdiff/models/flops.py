"""Floating-point operations of TransDiff's matrix products, from its configuration alone.

A multiply-add counts as two. Attention counts the pairs of tokens of which one sees the other; normalisation, activations and
solvers are left out, as is usual for a model-FLOPs utilisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_transdiff.models.layers import TIME_FEATURES

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig


def encoder_flops(config: ModelConfig) -> float:
    """Operations of the encoder's forward pass of one row of R references."""
    width, length = config.width, config.tokens_per_reference
    tokens = config.num_class_tokens + config.num_context_tokens
    pairs = tokens**2
    if config.num_references > 1:  # the class tokens see themselves, a group itself and what comes before it
        ends = [config.num_class_tokens + (r + 1) * length for r in range(config.num_references)]
        pairs = config.num_class_tokens**2 + length * sum(ends)
    block = tokens * (4 + 2 * config.mlp_ratio) * width**2 + 2 * pairs * width
    projected = (config.num_references - 1) * length * config.latent_channels * config.reference_patch_size**2 * width
    return 2.0 * (config.encoder_blocks * block + (projected if config.num_references > 1 else 0))


def decoder_flops(config: ModelConfig, num_noise_draws: int) -> float:
    """Operations of the decoder's forward pass of one row: R references with ``num_noise_draws`` draws each.

    Keys and values of the context are made once for all draws; reference r attends to (r + 1) L of them.
    """
    width, tokens, references = config.width, config.num_decoder_tokens, config.num_references
    views = references * num_noise_draws
    features = config.latent_channels * config.patch_size**2
    own = views * (tokens * (6 + 2 * config.mlp_ratio) * width**2 + 2 * tokens**2 * width)
    seen = sum((r + 1) * config.tokens_per_reference for r in range(references))  # context tokens of one draw of each reference
    cross = 2 * config.num_context_tokens * width**2 + 2 * num_noise_draws * tokens * seen * width
    ends = config.num_context_tokens * width**2 + 2 * views * tokens * features * width
    time = views * (TIME_FEATURES * width + 7 * width**2)
    return 2.0 * (config.decoder_blocks * (own + cross) + ends + time)


def training_flops(config: ModelConfig, num_noise_draws: int, frozen_encoder: bool = False) -> float:
    """Operations of one row's forward and backward pass; the backward pass is twice the forward one."""
    return (1 if frozen_encoder else 3) * encoder_flops(config) + 3 * decoder_flops(config, num_noise_draws)


def tokens_of(config: ModelConfig, num_noise_draws: int) -> int:
    """Tokens of one row that pass the encoder's blocks, and those that pass the decoder's."""
    decoded = config.num_references * num_noise_draws * config.num_decoder_tokens
    return config.num_class_tokens + config.num_context_tokens + decoded
