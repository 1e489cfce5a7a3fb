"""The places of a run on the Hub and their commits: a continued or repeated run reads the same files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lit_transdiff.base.hub import is_on_hub, pinned
from lit_transdiff.checkpoints.run_folder import starts
from lit_transdiff.config import RunConfig


def pinned_run(run: RunConfig) -> tuple[RunConfig, dict[str, str]]:
    """The run with the commit of every place on the Hub that its settings name, and these places as they were
    before -> with their commits.

    The commits are those of the run's earlier starts, or else what the revisions are now.
    """
    known: dict[str, str] = {}
    places: dict[str, str] = {}

    def pin(place: Any) -> Any:
        if not is_on_hub(place):
            return place
        for start in [] if known else starts(run.folder):
            known.update(start.get("hub") or {})
        places[place] = known.get(place) or pinned(place)
        return places[place]

    evaluation = run.evaluation
    return (
        replace(
            run,
            init_from=pin(run.init_from),
            autoencoder=replace(run.autoencoder, path=pin(run.autoencoder.path)),
            evaluation=replace(
                evaluation,
                extractor_weights=pin(evaluation.extractor_weights),
                weights={name: pin(file) for name, file in evaluation.weights.items()},
                reference=pin(evaluation.reference),
            ),
        ),
        places,
    )
