"""The distributions of a W&B sweep file's parameters: drawing, listing for a grid, and optuna's counterpart.

Names and fields are those of W&B's documentation of sweep files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_transdiff.config import require, unknown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Spec = dict[str, Any]


@dataclass(frozen=True)
class Distribution:
    """The fields it must have, how a value is drawn, and what a grid walks through (nothing: no grid can)."""

    needs: tuple[str, ...]
    draw: Callable[[Spec, random.Random], Any]
    values: Callable[[Spec], list[Any]] | None = None


def rounded(spec: Spec, value: float) -> float:
    """To the multiple of ``q`` (default 1) nearest to ``value``; whole numbers stay whole."""
    q = spec.get("q", 1)
    return round(value / q) * q if isinstance(q, int) else round(round(value / q) * q, 12)


def log_between(spec: Spec, rng: random.Random) -> float:
    """Log-uniform between two values."""
    return math.exp(rng.uniform(math.log(spec["min"]), math.log(spec["max"])))


def steps(spec: Spec) -> list[Any]:
    """All values of a rounded uniform."""
    q = spec.get("q", 1)
    return [rounded(spec, spec["min"] + i * q) for i in range(int((spec["max"] - spec["min"]) / q + 1e-9) + 1)]


def choose(spec: Spec, rng: random.Random) -> Any:
    """One of the values, with their probabilities if there are any."""
    return rng.choices(spec["values"], weights=spec.get("probabilities"))[0]


BOTH = ("min", "max")
DISTRIBUTIONS: dict[str, Distribution] = {
    "constant": Distribution(("value",), lambda s, rng: s["value"], lambda s: [s["value"]]),
    "categorical": Distribution(("values",), choose, lambda s: list(s["values"])),
    "int_uniform": Distribution(BOTH, lambda s, rng: rng.randint(s["min"], s["max"]), lambda s: [*range(s["min"], s["max"] + 1)]),
    "uniform": Distribution(BOTH, lambda s, rng: rng.uniform(s["min"], s["max"])),
    "q_uniform": Distribution(BOTH, lambda s, rng: rounded(s, rng.uniform(s["min"], s["max"])), steps),
    "log_uniform": Distribution(BOTH, lambda s, rng: math.exp(rng.uniform(s["min"], s["max"]))),
    "log_uniform_values": Distribution(BOTH, log_between),
    "q_log_uniform_values": Distribution(BOTH, lambda s, rng: rounded(s, log_between(s, rng))),
    "normal": Distribution((), lambda s, rng: rng.gauss(s.get("mu", 0), s.get("sigma", 1))),
    "log_normal": Distribution((), lambda s, rng: math.exp(rng.gauss(s.get("mu", 0), s.get("sigma", 1)))),
}


def name_of(spec: Spec) -> str:
    """The distribution that a parameter names, or that follows from its fields as at W&B."""
    if "distribution" in spec:
        name = str(spec["distribution"])
        return {"categorical_w_probabilities": "categorical"}.get(name, name)
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    return "int_uniform" if isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int) else "uniform"


def check(parameter: str, spec: Any) -> None:
    """Refuse a parameter that no distribution fits."""
    require(isinstance(spec, dict) and len(spec) > 0, f"parameters.{parameter}", spec, "value, values, or min and max")
    name = name_of(spec)
    if name not in DISTRIBUTIONS:
        raise unknown(f"parameters.{parameter}.distribution", name, DISTRIBUTIONS)
    for field in DISTRIBUTIONS[name].needs:
        require(field in spec, f"parameters.{parameter}", spec, f"{name} with {' and '.join(DISTRIBUTIONS[name].needs)}")
    require(
        name != "categorical" or len(spec["values"]) > 0, f"parameters.{parameter}.values", spec.get("values"), "at least one"
    )


def for_optuna(parameter: str, spec: Spec) -> BaseDistribution:
    """Optuna's counterpart of a parameter. Values that optuna cannot hold (lists) stand for themselves by their number."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    name = name_of(spec)
    if name in ("constant", "categorical"):
        return CategoricalDistribution(list(range(len(DISTRIBUTIONS[name].values(spec)))))  # type: ignore[misc]
    if name == "int_uniform":
        return IntDistribution(spec["min"], spec["max"])
    if name == "q_uniform":
        return FloatDistribution(spec["min"], steps(spec)[-1], step=spec.get("q", 1))
    if name in ("uniform", "log_uniform_values"):
        return FloatDistribution(spec["min"], spec["max"], log=name != "uniform")
    if name == "log_uniform":
        return FloatDistribution(math.exp(spec["min"]), math.exp(spec["max"]), log=True)
    allowed = "constant, categorical, int_uniform, uniform, q_uniform, log_uniform or log_uniform_values for method bayes"
    raise ValueError(f"parameters.{parameter}.distribution: got {name!r}; allowed: {allowed}.")
