"""The trained run that a command samples from."""

from __future__ import annotations

import argparse

import torch

from lit_transdiff.config import expanded
from lit_transdiff.config.loading import preset
from lit_transdiff.sampling.generator import Generator, load_generator

AUTOENCODER = "autoencoder.path="  # override with the new folder of a trained run's autoencoder


def trained_generator(args: argparse.Namespace, device: torch.device) -> tuple[Generator, list[str]]:
    """The generator of a command's checkpoint, and the overrides of sampling and evaluation."""
    moved = [item.removeprefix(AUTOENCODER) for item in args.overrides if item.startswith(AUTOENCODER)]
    autoencoder = expanded(moved[-1], "autoencoder.path") if moved else None
    speed = dict(compile=args.compile, cuda_graphs=args.cuda_graphs)
    generator = load_generator(args.checkpoint, device, autoencoder=autoencoder, **speed)
    return generator, preset(args.preset) + [
        item for item in args.overrides if not item.startswith(AUTOENCODER)
    ]
