"""Random numbers as pure functions of named integers, independent of batch size, rank, worker and restart.

Shapes: B rows, G rows of the global batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 16  # torch draws so many numbers at a time: of multiples, several tensors are one sequence
FEW_NUMBERS = 500_000  # below, threads are not worth their start


def mix(*parts: int | str) -> int:
    """Hash numbers and words to a 63-bit seed; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Normal(Protocol):
    """A source of standard normal numbers, one row per image: [B, *shape]."""

    def __call__(self, *shape: int) -> Tensor: ...

    def shared(self) -> float:
        """One standard normal number that all images, devices and passes of a step have in common."""


class PerImageNormal:
    """Gaussian numbers from one generator per image: [B, *shape], each row a function of its seed alone.

    The generators are on the CPU, so that an image does not depend on the type of device either.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.common = torch.Generator().manual_seed(mix("shared"))
        self.device = torch.device(device)

    def __call__(self, *shape: int) -> Tensor:
        return self.on_device(torch.stack([torch.randn(shape, generator=g) for g in self.generators]))

    def several(self, count: int, *shape: int) -> Tensor:
        """The numbers of ``count`` calls at once: [count, B, *shape]."""

        def rows(generator: torch.Generator) -> Tensor:
            if prod(shape) % BLOCK == 0:
                return torch.randn(count, *shape, generator=generator)
            numbers = [torch.randn(shape, generator=generator) for _ in range(count)]
            return torch.stack(numbers) if numbers else torch.empty(0, *shape)

        if count * prod(shape) * len(self.generators) < FEW_NUMBERS or self.device.type == "cpu":
            drawn = [rows(generator) for generator in self.generators]
        else:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                drawn = [*pool.map(rows, self.generators)]
        return self.on_device(torch.stack(drawn, dim=1))

    def on_device(self, numbers: Tensor) -> Tensor:
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()  # otherwise the copy waits for the device
        return numbers.to(self.device, non_blocking=True)

    def shared(self) -> float:
        """Always the same sequence: shared numbers cannot depend on the seed of one image."""
        return torch.randn((), generator=self.common).item()


class GlobalBatchNormal:
    """Gaussian numbers of a global batch, of which each rank and micro-step takes its own rows.

    Every rank samples the whole batch on its device (G numbers of ``shape``) and keeps ``rows``. This takes a
    millisecond on a GPU and makes the randomness independent of the number of ranks and of accumulation.
    """

    def __init__(self, seed: int, global_batch_size: int, rows: Tensor) -> None:
        self.generator = torch.Generator(rows.device).manual_seed(seed)
        self.common = torch.Generator().manual_seed(mix("shared", seed))
        self.global_batch_size = global_batch_size
        self.rows = rows

    def __call__(self, *shape: int) -> Tensor:
        numbers = torch.randn(
            self.global_batch_size, *shape, generator=self.generator, device=self.rows.device
        )
        return numbers[self.rows]

    def shared(self) -> float:
        """A number that is equal on every rank, without waiting for the device."""
        return torch.randn((), generator=self.common).item()
