"""Studies: which trial is next, when an arm is settled, what is refused, and a whole study of a program."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_transdiff.__main__ import main
from lit_transdiff.base.files import short_hash
from lit_transdiff.config.loading import load_run
from lit_transdiff.config.yaml_text import read_file
from lit_transdiff.evaluation.metrics import check_evaluation
from lit_transdiff.stages import STAGES
from lit_transdiff.sweep import controller
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.journal import SweepJournal
from lit_transdiff.sweep.results import bring_results, check_same_inputs, keep_results
from lit_transdiff.sweep.search import next_settings
from lit_transdiff.sweep.study import load_study, study_from, study_in_words
from lit_transdiff.sweep.trial import Trial
from tests.helpers.run_folders import make_run
from tests.helpers.small import ROOT

# Logs one value that depends on the arm's x and the seed, as a run's score would.
PROGRAM = """
import os, sys
settings = dict(word.split("=") for word in sys.argv[1:])
score = float(settings["x"]) + int(settings["seed"]) % 3 + 0.01 * (int(settings["seed"]) * 7 % 5)
with open(os.path.join(os.environ["WANDB_DIR"], "metrics.csv"), "w") as out:
    print("step,images_seen,seconds,metric,value", file=out)
    print(f"1,1,1,eval/frechet_distance,{score}", file=out)
"""
SEEDS = list(range(10, 18))
SETTINGS: dict[str, Any] = {
    "name": "small",
    "score": {"name": "eval/frechet_distance", "goal": "minimize", "smallest": 0.1},
    "arms": {"paper": {"x": 1.0}, "fast": {"x": 0.5}, "same": {"x": 1.001}},
    "baseline": "paper",
    "seeds": {"seed": SEEDS},
    "command": ["${env}", "${interpreter}", "program.py", "${args_no_hyphens}"],
}


def ended(settings: dict[str, Any], value: float) -> Trial:
    return Trial(f"t{settings}", settings, "finished", [value])


def play(sweep: Sweep, score: Any) -> list[Trial]:
    """Run a study in thought: ``score`` gives the value of settings."""
    trials: list[Trial] = []
    while (settings := next_settings(sweep, trials)) is not None:
        trials.append(ended(settings, score(settings)))
    return trials


def test_seeds_come_one_after_the_other_and_settled_arms_stop() -> None:
    """fast is better in every seed; same differs by nothing; noisy stays open to the last seed."""
    arms = {**SETTINGS["arms"], "noisy": {"x": 3.0}}
    sweep = study_from(SETTINGS | {"arms": arms}, "s")

    def score(settings: dict[str, Any]) -> float:
        x, seed = settings["x"], settings["seed"]
        return x + seed + 0.001 * (seed % 4) * x if x < 3 else seed + 1 + (-1) ** seed * 0.4

    trials = play(sweep, score)
    counts = {x: sum(trial.settings["x"] == x for trial in trials) for x in (1.0, 0.5, 1.001, 3.0)}
    assert counts == {1.0: 8, 0.5: 6, 1.001: 6, 3.0: 8}
    assert [trial.settings["seed"] for trial in trials[:5]] == [10, 10, 10, 10, 11]
    claims = sweep.study.claims(trials)
    assert {arm: found.word for arm, found in claims.items()} == {
        "fast": "better",
        "same": "no difference",
        "noisy": "open",
    }
    text = "\n".join(study_in_words(sweep, trials))
    assert "fast: better by 0.50" in text and "same: no difference above" in text
    assert "noisy: open" in text and "All seeds are run" in text


def test_a_study_that_was_cut_off_says_what_is_missing_and_continues() -> None:
    sweep = study_from(SETTINGS, "s")
    trials = play(sweep, lambda settings: settings["x"] + settings["seed"] % 3)[:10]
    text = "\n".join(study_in_words(sweep, trials))
    assert "fast: open: 3 of" in text or "fast: open: -0.5" in text
    assert "Seeds missing: seed=13, seed=14, seed=15, seed=16, seed=17." in text
    again = next_settings(sweep, trials)
    assert again == {"x": 0.5, "seed": 13}  # the baseline of that seed has been started


def test_failed_trials_do_not_count_and_are_not_started_twice() -> None:
    sweep = study_from(SETTINGS, "s")
    first = next_settings(sweep, [])
    assert first is not None
    failed = Trial("a", first, "failed")
    assert next_settings(sweep, [failed]) == {"x": 0.5, "seed": 10}
    assert sweep.study.values([failed], "paper") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": {"name": "eval/x"}}, "score.smallest: got None; allowed: the smallest difference"),
        ({"score": {"name": "eval/x", "smallest": 1, "goal": "up"}}, "score.goal: got 'up'"),
        ({"arms": {"one": {}}}, "arms: got .*at least two arms"),
        ({"arms": {"one": {"x": 1}, "two": {"x": 1}}}, "arms.one: got .*settings other than those of two"),
        ({"arms": {"paper": {}, "two": {"seed": 1}}}, "arms.two: got .*not those of seeds"),
        ({"seeds": {"seed": [1, 2, 3]}}, "seeds: got .*at least 6 seeds"),
        ({"seeds": {"seed": [1] * 6}}, "seeds.seed: got .*each seed once"),
        ({"seeds": {"seed": SEEDS, "data.seed": SEEDS[1:]}}, "seeds: got .*of one length"),
        ({"baseline": None}, "baseline: got None; allowed: the arm that others are compared with: fast, "),
        ({"budget": 0}, "budget: got 0; allowed: hours above 0"),
        ({"command": None}, "command: got None"),
        ({"armz": {}}, "setting: 'armz' is not known. Did you mean 'arms'"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(ValueError, match=rf"study\.yaml: {message}"):
        load_study(file)


def test_a_study_of_a_program_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a budget nothing starts; then it runs to its end, and again does nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(controller, "POLL", 0.02)
    (tmp_path / "program.py").write_text(PROGRAM)
    arms = {"paper": {"x": 1.0}, "fast": {"x": 0.5}}
    settings = SETTINGS | {"arms": arms, "seeds": {"seed": list(range(6))}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings | {"budget": 1e-12}))
    assert main(["study", "study.yaml"]) in (0, None)
    assert "fast: open: 0 of at least 6 seeds. Seeds missing: seed=0" in capsys.readouterr().out
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    main(["study", "study.yaml", "--agents", "2"])
    assert "fast: better by 0.5 ± " in capsys.readouterr().out
    journal = tmp_path / "runs/studies/small/trials.jsonl"
    starts = [json.loads(line) for line in journal.read_text().splitlines() if '"start"' in line]
    assert len(starts) == 12
    main(["study", "study.yaml"])
    assert '"start"' in journal.read_text() and journal.read_text().count('"event": "start"') == 12
    assert "fast: better" in (tmp_path / "runs/studies/small/study.md").read_text()


def test_kept_results_continue_elsewhere_and_belong_to_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study without its folder continues from the archive beside its file; a changed input is refused."""
    monkeypatch.chdir(tmp_path)
    weights, file, folder = tmp_path / "model.bin", tmp_path / "study.yaml", tmp_path / "runs/studies/small"
    weights.write_text("weights")
    sweep = study_from(SETTINGS | {"inputs": ["model.bin"]}, "s")
    file.write_text(yaml.safe_dump(sweep.source))
    check_same_inputs(sweep, folder)
    journal = SweepJournal(folder, sweep, 0)
    with journal.lock:
        for i, trial in enumerate(play(sweep, lambda settings: settings["x"] + settings["seed"] % 3)):
            journal.write("start", id=f"t{i}", settings=trial.settings)
            journal.write("end", id=f"t{i}", state="finished", values=trial.values)
    make_run(folder, "trial", 1.0)
    keep_results(folder, file)
    shutil.rmtree(folder)
    main(["study", "study.yaml"])
    said = capsys.readouterr().out
    assert "continues the results of study.zip." in said and "fast: better by 0.5" in said
    assert f"For model.bin ({short_hash(weights)})." in said
    weights.write_text("others")
    assert main(["study", "study.yaml"]) == 2
    assert "inputs: model.bin: got" in capsys.readouterr().err
    shutil.rmtree(folder)
    found = bring_results(sweep, file, folder)
    assert found == f"{file.with_suffix('.zip')} has results for other inputs; this begins anew."
    file.write_text(yaml.safe_dump(sweep.source | {"baseline": "fast"}))
    assert main(["study", "study.yaml"]) == 2
    assert "study.zip has the results of another version of study.yaml" in capsys.readouterr().err


