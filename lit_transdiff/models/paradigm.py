"""The seam: what a family of models is to training, sampling and planning, which know no family.

A paradigm says which tokens an image is, in which parts they are drawn, and what the network predicts of
them. It knows no loss, no solver and no trainer. What a token is, is its own business: a latent pixel, a
patch, a whole latent.

Shapes: B images (rows of the batch), R references of a row, M noise draws, K parts, N tokens of all parts
together, C H W a latent; ``token`` the shape of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.config.paradigms import PARADIGMS
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.linear import use_faster_product

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.paradigms import ModelSettings

# x_t [B, *shape] and a time of the process that all rows share, or the rows' own [B] (``times_of_rows``) ->
# what the network predicts of the rows.
Predict = Callable[[Tensor, Any], Tensor]
PredictPair = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A part that is to be drawn, given everything that was drawn before it; the answer is a tensor [B,
    *shape].

    Where ``predict`` and ``pair`` are each a ``functools.partial`` of a function of the weights and of its
    arguments alone, the solver's whole loop can become one CUDA graph for all batches of a form.
    """

    shape: tuple[int, ...]  # the shape of a row
    predict: Predict  # the prediction with the condition
    pair: PredictPair  # with and without the condition, in one pass; equal where there is no guidance
    # share of the tokens that are drawn when this part is, for guidance that grows with it
    progress: float = 1.0
    scale: float | None = None  # the guidance scale in place of the sampler's
    num_steps: int | None = None  # the solver's steps in place of the sampler's
    reuses_noise: bool = False  # begins with the noise of the part before, not with new noise


