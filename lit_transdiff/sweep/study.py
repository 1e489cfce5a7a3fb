"""Studies: sweeps with named arms, seeds and a stopping rule, which end when a claim is settled.

A study's file has ``arms`` and ``seeds`` in place of ``method`` and ``parameters``::

    name: fast_preset
    score: {name: eval/frechet_distance, goal: minimize, smallest: 0.02}
    arms:
      paper: {sampling.num_steps: 50}
      fast: {sampling.num_steps: 10, sampling.solver: heun}
    baseline: paper
    seeds: {evaluation.seed: [10, 11, 12, 13, 14, 15, 16, 17]}
    command: [...]                     # as in a sweep's file, which may also have a launcher: section

Every seed runs all arms that are not settled yet (see ``study.claims``), so arms are compared seed by seed.
Settings of ``seeds`` vary together. ``budget`` (hours) and ``launcher`` may change between calls; all else is
fixed. ``base`` is a file with further settings, as in a recipe. ``inputs`` are files on which the results
depend, as a checkpoint (see ``sweep.results``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_transdiff.config import errors_at, is_folder_name, require, require_known
from lit_transdiff.config.checks import FOLDER_NAME
from lit_transdiff.config.loading import read_yaml
from lit_transdiff.study.claims import FEWEST, OPEN, Claim, StudyRule, claim
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.distributions import is_number
from lit_transdiff.sweep.launching import launcher_from
from lit_transdiff.sweep.trial import Trial

OF_THE_CLAIM = ("score", "arms", "baseline", "seeds", "budget", "inputs")
KEYS_OF_STUDIES = ("name", "project", "description", *OF_THE_CLAIM, "command", "program", "launcher")
SCORE_KEYS = ("name", "goal", "smallest")


@dataclass(frozen=True)
class Study:
    """Arms and seeds with the settings of each, and the rule that settles an arm."""

    arms: dict[str, dict[str, Any]]
    baseline: str
    seeds: list[dict[str, Any]]
    rule: StudyRule
    budget: float = math.inf  # hours of one call of the command
    inputs: list[str] = field(default_factory=list)

    def settings(self, arm: str, seed: int) -> dict[str, Any]:
        """The settings of the trial of an arm with the seed of this number."""
        return self.arms[arm] | self.seeds[seed]

    def values(self, trials: Sequence[Trial], arm: str) -> dict[int, float]:
        """The scores of an arm by the number of the seed: the last value of every finished trial."""
        found = {}
        for seed in range(len(self.seeds)):
            wanted = self.settings(arm, seed)
            for trial in trials:
                if trial.settings == wanted and trial.state == "finished" and trial.values:
                    found[seed] = trial.values[-1]
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def claims(self, trials: Sequence[Trial]) -> dict[str, Claim]:
        """The claim about every arm beside the baseline, at the look that settled it or the last one."""
        return {arm: self.claim_of(trials, arm) for arm in self.arms if arm != self.baseline}

    def claim_of(self, trials: Sequence[Trial], arm: str) -> Claim:
        """The claim about an arm, from the seeds in their order until one settles it."""
        ours, theirs = self.values(trials, arm), self.values(trials, self.baseline)
        both = sorted(set(ours) & set(theirs))
        differences = [ours[seed] - theirs[seed] for seed in both]
        looks = (claim(differences[:count], self.rule) for count in range(FEWEST, len(differences) + 1))
        return next((found for found in looks if found.word != OPEN), claim(differences, self.rule))

    def open_arms(self, trials: Sequence[Trial]) -> list[str]:
        """The arms that are not settled, with the baseline first; empty if all are settled."""
        left = [arm for arm, found in self.claims(trials).items() if found.word == OPEN]
        return [self.baseline, *left] if left else []

    def missing(self, trials: Sequence[Trial], arm: str) -> list[dict[str, Any]]:
        """The seeds for which an arm or the baseline has no score."""
        ours, theirs = self.values(trials, arm), self.values(trials, self.baseline)
        return [seed for i, seed in enumerate(self.seeds) if i not in ours or i not in theirs]


def next_of_study(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """The settings of the first trial of an open arm that has not been started; seed by seed."""
    study = sweep.study
    assert isinstance(study, Study)
    arms = study.open_arms(trials)
    wanted = (study.settings(arm, number) for number in range(len(study.seeds)) for arm in arms)
    started = [trial.settings for trial in trials]
    return next((settings for settings in wanted if settings not in started), None)


def load_study(path: str | Path) -> Sweep:
    """Read a study's file. Raises ``ValueError`` with the file, the field, its value and what is allowed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with errors_at(path, (TypeError, ValueError)):
        return study_from(read_yaml(path, spelled=False), path.stem)