SHIPPED = sorted((ROOT / "experiments/studies").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_settings_of_shipped_arms_are_taken_by_their_recipe(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_study(file)
    assert sweep.command is not None
    recipes = [word for word in sweep.command if word.endswith(".yaml")]
    recipe = recipes[0] if recipes else "experiments/fashion/ar_pretrain.yaml"
    fixed = [word for word in sweep.command if re.match(r"[a-z_.]+=", word)]
    for arm in sweep.study.arms:
        given = [f"{key}={value}" for key, value in sweep.study.settings(arm, 0).items()]
        run = load_run(recipe, [*fixed, *given])
        check_evaluation(run.evaluation, scores=True)
        if run.stage in STAGES and any(key.startswith("model.") for key in sweep.study.arms[arm]):
            STAGES[run.stage].check(run)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_studies_use_seeds_that_nothing_is_tuned_on(file: Path) -> None:
    seeds = {tuple(seed.items()) for seed in load_study(file).study.seeds}
    for sweep in (ROOT / "experiments/sweeps").glob("*.yaml"):
        swept = read_file(sweep)["parameters"].get("evaluation.seed", {})
        tuned = [swept["value"]] if "value" in swept else swept.get("values", [])
        assert not seeds & {(("evaluation.seed", value),) for value in tuned}


def test_a_study_may_have_a_base(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "longer.yaml").write_text("base: base.yaml\nname: longer\narms: {fast: {steps: 3.0e-1}}")
    longer = load_study(tmp_path / "longer.yaml")
    assert longer.name == "longer" and longer.command == SETTINGS["command"]
    assert longer.study is not None and longer.study.arms == SETTINGS["arms"] | {
        "fast": {"x": 0.5, "steps": 0.3}
    }
    (tmp_path / "base.yaml").write_text("base: longer.yaml")
    with pytest.raises(ValueError, match="a file that is not its own base"):
        load_study(tmp_path / "longer.yaml")


def test_the_study_of_equal_images_is_that_of_equal_operations_with_fewer_steps():
    images, operations = (
        load_study(ROOT / f"experiments/studies/families_{of}.yaml") for of in ("images", "operations")
    )
    assert images.study is not None and operations.study is not None
    steps = {"training.max_steps": 300}
    assert images.study.arms == {arm: settings | steps for arm, settings in operations.study.arms.items()}
    assert images.study.seeds == operations.study.seeds and images.command == operations.command
