"""Every strategy takes the steps of one process, goes on exactly, and goes on from any other's checkpoint.

One process, then one pair over gloo, with all fits inside; the tests read what they left. ZeRO cuts every
parameter here, however small. Gradient norms are compared too: AdamW hides a wrong scale of the gradients,
the norm does not.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.checkpoints.export import export_checkpoint, read_export
from lit_transdiff.checkpoints.format import complete_checkpoints, open_checkpoint
from lit_transdiff.config import RunConfig
from lit_transdiff.distributed import STRATEGIES
from lit_transdiff.models.execution import can_compile
from lit_transdiff.training.trainer import train
from tests.helpers.forks import fit_all
from tests.helpers.processes import values
from tests.helpers.small import FAMILIES, NO_DROPOUT, STEADY, small_run

SEVERAL = [name for name in STRATEGIES if name != "single"]
SETTINGS = {
    "model": NO_DROPOUT,
    "flow": {"num_noise_draws": 2, "label_drop_prob": 0.3},
    "optimizer": {**STEADY, "gradient_clip": 0.5, "more_ema_decays": [0.5]},  # norms are above the clip
    # two passes on two ranks
    "training": {"micro_batch_size": 2, "validate_every": 3, "log_every": 1, "max_steps": 5},
}
BRIEF = {"training": {**SETTINGS["training"], "max_steps": 3}, "optimizer": {**STEADY, "gradient_clip": 0.5}}
# Kinds of runs -> what they change. Cheap enough to do all of them under every strategy.
KINDS = {
    "plain": {},
    "bf16": {
        "training": {**SETTINGS["training"], "precision": "bf16-mixed", "activation_checkpointing": "all"}
    },
    "mrar": {"stage": "mrar_finetune", "model": {**NO_DROPOUT, "num_references": 4}},
    "parts": FAMILIES["transdiff_parts"],
    "sit": FAMILIES["sit"],
    "dit": FAMILIES["dit"],
    "acdit": FAMILIES["acdit"],
    "xar": FAMILIES["xar"],
    "flowar": FAMILIES["flowar"],
    "ardiff": FAMILIES["ardiff"],
    "mar": FAMILIES["mar"],
    "head": {"stage": "diffusion_head", "init_from": "FOLDER/plain-single"},
}


def settings(folder: Path, kind: str, strategy: str, suffix: str = "", **changes: object) -> RunConfig:
    merged = {**SETTINGS, **KINDS[kind], "distributed": {"strategy": strategy}, **changes}
    if "init_from" in merged:
        merged["init_from"] = str(merged["init_from"]).replace("FOLDER", str(folder))
    return small_run(folder, name=f"{kind}-{strategy}{suffix}", **merged)


def start_from(folder: Path, donor: str, run: RunConfig) -> RunConfig:
    """Put the donor's checkpoint of step 2 into a new run folder."""
    target = run.folder / "checkpoints"
    target.mkdir(parents=True)
    (target / "step-00000002").symlink_to((folder / donor / "checkpoints" / "step-00000002").resolve())
    return run


