"""Pixels <-> normalised latents, behind one interface: KL autoencoders (through diffusers) and the identity.

Shapes: ... any leading dimensions, C image channels, H W pixels, c latent channels, h w latent pixels (H / h
= downsampling). Images are in [-1, 1]; moments are the posterior's [mean | logvar]; latents have a mean near
0 and a std near 1 in each channel.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from einops import pack, unpack
from safetensors import SafetensorError
from torch import Tensor, nn

from lit_transdiff.base.files import check_file, read_json
from lit_transdiff.base.hub import local
from lit_transdiff.config import AutoencoderTraining, require, require_known
from lit_transdiff.config.targets import follow_umask
from lit_transdiff.models.execution import compile_blocks
from lit_transdiff.models.ldm import check_ldm, from_diffusers, read_architecture, to_diffusers

LOGVAR_RANGE = (-30.0, 20.0)  # clamp of the posterior's log variance, as in latent diffusion
CONFIG_FILE = "config.json"
LDM_NORM_GROUPS = 32  # groups of every normalisation in the autoencoders of latent diffusion


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments [..., 2c, h, w] as mean and clamped logvar, each [..., c, h, w]."""
    mean, logvar = moments.chunk(2, dim=-3)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(posterior || standard normal) of moments [..., 2c, h, w], in nats, summed over c, h, w: [...]."""
    mean, logvar = posterior(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(-3, -2, -1))


def check_latents(latents: Tensor) -> None:
    """Raise ``ValueError`` unless latents have a mean near 0 and a std near 1, i.e. the right scale."""
    std, mean = torch.std_mean(latents.float())
    allowed = "0.3 to 3 after normalisation"
    require(0.3 <= std.item() <= 3, "latents (wrong scale): std", round(std.item(), 4), allowed)
    allowed = "-1 to 1 after normalisation"
    require(abs(mean.item()) <= 1, "latents (wrong scale): mean", round(mean.item(), 4), allowed)


def load_autoencoder(kind: str, path: Optional[str | Path], image_channels: int) -> Autoencoder:
    """The frozen autoencoder of a run, in float32 and evaluation mode.

    Raises ``ValueError`` for an unknown kind or another folder, ``FileNotFoundError`` for a missing one.
    """
    entry = autoencoder_kind(kind, path)
    return entry.load(local(path, entry.files) if path else "", image_channels).freeze()


def autoencoder_kind(kind: str, path: Optional[str | Path]) -> AutoencoderKind:
    """The entry of AUTOENCODERS, checked against the given path."""
    require_known("autoencoder.kind", kind, AUTOENCODERS)
    entry = AUTOENCODERS[kind]
    allowed = f"{'a folder' if entry.has_folder else 'null'} when autoencoder.kind is {kind!r}"
    require(entry.has_folder == (path is not None), "autoencoder.path", path, allowed)
    return entry


class Autoencoder(nn.Module, ABC):
    """The interface of an autoencoder; subclasses define ``encode`` and ``reconstruct``.

    ``latents_mean`` and ``latents_std`` [c, 1, 1] convert the posterior's samples to normalised latents and
    back.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, latents_mean: Tensor, latents_std: Tensor, downsampling: int) -> None:
        super().__init__()
        self.latent_channels = len(latents_mean)
        self.downsampling = downsampling
        self.frozen = False
        self.register_buffer("latents_mean", latents_mean.float().reshape(-1, 1, 1))
        self.register_buffer("latents_std", latents_std.float().reshape(-1, 1, 1))

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [..., C, H, W] in [-1, 1] -> moments [..., 2c, h, w] (the identity: [..., C, H, W])."""

    def sample(self, moments: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        """Moments -> normalised latents [..., c, h, w]: the mean, or a sample by standard ``noise``."""
        mean, logvar = posterior(moments.float())
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return (latents - self.latents_mean) / self.latents_std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [..., c, h, w] -> images [..., C, H, W], clamped to [-1, 1]."""
        return self.reconstruct(latents).clamp(-1, 1)

    @abstractmethod
    def reconstruct(self, latents: Tensor) -> Tensor:
        """``decode`` without the clamp, for the loss that trains an autoencoder."""

    def compile_parts(self) -> None:
        """Run the networks, if any, through ``torch.compile``."""

    def freeze(self) -> Autoencoder:
        """Set eval mode without gradients; a later ``train()`` of a parent module has no effect."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Autoencoder:
        return super().train(mode and not self.frozen)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the names and bytes of the weights and the normalisation."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class IdentityAutoencoder(Autoencoder):
    """Latents are the images themselves: for models on small images."""

    def __init__(self, channels: int) -> None:
        super().__init__(torch.zeros(channels), torch.ones(channels), downsampling=1)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def sample(self, moments: Tensor, noise: Optional[Tensor] = None) -> Tensor:
        return moments

    def reconstruct(self, latents: Tensor) -> Tensor:
        return latents


class KLAutoencoder(Autoencoder):
    """diffusers' AutoencoderKL (imported lazily, because that takes seconds) with normalised latents."""

    def __init__(self, model: Any, latents_mean: Tensor, latents_std: Tensor) -> None:
        super().__init__(
            latents_mean, latents_std, downsampling=2 ** (len(model.config.block_out_channels) - 1)
        )
        self.model = model

    @classmethod
    def new(cls, training: AutoencoderTraining, image_channels: int, image_size: int) -> KLAutoencoder:
        """A new autoencoder with weights from torch's generator; its latents are not yet normalised."""
        from diffusers import AutoencoderKL

        levels = len(training.block_channels)
        factor = 2 ** (levels - 1)
        allowed = f"a multiple of {factor} ({levels} levels)"
        require(image_size % factor == 0, "data.image_size", image_size, allowed)
        model = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(training.block_channels),
            layers_per_block=training.layers_per_block,
            norm_num_groups=training.norm_groups,
            latent_channels=training.latent_channels,
            sample_size=image_size,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
        return cls(model, torch.zeros(training.latent_channels), torch.ones(training.latent_channels))

    @classmethod
    def load(cls, path: str | Path, image_channels: int) -> KLAutoencoder:
        """Read a folder in diffusers' layout (config.json + safetensors, any float type) as float32.

        Raises ``FileNotFoundError`` for a missing folder, and ``ValueError`` with file and field for missing
        or unexpected weights, other image channels, or a malformed normalisation.
        """
        from diffusers import AutoencoderKL

        folder, file = Path(path), Path(path) / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"autoencoder.path: {file} does not exist; expected a folder in diffusers' layout."
            )
        for written in (file, *sorted(folder.glob("*.safetensors"))):
            check_file(written)
        config = read_json(file)
        mean, std = read_normalisation(config, str(file))
        channels = config.get("in_channels")
        allowed = f"data.image_channels={image_channels}"
        require(channels == image_channels, f"{file}: in_channels", channels, allowed)
        options = dict(
            local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        try:
            model, report = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder}: the weights are damaged, or not those of config.json: {error}"
            ) from error
        for problem in ("missing_keys", "unexpected_keys"):
            keys = sorted(report[problem])[:3]
            require(not keys, f"{folder}: {problem}", keys, "exactly the weights that config.json describes")
        return cls(model, mean, std)

    @classmethod
    def from_ldm(cls, state: Mapping[str, Tensor], scaling_factor: float) -> tuple[KLAutoencoder, list[str]]:
        """An autoencoder from a state dict of latent diffusion, and the keys used only in its training.

        Normalised latents are the posterior's samples times ``scaling_factor``. Raises ``ValueError`` listing
        every key that is missing, unexpected or of another shape.
        """
        from diffusers import AutoencoderKL

        settings = read_architecture(state)
        widths = settings["block_out_channels"]
        fit = min(widths) > 0 and not any(width % LDM_NORM_GROUPS for width in widths)
        require(fit, "channels of the levels", widths, f"multiples of {LDM_NORM_GROUPS}")
        model: Any = AutoencoderKL(**settings, norm_num_groups=LDM_NORM_GROUPS, scaling_factor=scaling_factor)
        check_ldm(state, model.state_dict())
        mapped = to_diffusers(state)
        model.load_state_dict(mapped.state)
        channels = model.config.latent_channels
        return cls(model, torch.zeros(channels), torch.full((channels,), 1 / scaling_factor)), sorted(
            mapped.left_over
        )

    def to_ldm(self) -> dict[str, Tensor]:
        """The weights in the layout of latent diffusion (which has no normalisation)."""
        return from_diffusers(self.model.state_dict())

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write diffusers' layout, with weights as ``dtype`` and the latents' normalisation."""
        settings = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        stored = type(self.model).from_config(settings)
        stored.load_state_dict(self.model.state_dict())
        mean, std = self.latents_mean.flatten().tolist(), self.latents_std.flatten().tolist()
        stored.register_to_config(latents_mean=mean, latents_std=std)
        nn.Module.to(stored, dtype)  # diffusers' own to() warns about layers that this class does not have
        stored.save_pretrained(path)
        for file in Path(path).glob("*.safetensors"):
            follow_umask(file)

    def set_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Set the normalisation to the per-channel mean and std [c] of the posterior's samples."""
        self.latents_mean.copy_(mean.reshape(-1, 1, 1))
        self.latents_std.copy_(std.reshape(-1, 1, 1))

    def freeze(self) -> Autoencoder:
        self.model.to(memory_format=torch.channels_last)  # faster for convolutions
        return super().freeze()

    def compile_parts(self) -> None:
        compile_blocks([self.model.encoder, self.model.decoder])

    def encode(self, images: Tensor) -> Tensor:
        flat, lead = pack([images], "* c h w")
        return unpack(self.model.encode(flat).latent_dist.parameters, lead, "* c h w")[0]

    def reconstruct(self, latents: Tensor) -> Tensor:
        flat, lead = pack([latents * self.latents_std + self.latents_mean], "* c h w")
        return unpack(self.model.decode(flat).sample, lead, "* c h w")[0]


