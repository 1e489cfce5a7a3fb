"""Preparation: train a small KL autoencoder on the user's own shards.

Shapes: B batch, C image channels, H W pixels, c latent channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.models.autoencoder import KLAutoencoder, kl_divergence, posterior
from lit_transdiff.stages.preparatory import PreparatoryStage

STORAGE = torch.float16  # the type of exported weights: half the size, at an error far below one grey level


def edge_error(error: Tensor) -> Tensor:
    """Mean squared difference of neighbours in ``error`` [B, C, H, W], summed over both directions.

    Added to the squared error, it emphasises contours, to which the eye is most sensitive.
    """
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in [-1, 1] (peak 2): the batch's mean."""
    error = (reconstructions - images).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error.clamp(min=1e-10))).mean()


class AutoencoderStage(PreparatoryStage):
    """Loss: squared error + edge error + ``kl_weight`` x KL (nats per latent value), on posterior samples."""

    uses_labels = False

    def __init__(self, run: RunConfig | Mapping[str, Any]) -> None:
        super().__init__(run)
        run = self.run
        self.autoencoder = KLAutoencoder.new(
            run.autoencoder_training, run.data.image_channels, run.data.image_size
        )

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """The loss of images [B, C, H, W] and its terms, all scalars."""
        moments = self.autoencoder.encode(images).float()  # [B, 2c, h, w]
        noise = torch.randn_like(moments.chunk(2, dim=1)[0])
        error = self.autoencoder.reconstruct(self.autoencoder.sample(moments, noise)).float() - images
        square = error.square().mean()
        edge = edge_error(error)
        kl = kl_divergence(moments).mean() / noise[0].numel()
        loss = square + edge + self.run.autoencoder_training.kl_weight * kl
        return {"loss": loss, "square": square, "edge": edge, "kl": kl}

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return self.losses(batch.values[:, 0])["loss"]

    def validation_step(self, batch: Any, batch_index: int) -> None:
        images = batch.values[:, 0]
        moments = self.autoencoder.encode(images).float()
        latents = self.autoencoder.sample(moments)
        values = {
            "val/psnr": psnr(self.autoencoder.decode(latents).float(), images),
            "val/kl": kl_divergence(moments).mean() / latents[0].numel(),
        }
        self.log_dict(values, batch_size=len(images), sync_dist=True, logger=self.logs_itself)

    @torch.no_grad()
    def measure(self, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Mean and std [c] of the latents' channels in float64, over the first images of ``batches``.

        The variance of the posterior's noise is added exactly, without sampling.
        """
        count, first, second = 0, torch.zeros(()), torch.zeros(())
        limit = self.run.autoencoder_training.num_statistics_images
        for batch in batches:
            images = batch.values[: limit - count, 0].to(self.device)
            mean, logvar = (part.double() for part in posterior(self.autoencoder.encode(images)))
            first = first + mean.mean(dim=(-2, -1)).sum(dim=0).cpu()
            second = second + (mean.square() + logvar.exp()).mean(dim=(-2, -1)).sum(dim=0).cpu()
            count += len(images)
            if count >= limit:
                break
        if count == 0:
            allowed = "batches of training images, to measure the latents' scale on"
            raise ValueError(f"export: batches: got none; allowed: {allowed}.")
        mean = first / count
        return mean, (second / count - mean.square()).sqrt()

    def export(self, folder: Path, batches: Iterable[Any]) -> None:
        """Write the autoencoder to ``folder`` in diffusers' layout, normalised by its latents of ``batches``.

        ``batches`` have training images as ``values`` [B, R, C, H, W]. All ranks may call this; the first one
        writes.
        """
        self.eval()
        self.autoencoder.set_normalisation(*self.measure(batches))
        if self.global_rank == 0:
            self.autoencoder.save(folder, dtype=STORAGE)
