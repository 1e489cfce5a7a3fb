"""Small files in the layout of the released ones, with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.config import ModelConfig
from lit_transdiff.released.convert import convert
from lit_transdiff.released.key_names import released_shapes
from tests.helpers import plain_autoencoder

SMALL = dict(width=32, num_heads=2, encoder_blocks=2, decoder_blocks=1, num_classes=7, latent_channels=4)


def random_state(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (0.05 * torch.randn(shape, generator=generator)).to(dtype)
        for key, shape in released_shapes(config).items()
    }


def write_checkpoint(
    folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A file as the released training writes it; ``changes`` replace entries, None removes one."""
    content = {
        "model": random_state(config, 1, dtype),
        "model_ema": random_state(config, 2),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 799,
        "args": argparse.Namespace(model="transdiff_large", blr=1e-4, resume=None, betas=[0.9, 0.95]),
    } | changes
    folder.mkdir(exist_ok=True)
    torch.save(
        {key: value for key, value in content.items() if value is not None}, folder / "checkpoint-last.pth"
    )
    return folder / "checkpoint-last.pth"


def converted_autoencoder(folder: Path) -> Path:
    """A converted autoencoder of 4 channels with downsampling 16, below ``folder``."""
    torch.save({"model": plain_autoencoder.make(channels=(32, 32, 32, 32, 32))}, folder / "kl16.ckpt")
    convert(folder / "kl16.ckpt", folder / "autoencoder")
    return folder / "autoencoder"


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same keys in the same order, and the same bits."""
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
