"""The interface of a process: how data become noise in training, and noise becomes data in sampling.

Shapes: n rows (parts of images) of any shape. Times are in the unit of the process: floats or integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from lit_transdiff.config import FlowConfig, SamplingConfig, require
from lit_transdiff.flow.solvers import DrawNoise


class Unsolved(Protocol):
    """A part that is to be sampled (see ``models.paradigm.Problem``)."""

    def predict(self, x_t: Tensor, t: float | Tensor) -> Tensor: ...

    def pair(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]: ...


class Process(ABC):
    """The noise process of a run; ``prediction`` names the network's output."""

    predictions: ClassVar[Collection[str]]  # the names that it supports

    def __init__(self, config: FlowConfig, prediction: str) -> None:
        allowed = " or ".join(self.predictions)
        require(prediction in self.predictions, f"prediction of {type(self).__name__}", prediction, allowed)
        self.config, self.prediction = config, prediction

    @classmethod
    @abstractmethod
    def check(cls, config: FlowConfig) -> None:
        """Refuse training settings that are unknown to it or have no effect."""

    @classmethod
    @abstractmethod
    def check_sampling(cls, sampling: SamplingConfig) -> None:
        """Refuse sampling settings that are unknown to it or have no effect."""

    @classmethod
    def unread(cls, sampling: SamplingConfig) -> Mapping[str, str]:
        """The settings of sampling that have no effect with the others, and with which of them and why."""
        return {}

    @abstractmethod
    def times(self, normal: Tensor) -> Tensor:
        """Training times from standard normal numbers of any shape."""

    @abstractmethod
    def share(self, t: Tensor) -> Tensor:
        """The noise level in [0, 1] at times of any shape, by which losses are binned for reporting."""

    @abstractmethod
    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for rows x and noise [n, ...] at t [n]."""

    @abstractmethod
    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """The loss [n] of rows with the network's ``output`` [n, ...]."""

    @abstractmethod
    def solve(self, problem: Unsolved, noise: Tensor, draw: DrawNoise, sampling: SamplingConfig) -> Tensor:
        """Integrate ``noise`` [B, ...] to data with guidance; ``draw()`` returns more noise of its shape."""
