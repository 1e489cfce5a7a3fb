"""Settings without effect: one that was changed, but is not read with the other settings, is refused.

This is checked when a run is to be trained, not when a trained one is read, so that overrides of sampling and
evaluation remain possible. Exempt are settings whose counterpart is often changed alone, in one command or
one trial of a sweep (scales of a solver, the interval of a guidance scale of 1, the floor of a constant
learning rate, the mean of a uniform density, scores during training that are off, tracking without W&B), or
that differ between the runs of a pipeline, which share their overrides (settings of single stages, of several
references, of the autoencoder's training).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from lit_transdiff.base.remote import is_remote
from lit_transdiff.config.checks import require
from lit_transdiff.config.data import is_stream

if TYPE_CHECKING:
    from lit_transdiff.config.run import RunConfig


@dataclass(frozen=True)
class Effect:
    """A setting by its dotted name, whether it has an effect in a run, and the reason if not."""

    field: str
    is_read: Callable[[RunConfig], bool]
    why_not: str


def reads_urls(run: RunConfig) -> bool:
    """Whether training or validation reads shards from a URL through the cache."""
    places = (run.data.train, run.data.evaluation or "")
    return any(is_remote(place) and not is_stream(place) for place in places)


NO_URL = "neither data.train nor data.evaluation is the URL of a folder"
EFFECTS = (
    Effect("data.cache_dir", reads_urls, NO_URL),
    Effect("data.cache_gb", reads_urls, NO_URL),
    Effect(
        "checkpoint.best_is",
        lambda run: run.checkpoint.keep_best is not None,
        "checkpoint.keep_best names no metric",
    ),
    Effect(
        "safety.max_bad_steps",
        lambda run: run.safety.on_bad_step != "stop",
        "safety.on_bad_step 'stop' ends at the first",
    ),
    Effect(
        "training.validate_every",
        lambda run: run.data.evaluation is not None or run.checkpoint.keep_best is not None,
        "there is no data.evaluation",
    ),
)


def check_effects(run: RunConfig) -> None:
    """Raise ``ValueError`` for a changed setting of EFFECTS that has no effect in the run."""
    for effect in EFFECTS:
        section, name = effect.field.split(".")
        value, default = getattr(getattr(run, section), name), default_of(getattr(run, section), name)
        allowed = f"{default!r}, as {effect.why_not}"
        require(value == default or effect.is_read(run), effect.field, value, allowed)


def default_of(section: Any, name: str) -> Any:
    """The default of a setting."""
    default = next(field.default for field in fields(section) if field.name == name)
    assert default is not MISSING, f"{name}: its default is made by a function"
    return default
