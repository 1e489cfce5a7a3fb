"""Random numbers as pure functions of named integers, so that they depend on no batch size, rank, worker or restart.

Shapes: B rows, G rows of the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


def mix(*parts: int | str) -> int:
    """One 63-bit seed from several numbers and words; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Normal(Protocol):
    """Standard normal numbers of a shape, a row for each image of a batch: [B, *shape]."""

    def __call__(self, *shape: int) -> Tensor: ...

    def shared(self) -> float:
        """One more standard normal number, which all images have in common, on all devices and in all passes of a step."""


class PerImageNormal:
    """Gaussian numbers from one generator per image: [B, *shape] a draw, each row a function of its seed alone.

    The generators are on the CPU, so that an image does not depend on the kind of device either.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.common = torch.Generator().manual_seed(mix("shared"))
        self.device = torch.device(device)

    def __call__(self, *shape: int) -> Tensor:
        numbers = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()  # else the copy waits for the device
        return numbers.to(self.device, non_blocking=True)

    def shared(self) -> float:
        """The same always: what images of their own seeds have in common depends on none of them."""
        return torch.randn((), generator=self.common).item()


class GlobalBatchNormal:
    """Gaussian numbers of a global batch, of which a rank and micro-step takes its own rows.

    Every rank draws the whole batch on its device (G numbers of ``shape``) and keeps ``rows``: a millisecond on a GPU, and the
    run's randomness is the same for any number of ranks and any accumulation.
    """

    def __init__(self, seed: int, global_batch_size: int, rows: Tensor) -> None:
        self.generator = torch.Generator(rows.device).manual_seed(seed)
        self.common = torch.Generator().manual_seed(mix("shared", seed))
        self.global_batch_size = global_batch_size
        self.rows = rows

    def __call__(self, *shape: int) -> Tensor:
        numbers = torch.randn(self.global_batch_size, *shape, generator=self.generator, device=self.rows.device)
        return numbers[self.rows]

    def shared(self) -> float:
        """The same on every rank, at hand without waiting for the device."""
        return torch.randn((), generator=self.common).item()