def in_one_pass(
    predict: Callable[[Any, Tensor, Any], Tensor], both: Any, x_t: Tensor, t: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The predictions of all rows with the first half of a memory and with the second, in one call."""
    times = torch.cat([t, t]) if isinstance(t, Tensor) else t
    c, u = predict(both, torch.cat([x_t, x_t]), times).chunk(2)
    return c, u


def times_of_rows(t: float | Tensor, x_t: Tensor) -> Tensor:
    """The times of the rows ``x_t`` for a network: [1] of one that they share, or their own [B]."""
    times = t if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float32, device=x_t.device)
    return times.to(x_t.device, torch.float32)


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks within a model: by them it is compiled, computed again, cut, and counted."""

    path: str  # the path of its nn.ModuleList
    depth: str  # the setting of the number of its blocks


class Paradigm(nn.Module, ABC):
    """A family of models. Everything above ``abstractmethod`` has a default that a simple family keeps.

    Its constructor takes the family's settings alone, and works on the meta device. Numbers are random
    through arguments only: a ``Normal`` gives standard normal numbers [B, *shape], a row for each image
    (``ndtr`` makes them uniform, ``argsort`` an order), and its ``shared()`` a number that all images of a
    global batch have in common. Numbers of tokens follow from settings and from such numbers, never from
    tensors, so that a model can be counted without values.
    """

    # a name in flow.processes.PROCESSES: how data become noise, and noise data
    process: ClassVar[str] = "flow"
    prediction: ClassVar[str] = "velocity"  # the output of ``predict``, in a word that the process knows
    stacks: ClassVar[Mapping[str, Stack]]  # by the names that training.activation_checkpointing knows
    # prefixes of the weights that ``predict`` alone reads, which a stage can train alone
    head_prefixes: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()  # prefixes of the names of weights that have no weight decay
    # methods that read weights and are called from outside
    methods: ClassVar[tuple[str, ...]] = ("condition", "predict")
    # called while an image is drawn, besides ``evaluated``: functions of weights and arguments alone, which
    # change no argument and wait for no number, so that each may become a CUDA graph
    static: ClassVar[tuple[str, ...]] = ()
    adaptation: ClassVar[Adaptation] = Adaptation()  # how a model starts from one of another shape
    parts_are_free: ClassVar[bool] = False  # sampling.num_parts says in how many an image is drawn
    has_features: ClassVar[bool] = False  # gives ``features``, of which there are metrics and fusions
    config: ModelSettings
    part_sizes: tuple[int, ...]  # tokens of each part, in training
    token: tuple[int, ...]  # shape of a token
    condition_shape: tuple[int, ...] | None = None  # the shape of a row's condition, if it is no label

    @classmethod
    def process_of(cls, config: ModelSettings) -> tuple[str, str]:
        """The names of process and prediction: the class's own, or those of a flow's velocity."""
        if config.process in (None, cls.process):
            return cls.process, cls.prediction
        return config.process, "velocity"

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse settings of the family that name what is in no table of its own."""

    # --- training

    @abstractmethod
    def parts(self, x: Tensor) -> Tensor:
        """Latents [B, R, C, H, W] as the tokens that are predicted, part by part: [B, N, *token]."""

    @abstractmethod
    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> Any:
        """The memory: all that depends on neither noise nor time, made once for all M draws.

        It is made of the labels [B], or conditions [B, *condition_shape] (of the null class where ``drop``
        [B] is true), and of the clean latents. A family also draws its orders and masks of tokens here.
        """

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, memory: Any) -> Tensor:
        """Predictions [(M B), N, ...] for ``x_t`` [(M B), N, *token] at times ``t`` [(M B), K].

        A row of the memory serves the M rows (draw, image) of its image. ``x_t`` may be more precise than the
        weights.
        """

    def weights(self, memory: Any) -> Tensor | None:
        """The weights of the parts in the loss, [K], [B, K] or [(M B), K]; None: all are equal."""
        return None

    # --- sampling

    @abstractmethod
    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        """Yield the parts of images as problems, get the solution of each, and return the latents.

        The latents are [B, R, C, H, W]. The sampler owns solver, guidance, noise and seeds. A family draws
        its own random numbers, such as the order of tokens, from ``normal``, and does not yield parts that
        it draws in a way of its own. ``kept`` is the result of ``keep``; ``contexts`` replaces the context
        of the labels where ``has_features``.
        """
        yield from ()
        raise AssertionError

    def stand_in(self, latest: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tokens that a film shows for a part [B, *shape] not drawn yet, after ``latest``: zeros."""
        return latest.new_zeros(len(latest), *shape)

    def keep(self) -> Any:
        """The values for ``decode`` that are made once for all images, such as those of the null class."""
        return None

    def features(self, labels: Tensor, references: Tensor | None) -> Tensor:
        """Semantic features [B, S, D] of labels and of the references before the last (``has_features``)."""
        raise ValueError(f"model.paradigm: {self.config.paradigm!r} has no semantic features.")

    def fusion(self, second: Tensor, kind: str, seed: int) -> Any:
        """``contexts`` for ``decode`` that splice the features of its labels with those of ``second`` [B]."""
        raise ValueError(
            f"--fuse: model.paradigm {self.config.paradigm!r} has no semantic features to splice."
        )

    def blank(self, rows: int) -> Tensor:
        """Labels, or conditions, of so many rows to count with."""
        shape = self.condition_shape
        return torch.zeros(rows, dtype=torch.int64) if shape is None else torch.zeros(rows, *shape)

    # --- structure

    @property
    def evaluated(self) -> nn.Module:
        """The module called at every evaluation of a solver: ``evaluated(x_t, t, memory)``, rows first."""
        return self

    def block_lists(self) -> dict[str, nn.ModuleList]:
        """The blocks of each stack."""
        return {name: self.get_submodule(self.stacks[name].path) for name in stacks_of(self.config)}  # type: ignore[misc]

    def units(self) -> Iterator[nn.Module | list[nn.Module]]:
        """The modules that a sharding strategy gathers together, in order; the rest is one more unit."""
        for blocks in self.block_lists().values():
            yield from blocks


def stacks_of(settings: ModelSettings) -> dict[str, int]:
    """The number of blocks of each stack that a model of these settings has."""
    numbers = {name: getattr(settings, stack.depth) for name, stack in network_class(settings).stacks.items()}
    return {name: number for name, number in numbers.items() if number > 0}


def network_class(settings: ModelSettings) -> type[Paradigm]:
    """The class of a model of these settings."""
    return network_of(settings.paradigm)


def network_of(paradigm: str) -> type[Paradigm]:
    """The class of the models of a family."""
    network = PARADIGMS[paradigm].network
    if isinstance(network, str):
        module, _, name = network.partition(":")
        network = getattr(import_module(module), name)
    return network  # type: ignore[no-any-return]


def build_model(settings: ModelSettings) -> Paradigm:
    """A new model, with the products that are the faster here."""
    model: Paradigm = network_class(settings)(settings)  # type: ignore[call-arg]
    use_faster_product(model)
    return model
