"""A TransDiff of a few thousand parameters."""

from __future__ import annotations

import torch
from torch import nn

from lit_transdiff.config import ModelConfig
from lit_transdiff.models.transdiff import TransDiff

SMALL = dict(
    width=16,
    num_heads=2,
    encoder_blocks=2,
    decoder_blocks=2,
    num_classes=5,
    num_class_tokens=3,
    latent_channels=2,
    latent_size=4,
    num_context_tokens=16,
    attention_dropout=0.0,
    projection_dropout=0.0,
)


def build(num_references: int = 1, **settings) -> TransDiff:
    """A small model whose last layer is not zero, so that everything before it matters."""
    torch.manual_seed(0)
    model = TransDiff(ModelConfig(**{**SMALL, **settings}, num_references=num_references)).eval()
    nn.init.normal_(model.decoder.final.linear.weight, std=0.5)
    return model
