"""Whether a family keeps the contract of ``models.paradigm``, found out on tensors without values.

A fault of a user's class is one line that names the class, the method and the shapes, before anything starts.
Shapes: B rows, R references of a row, M noise draws, K parts, N tokens of all parts, C H W a latent.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_transdiff.config import ModelSettings, SamplingConfig, require
from lit_transdiff.flow.processes import process_class
from lit_transdiff.flow.solvers import ADAPTIVE
from lit_transdiff.models.flops import Zeros
from lit_transdiff.models.paradigm import Paradigm, Problem, network_class

OWN_PACKAGE = __name__.partition(".")[0]
NUM_ROWS, NUM_DRAWS = 2, 3
MOST_PARTS = 16  # parts that are drawn; of an image with more, only the first ones are
TRIED: set[str] = set()  # settings, with the class


class NeedsValues(Exception):
    """A method depends on the values of tensors, so its result is not known before it runs."""


def check_family_class(config: ModelSettings) -> None:
    """Refuse a class of models that lacks what a family defines, by its names alone."""
    settings, what = type(config), f"PARADIGMS[{config.paradigm!r}]"
    require(isinstance(config, ModelSettings), f"{what}.settings", settings.__name__, "a ModelSettings")
    lacking = [name for name in ModelSettings.__annotations__ if not hasattr(config, name)]
    require(not lacking, f"{settings.__name__}: fields", f"no {', '.join(lacking)}", "a field for each")
    try:
        kind = network_class(config)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}.network: {type(error).__name__}: {error}") from error
    is_family = isinstance(kind, type) and issubclass(kind, Paradigm)
    require(is_family, f"{what}.network", kind, "a subclass of Paradigm")
    lacking = sorted(kind.__abstractmethods__)
    allowed = "all that Paradigm asks for"
    require(not lacking, f"{kind.__name__}: methods", f"no {', '.join(lacking)}", allowed)
    require(hasattr(kind, "stacks"), f"{kind.__name__}.stacks", None, "a Stack for each list of blocks")
    names = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    for name, stack in kind.stacks.items():
        where = f"{kind.__name__}.stacks[{name!r}].depth"
        require(stack.depth in names, where, stack.depth, f"a field of {settings.__name__}")
    process, prediction = kind.process_of(config)
    allowed = f"{' or '.join(process_class(process).predictions)} with the process {process!r}"
    fits = prediction in process_class(process).predictions
    require(fits, f"{kind.__name__}.prediction", prediction, allowed)


def check_family(config: ModelSettings, solver: str) -> None:
    """``try_family``, once for settings of a family from outside of this package, whose own are tested."""
    kind = network_class(config)
    key = f"{id(kind)} {solver in ADAPTIVE} {config!r}"
    if kind.__module__.partition(".")[0] != OWN_PACKAGE and key not in TRIED:
        try_family(config, solver)
        TRIED.add(key)


def try_family(config: ModelSettings, solver: str) -> None:
    """Refuse a class of models whose methods fail or give tensors of wrong shapes; with one block a stack."""
    kind = network_class(config)
    ones = {stack.depth: 1 for stack in kind.stacks.values()}
    with torch.device("meta"), torch.no_grad(), suppress(NeedsValues):
        with in_one_line(kind, "__init__"):
            model: Paradigm = kind(replace(config, **ones)).eval()  # type: ignore[call-arg, type-var]
        check_structure(model)
        with suppress(NeedsValues):
            try_training(model)
        try_drawing(model, solver)


@contextmanager
def in_one_line(kind: type, method: str) -> Iterator[None]:
    """Turn an error in a method into one line."""
    try:
        yield
    except StopIteration:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        if "meta" in first.lower():
            raise NeedsValues from error
        raise ValueError(f"{kind.__name__}.{method}: {type(error).__name__}: {first}") from error


def check_structure(model: Paradigm) -> None:
    """Refuse a model that lacks attributes, or the modules, methods and weights that its class names."""
    name = type(model).__name__
    for attribute in ("config", "part_sizes", "token"):
        given = getattr(model, attribute, None)
        require(given is not None, f"{name}.{attribute}", None, "set by __init__")
    sizes, token = model.part_sizes, model.token
    fits = isinstance(sizes, tuple) and all(isinstance(n, int) and n >= 1 for n in sizes) and len(sizes) > 0
    require(fits, f"{name}.part_sizes", sizes, "a tuple of the numbers of tokens of the parts")
    fits = isinstance(token, tuple) and all(isinstance(n, int) for n in token)
    require(fits, f"{name}.token", token, "a tuple, the shape of a token")
    modules = dict(model.named_modules())
    for stack in type(model).stacks.values():
        blocks = modules.get(stack.path)
        fits = isinstance(blocks, nn.ModuleList) and len(blocks) == 1
        number = len(blocks) if isinstance(blocks, nn.ModuleList) else type(blocks).__name__
        allowed = f"an nn.ModuleList with {stack.depth} blocks: one for {stack.depth}=1"
        require(fits, f"{name}: the stack {stack.path!r}", number, allowed)
    for method in (*model.methods, *model.static):
        owner, _, last = method.rpartition(".")
        fits = owner in modules and callable(getattr(modules[owner], last, None))
        require(fits, f"{name}: a name of a method", method, "a method of the model, or of a module in it")
    weights = list(model.state_dict())
    for prefix in (*model.head_prefixes, *model.undecayed, model.adaptation.classes):
        found = any(key.startswith(prefix) for key in weights)
        require(found, f"{name}: a name of weights", prefix, "the beginning of the name of a weight it has")


def try_training(model: Paradigm) -> None:
    """Refuse a model whose methods fail in a pass of a training step, or give wrong shapes there."""
    config, kind, normal = model.config, type(model), Zeros(NUM_ROWS)
    latents = (config.latent_channels, config.latent_size, config.latent_size)
    x, number = torch.zeros(NUM_ROWS, config.num_references, *latents), sum(model.part_sizes)
    with in_one_line(kind, "parts"):
        tokens = model.parts(x)
    require_shape(kind, "parts", tokens, (NUM_ROWS, number, *model.token), "B, N, *token")
    with in_one_line(kind, "condition"):
        memory = model.condition(model.blank(NUM_ROWS), torch.zeros(NUM_ROWS, dtype=torch.bool), x, normal)
    draws, parts = NUM_DRAWS * NUM_ROWS, len(model.part_sizes)
    x_t, t = torch.zeros(draws, number, *model.token), torch.zeros(draws, parts)
    with in_one_line(kind, "predict"):
        output = model.predict(x_t, t, memory)
    require_shape(kind, "predict", output, x_t.shape, "M B, N, *token", twice=gives_variances(model))
    with in_one_line(kind, "weights"):
        weights = model.weights(memory)
    if weights is not None:
        shapes = [(parts,), (NUM_ROWS, parts), (draws, parts)]
        allowed = f"one of {shapes} with B = {NUM_ROWS}, M = {NUM_DRAWS}, K = {parts}"
        require(tuple(weights.shape) in shapes, f"{kind.__name__}.weights", tuple(weights.shape), allowed)


def try_drawing(model: Paradigm, solver: str) -> None:
    """Refuse a model that cannot draw the parts of images, with guidance, from solutions of zeros."""
    config, kind = model.config, type(model)
    sampling = SamplingConfig(guidance_scale=2.0, num_parts=2 if model.parts_are_free else None)
    with in_one_line(kind, "decode"):
        decoding = model.decode(model.blank(NUM_ROWS), sampling, Zeros(NUM_ROWS), model.keep())
    allowed = "a generator"
    require(isinstance(decoding, Generator), f"{kind.__name__}.decode", type(decoding).__name__, allowed)
    solution: Tensor | None = None
    for number in range(MOST_PARTS + 1):
        try:
            with in_one_line(kind, "decode"):
                problem = decoding.send(solution)  # type: ignore[arg-type]
        except StopIteration as end:
            images = end.value
            break
        fits = isinstance(problem, Problem)
        require(fits, f"what {kind.__name__}.decode yields", type(problem).__name__, "a Problem")
        solution = torch.zeros(NUM_ROWS, *problem.shape)
        if number == 0:
            try_problem(model, problem, solution, solver)
    else:
        return
    size = config.latent_size
    latents = NUM_ROWS, config.num_references, config.latent_channels, size, size
    require_shape(kind, "decode", images, latents, "B, R, C, H, W")


def try_problem(model: Paradigm, problem: Problem, x_t: Tensor, solver: str) -> None:
    """Refuse a problem whose network fails or gives wrong shapes; of an adaptive solver, at times of rows."""
    kind, twice = type(model), gives_variances(model)
    times = {"": 1, f" at a time of each row [B], by {solver}": torch.ones(NUM_ROWS)}
    for how, t in times.items() if solver in ADAPTIVE else [("", 1)]:
        with in_one_line(kind, f"decode, Problem.predict{how}"):
            alone = problem.predict(x_t, t)
        with in_one_line(kind, f"decode, Problem.pair{how}"):
            c, u = problem.pair(x_t, t)
        for name, output in (("predict", alone), ("pair", c), ("pair", u)):
            require_shape(kind, f"decode, Problem.{name}{how}", output, x_t.shape, "B, *shape", twice)


def gives_variances(model: Paradigm) -> bool:
    return model.process_of(model.config)[1] == "noise_and_variance"


def require_shape(
    kind: type, method: str, given: Any, shape: Sequence[int], meaning: str, twice: bool = False
) -> None:
    """Refuse anything but a tensor of this shape or, with ``twice``, of this shape with one axis doubled."""
    got, expected = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__, tuple(shape)
    shapes = [expected]
    if twice:
        shapes = [(*expected[:i], 2 * n, *expected[i + 1 :]) for i, n in enumerate(expected) if i > 0]
    allowed = f"{' or '.join(map(str, shapes))}, that is [{meaning}]{', an axis twice' if twice else ''}"
    require(got in shapes, f"{kind.__name__}.{method}", got, allowed)