def read_normalisation(config: dict[str, Any], source: str) -> tuple[Tensor, Tensor]:
    """Mean and std [c] of diffusers' configuration: ``latents_mean`` and ``_std``, else shift and scale.

    Raises ``ValueError`` with ``source`` and the field for missing, non-finite or wrongly sized values.
    """
    channels = config.get("latent_channels")
    if not isinstance(channels, int):
        raise ValueError(f"{source}: latent_channels: got {channels!r}; allowed: an integer.")
    if config.get("latents_mean") is None and config.get("latents_std") is None:
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor", 0.0)
        require(is_finite(shift), f"{source}: shift_factor", shift, "a finite number")
        require(is_finite(scale) and scale > 0, f"{source}: scaling_factor", scale, "a finite number above 0")
        return torch.full((channels,), float(shift)), torch.full((channels,), 1 / scale)
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        valid = isinstance(values, list) and len(values) == channels and all(map(is_finite, values))
        require(valid, f"{source}: {name}", values, f"{channels} finite numbers, one a latent channel")
    allowed = "numbers above 0"
    require(min(config["latents_std"]) > 0, f"{source}: latents_std", config["latents_std"], allowed)
    return torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])


def is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class AutoencoderKind:
    """A kind of autoencoder: its constructor from ``autoencoder.path`` and image channels."""

    load: Callable[[str | Path, int], Autoencoder]
    has_folder: bool = True  # whether it has a folder of weights; otherwise ``load`` gets an empty path
    files: tuple[str, ...] = ("*",)  # patterns of those that are downloaded of a place on the Hub


AUTOENCODERS: dict[str, AutoencoderKind] = {
    "kl": AutoencoderKind(KLAutoencoder.load, files=("*.json", "*.safetensors")),
    "identity": AutoencoderKind(lambda path, channels: IdentityAutoencoder(channels), has_folder=False),
}
