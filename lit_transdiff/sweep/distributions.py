"""The distributions of a W&B sweep file: sampling, enumeration for a grid, and optuna's equivalents.

Names and fields follow W&B's documentation of sweep files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_transdiff.config import require, require_known

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Spec = dict[str, Any]


@dataclass(frozen=True)
class Distribution:
    """Required fields, sampling function, values for a grid (None if not enumerable) and optional fields."""

    needs: tuple[str, ...]
    draw: Callable[[Spec, random.Random], Any]
    values: Callable[[Spec], list[Any]] | None = None
    takes: tuple[str, ...] = ()


def rounded(spec: Spec, value: float) -> float:
    """Round ``value`` to the nearest multiple of ``q`` (default 1); an integer ``q`` gives an integer."""
    q = spec.get("q", 1)
    return round(value / q) * q if isinstance(q, int) else round(round(value / q) * q, 12)


def log_between(spec: Spec, rng: random.Random) -> float:
    """Sample log-uniformly between two values."""
    return math.exp(rng.uniform(math.log(spec["min"]), math.log(spec["max"])))


def inverse_between(spec: Spec, rng: random.Random) -> float:
    """Sample a value between two bounds whose inverse is log-uniform."""
    return math.exp(-rng.uniform(-math.log(spec["max"]), -math.log(spec["min"])))


def gauss(spec: Spec, rng: random.Random) -> float:
    """Sample the normal distribution with mean ``mu`` and standard deviation ``sigma``."""
    return rng.gauss(spec.get("mu", 0), spec.get("sigma", 1))


def beta(spec: Spec, rng: random.Random) -> float:
    """Sample the beta distribution with parameters ``a`` and ``b`` on [0, 1]."""
    return rng.betavariate(spec.get("a", 1), spec.get("b", 1))


def exponential(spec: Spec, rng: random.Random) -> float:
    """Sample log-uniformly; the bounds are exponents of e."""
    return math.exp(rng.uniform(spec["min"], spec["max"]))


def steps(spec: Spec) -> list[Any]:
    """All values of a rounded uniform distribution."""
    q = spec.get("q", 1)
    return [
        rounded(spec, spec["min"] + i * q) for i in range(int((spec["max"] - spec["min"]) / q + 1e-9) + 1)
    ]


def choose(spec: Spec, rng: random.Random) -> Any:
    """Sample one of the values, with their probabilities if given."""
    return rng.choices(spec["values"], weights=spec.get("probabilities"))[0]


BOTH, BELL, SHAPE, Q = ("min", "max"), ("mu", "sigma"), ("a", "b"), ("q",)
DISTRIBUTIONS: dict[str, Distribution] = {
    "constant": Distribution(("value",), lambda s, rng: s["value"], lambda s: [s["value"]]),
    "categorical": Distribution(("values",), choose, lambda s: list(s["values"]), ("probabilities",)),
    "int_uniform": Distribution(
        BOTH, lambda s, rng: rng.randint(s["min"], s["max"]), lambda s: [*range(s["min"], s["max"] + 1)]
    ),
    "uniform": Distribution(BOTH, lambda s, rng: rng.uniform(s["min"], s["max"])),
    "q_uniform": Distribution(BOTH, lambda s, rng: rounded(s, rng.uniform(s["min"], s["max"])), steps, Q),
    "log_uniform": Distribution(BOTH, exponential),
    "q_log_uniform": Distribution(BOTH, lambda s, rng: rounded(s, exponential(s, rng)), takes=Q),
    "log_uniform_values": Distribution(BOTH, log_between),
    "q_log_uniform_values": Distribution(BOTH, lambda s, rng: rounded(s, log_between(s, rng)), takes=Q),
    "inv_log_uniform": Distribution(BOTH, lambda s, rng: 1 / exponential(s, rng)),
    "inv_log_uniform_values": Distribution(BOTH, inverse_between),
    "normal": Distribution((), gauss, takes=BELL),
    "q_normal": Distribution((), lambda s, rng: rounded(s, gauss(s, rng)), takes=(*BELL, *Q)),
    "log_normal": Distribution((), lambda s, rng: math.exp(gauss(s, rng)), takes=BELL),
    "q_log_normal": Distribution((), lambda s, rng: rounded(s, math.exp(gauss(s, rng))), takes=(*BELL, *Q)),
    "beta": Distribution((), beta, takes=SHAPE),
    "q_beta": Distribution((), lambda s, rng: rounded(s, beta(s, rng)), takes=(*SHAPE, *Q)),
}


def name_of(spec: Spec) -> str:
    """The distribution named by a parameter, or inferred from its fields as W&B does."""
    if "distribution" in spec:
        name = str(spec["distribution"])
        return {"categorical_w_probabilities": "categorical"}.get(name, name)
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    return (
        "int_uniform" if isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int) else "uniform"
    )


def check(parameter: str, spec: Any) -> None:
    """Refuse a parameter that fits no distribution; the error names the field."""
    place = f"parameters.{parameter}"
    require(isinstance(spec, dict) and len(spec) > 0, place, spec, "value, values, or min and max")
    name = name_of(spec)
    require_known(f"{place}.distribution", name, DISTRIBUTIONS)
    fields = DISTRIBUTIONS[name]
    for field in fields.needs:
        require(field in spec, place, spec, f"{name} with {' and '.join(fields.needs)}")
    for field in spec:
        require_known(f"{place}: {name}", field, (*fields.needs, *fields.takes, "distribution"))
    if name == "categorical":
        check_choices(place, spec)
    elif name != "constant":
        check_numbers(place, name, spec)


def check_choices(place: str, spec: Spec) -> None:
    """Refuse an empty list of values, and probabilities that do not match it."""
    values, chances = spec["values"], spec.get("probabilities")
    require(isinstance(values, list) and len(values) > 0, f"{place}.values", values, "a list of at least one")
    if chances is not None:
        numbers = isinstance(chances, list) and all(map(is_number, chances))
        good = numbers and len(chances) == len(values) and min(chances) >= 0 and sum(chances) > 0
        allowed = f"{len(values)} numbers of at least 0, one for each value"
        require(good, f"{place}.probabilities", chances, allowed)


def check_numbers(place: str, name: str, spec: Spec) -> None:
    """Refuse bounds and shape parameters that are not valid for the distribution."""
    for field in [field for field in spec if field != "distribution"]:
        require(is_number(spec[field]), f"{place}.{field}", spec[field], "a number")
    if "min" in spec:
        allowed = f"at least min, which is {spec['min']}"
        require(spec["min"] <= spec["max"], f"{place}.max", spec["max"], allowed)
        fits = "log" not in name or "values" not in name or spec["min"] > 0
        require(fits, f"{place}.min", spec["min"], f"above 0 for {name}")
    for field in BOTH if name == "int_uniform" else ():
        allowed = "a whole number for int_uniform"
        require(isinstance(spec[field], int), f"{place}.{field}", spec[field], allowed)
    for field in ("q", *SHAPE):
        require(spec.get(field, 1) > 0, f"{place}.{field}", spec.get(field), "above 0")
    require(spec.get("sigma", 1) >= 0, f"{place}.sigma", spec.get("sigma"), "at least 0")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def for_optuna(parameter: str, spec: Spec) -> BaseDistribution:
    """Optuna's equivalent of a parameter; categorical values, which may be lists, become indices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    name = name_of(spec)
    if name in ("constant", "categorical"):
        return CategoricalDistribution(list(range(len(DISTRIBUTIONS[name].values(spec)))))  # type: ignore[misc]
    if name == "int_uniform":
        return IntDistribution(spec["min"], spec["max"])
    if name == "q_uniform":
        return FloatDistribution(spec["min"], steps(spec)[-1], step=spec.get("q", 1))
    if name in ("uniform", "log_uniform_values", "inv_log_uniform_values"):
        return FloatDistribution(spec["min"], spec["max"], log=name != "uniform")
    if name == "log_uniform":
        return FloatDistribution(math.exp(spec["min"]), math.exp(spec["max"]), log=True)
    if name == "inv_log_uniform":
        return FloatDistribution(math.exp(-spec["max"]), math.exp(-spec["min"]), log=True)
    logs = "(inv_)log_uniform or (inv_)log_uniform_values"
    allowed = f"constant, categorical, int_uniform, uniform, q_uniform, {logs} for bayes"
    raise ValueError(f"parameters.{parameter}.distribution: got {name!r}; allowed: {allowed}.")
