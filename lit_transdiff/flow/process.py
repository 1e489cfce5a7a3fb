"""How data become noise in training, and noise becomes data in sampling: the processes that families of models go by.

Shapes: n rows (parts of images), of any shape each. Times are of the process: numbers or whole numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar, Protocol

from torch import Tensor

from lit_transdiff.config import FlowConfig, SamplingConfig, require
from lit_transdiff.flow.solvers import DrawNoise


class Unsolved(Protocol):
    """A part that is to be drawn (see ``models.paradigm.Problem``)."""

    def predict(self, x_t: Tensor, t: float) -> Tensor: ...

    def pair(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]: ...


class Process(ABC):
    """A process of a run; ``prediction`` is the word for what the network predicts."""

    predictions: ClassVar[Collection[str]]  # the words that it knows

    def __init__(self, config: FlowConfig, prediction: str) -> None:
        require(prediction in self.predictions, f"prediction of {type(self).__name__}", prediction, " or ".join(self.predictions))
        self.config, self.prediction = config, prediction

    @classmethod
    @abstractmethod
    def check(cls, config: FlowConfig) -> None:
        """Refuse settings of training that it does not know or does not read."""

    @classmethod
    @abstractmethod
    def check_sampling(cls, sampling: SamplingConfig) -> None:
        """Refuse settings of sampling that it does not know or does not read."""

    @abstractmethod
    def times(self, normal: Tensor) -> Tensor:
        """Training times from standard normal numbers of any shape."""

    @abstractmethod
    def share(self, t: Tensor) -> Tensor:
        """Of noise at times of any shape, from 0 to 1, by which losses are sorted for people."""

    @abstractmethod
    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of rows x and noise [n, ...] at t [n]."""

    @abstractmethod
    def losses(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """The loss [n] of rows of which the network said ``output`` [n, ...]."""

    @abstractmethod
    def solve(self, problem: Unsolved, noise: Tensor, draw: DrawNoise, sampling: SamplingConfig) -> Tensor:
        """Carry ``noise`` [B, ...] to data, guided with ``sampling.guidance_scale``; ``draw()`` gives more of its shape."""