def without_checksums(info: dict[str, object]) -> dict[str, object]:
    """The content of ``export.json`` without checksums: those of files differ by rounding."""
    return {key: value for key, value in info.items() if key not in ("crc32", "checksum")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all tests: name = kind-strategy; -broken: broken off in step 4 and continued; -from-X:
    begun by strategy X.
    """
    root = tmp_path_factory.mktemp("strategies")
    keep = {"checkpoint": {"keep_last": 3}}
    fit_all(root, 1, [(settings(root, kind, "single", **keep), None) for kind in KINDS])
    plan: list[tuple[RunConfig, int | None]] = []
    for name in SEVERAL:
        plan += [(settings(root, kind, name, **keep), None) for kind in KINDS]
        broken = settings(root, "plain", name, "-broken")
        plan += [(broken, 4), (broken, None)]
    fit_all(root, 2, plan)
    donors = ["single", *SEVERAL[:-1]]  # each continues the one before it in the table
    fit_all(
        root,
        2,
        [
            (start_from(root, f"plain-{donor}", settings(root, "plain", name, f"-from-{donor}")), None)
            for donor, name in zip(donors, SEVERAL, strict=True)
        ],
    )
    back = [
        start_from(root, f"plain-{name}", settings(root, "plain", "single", f"-from-{name}"))
        for name in SEVERAL
    ]
    fit_all(root, 1, [(run, None) for run in back])
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def assert_same_run(one: Path, other: Path, tolerance: float = 2e-6) -> None:
    for metric in ("train/loss", "val/loss", "train/gradient_norm"):
        expected, found = values(one, metric), values(other, metric)
        steps = expected.keys() & found.keys()
        assert steps and max(expected) in steps
        assert [found[s] for s in steps] == pytest.approx(
            [expected[s] for s in steps], rel=tolerance, abs=tolerance
        ), metric
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 20 * tolerance


def test_strategies_take_the_steps_of_one_process_in_brief(tmp_path: Path):
    """Without sharding, and with that of DeepSpeed and that of torch."""
    train(settings(tmp_path, "plain", "single", **BRIEF), say=lambda text: None)
    kinds = ("ddp", "zero3", *["fsdp"] * hasattr(torch.cpu.Stream, "record_event"))
    fit_all(tmp_path, 2, [(settings(tmp_path, "plain", name, **BRIEF), None) for name in kinds])
    for name in kinds:
        assert_same_run(tmp_path / "plain-single", tmp_path / f"plain-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SEVERAL)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(folder: Path, kind: str, strategy: str):
    tolerance = 2e-3 if kind == "bf16" else 2e-6
    assert_same_run(folder / f"{kind}-single", folder / f"{kind}-{strategy}", tolerance)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process whose blocks are not compiled, and one of each strategy whose blocks are: name =
    strategy.
    """
    if not can_compile("cpu"):
        pytest.skip("torch.compile does not work on this machine")
    root = tmp_path_factory.mktemp("compiled")
    fast = {
        **BRIEF,
        "training": {**BRIEF["training"], "compile": True, "activation_checkpointing": "decoder"},
    }
    runs = {name: settings(root, "plain", name, "-compiled", **fast) for name in STRATEGIES}
    single = [(settings(root, "plain", "single", **BRIEF), None), (runs.pop("single"), None)]
    output = fit_all(root, 1, single) + fit_all(root, 2, [(run, None) for run in runs.values()])
    assert "run eagerly" not in output
    return root


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_blocks_take_the_same_steps(compiled: Path, strategy: str):
    assert_same_run(compiled / "plain-single", compiled / f"plain-{strategy}-compiled", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SEVERAL)
def test_a_run_that_was_broken_off_ends_in_the_same_bits(folder: Path, strategy: str):
    whole, broken = folder / f"plain-{strategy}", folder / f"plain-{strategy}-broken"
    assert values(whole) == values(broken) and values(whole, "val/loss") == values(broken, "val/loss")
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", ["ddp-from-single", "zero1-from-ddp", "zero2-from-zero1", "zero3-from-zero2", "fsdp-from-zero3"]
)
def test_any_strategy_goes_on_from_any_other(folder: Path, run: str):
    assert_same_run(folder / "plain-single", folder / f"plain-{run}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SEVERAL)
def test_one_process_goes_on_from_two(folder: Path, strategy: str):
    assert_same_run(folder / "plain-single", folder / f"plain-single-from-{strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_checkpoint_is_exported_whole(folder: Path, tmp_path: Path, strategy: str):
    """The averages of step 4, of both decays, are those of one process; each sharded rank wrote its part of
    them.
    """
    for average in ("ema", "ema_0.5", "last"):
        for name in ("single", strategy):
            checkpoint = open_checkpoint(folder / f"plain-{name}" / "checkpoints" / "step-00000004")
            export_checkpoint(checkpoint, tmp_path / name, average)
        one, other = read_export(tmp_path / "single"), read_export(tmp_path / strategy)
        assert other.info["step"] == 4
        assert without_checksums(one.info) == {**without_checksums(other.info), "name": "plain-single"}
        assert max((one.state[k] - other.state[k]).abs().max().item() for k in one.state) < 5e-6
    ranks = len(list(checkpoint.folder.glob("rank-*.safetensors")))
    assert ranks == (1 if strategy == "single" else 2)
    assert len(complete_checkpoints(checkpoint.folder.parent)) == 3


MUON = {"optimizer": {**SETTINGS["optimizer"], "name": "muon"}, "checkpoint": {"keep_last": 3}}
TAKERS = [name for name in SEVERAL if STRATEGIES[name].takes_muon]


@pytest.fixture(scope="module")
def muon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with Muon, named as those above. Each strategy also continues from the previous one."""
    root = tmp_path_factory.mktemp("muon")
    fit_all(root, 1, [(settings(root, "plain", "single", **MUON), None)])
    plan: list[tuple[RunConfig, int | None]] = []
    for name in TAKERS:
        broken = settings(root, "plain", name, "-broken", **MUON)
        plan += [(settings(root, "plain", name, **MUON), None), (broken, 4), (broken, None)]
    for donor, name in zip(["single", *TAKERS[:-1]], TAKERS, strict=True):
        plan.append(
            (start_from(root, f"plain-{donor}", settings(root, "plain", name, "-continued", **MUON)), None)
        )
    fit_all(root, 2, plan)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TAKERS)
def test_muon_takes_the_same_steps_under_every_strategy_that_takes_it(muon: Path, strategy: str):
    assert_same_run(muon / "plain-single", muon / f"plain-{strategy}")
    assert_same_run(muon / "plain-single", muon / f"plain-{strategy}-continued")
    whole, broken = weights(muon / f"plain-{strategy}"), weights(muon / f"plain-{strategy}-broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