def study_from(given: Any, name: str) -> Sweep:
    """A checked study from the settings of a file; ``name`` is the default name."""
    require(isinstance(given, dict), "study file", given, "settings (key: value)")
    for key in given:
        require_known("setting", key, KEYS_OF_STUDIES)
    own_name = str(given.get("name") or name)
    require(is_folder_name(own_name), "name", own_name, FOLDER_NAME)
    command, program = given.get("command"), given.get("program")
    require(command is None or isinstance(command, list), "command", command, "a list of words")
    require(command is not None or program is not None, "command", None, "a command or a program")
    score, arms = score_from(given.get("score")), arms_from(given.get("arms"))
    seeds = seeds_from(given.get("seeds"))
    budget, baseline = given.get("budget"), given.get("baseline")
    require(budget is None or (is_number(budget) and budget > 0), "budget", budget, "hours above 0")
    inputs = given.get("inputs") or []
    texts = isinstance(inputs, list) and all(isinstance(each, str) for each in inputs)
    require(texts, "inputs", inputs, "a list of files")
    allowed = f"the arm that others are compared with: {', '.join(arms)}"
    require(baseline in arms, "baseline", baseline, allowed)
    for arm, settings in arms.items():
        both = sorted(set(settings) & set(seeds[0]))
        require(not both, f"arms.{arm}", both, "settings that are not those of seeds")
    higher = score.get("goal", "minimize") == "maximize"
    rule = StudyRule(float(score["smallest"]), len(arms) - 1, len(seeds), higher)
    return Sweep(
        name=own_name,
        method="study",
        parameters={},
        metric=score["name"],
        maximize=higher,
        command=command,
        program=program,
        project=given.get("project"),
        launcher=launcher_from(given.get("launcher", {})),
        source=given,
        study=Study(arms, str(baseline), seeds, rule, float(budget or math.inf), inputs),
    )


def score_from(score: Any) -> dict[str, Any]:
    """The checked ``score:`` section."""
    example = "name: eval/frechet_distance, goal: minimize, smallest: 0.02"
    require(isinstance(score, dict) and isinstance(score.get("name"), str), "score", score, example)
    for key in score:
        require_known("score", key, SCORE_KEYS)
    goal, smallest = score.get("goal", "minimize"), score.get("smallest")
    require(goal in ("minimize", "maximize"), "score.goal", goal, "minimize or maximize")
    allowed = "the smallest difference worth knowing, above 0"
    require(is_number(smallest) and smallest > 0, "score.smallest", smallest, allowed)
    return score


def arms_from(arms: Any) -> dict[str, dict[str, Any]]:
    """The checked ``arms:`` section."""
    require(isinstance(arms, dict) and len(arms) >= 2, "arms", arms, "settings by name of at least two arms")
    for arm, settings in arms.items():
        ok = settings is None or isinstance(settings, dict)
        require(ok, f"arms.{arm}", settings, "settings (key: value); none for those of the command alone")
    found = {str(arm): settings or {} for arm, settings in arms.items()}
    for arm, settings in found.items():
        same = [other for other, theirs in found.items() if other != arm and theirs == settings]
        require(not same, f"arms.{arm}", settings, f"settings other than those of {', '.join(same)}")
    return found


def seeds_from(seeds: Any) -> list[dict[str, Any]]:
    """The settings of each seed from the ``seeds:`` section, whose lists vary together."""
    allowed = f"lists of at least {FEWEST} seeds by setting, as in evaluation.seed: [10, 11, 12, 13, 14, 15]"
    ok = isinstance(seeds, dict) and len(seeds) > 0 and all(isinstance(each, list) for each in seeds.values())
    require(ok, "seeds", seeds, allowed)
    lengths = {key: len(values) for key, values in seeds.items()}
    require(len(set(lengths.values())) == 1, "seeds", lengths, "lists of one length, which vary together")
    require(min(lengths.values()) >= FEWEST, "seeds", lengths, allowed)
    for key, values in seeds.items():
        require(len({repr(each) for each in values}) == len(values), f"seeds.{key}", values, "each seed once")
    return [dict(zip(seeds, row, strict=True)) for row in zip(*seeds.values(), strict=True)]


def study_in_words(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """The claim about every arm as a sentence, with the seeds that are missing where it is open."""
    study = sweep.study
    assert isinstance(study, Study)
    told = [
        f"{sweep.metric}, each arm against {study.baseline}, seed by seed. The intervals hold at 95 % for "
        f"{study.rule.arms} arms and {study.rule.looks} looks at once."
    ]
    for arm, found in study.claims(trials).items():
        text = f"{arm}: {found}."
        if found.word == OPEN:
            left = study.missing(trials, arm)
            of = ", ".join(" ".join(f"{key}={value}" for key, value in seed.items()) for seed in left)
            text += f" Seeds missing: {of}." if left else " All seeds are run."
        told.append(text)
    return told
