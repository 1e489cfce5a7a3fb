"""Every private name of another library that the package uses: where it lives, and that it is still there.

A private name may go with any release, so requirements.txt bounds the versions of these libraries. Whoever
raises a bound runs this test first: it says which name has gone.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "lit_transdiff"
# models/linear.py and models/cpu_bf16.py ask whether torch has them
ONEDNN = {"_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported"}
PROTOCOLS = {"_asdict", "_exit", "_replace", "_repr_html_"}  # documented names of Python and IPython

# What holds the name: a module, or a class after the colon. "in" means that its source sets or reads the name
# on its instances.
PRIVATE = [
    ("lightning.fabric.utilities.distributed", "_destroy_dist_connection"),
    ("lightning.pytorch.strategies:DeepSpeedStrategy", "_init_deepspeed_distributed"),
    ("lightning.pytorch.strategies:DeepSpeedStrategy", "_setup_model_and_optimizer"),
    ("lightning.pytorch.loops.fit_loop:_FitLoop", "_should_accumulate"),
    ("in lightning.pytorch.trainer.trainer:Trainer", "_checkpoint_connector"),
    ("in lightning.pytorch:LightningModule", "_trainer"),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "_partition_all_parameters"),
    (
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "_swappable_optimizer_subgroup"),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "_optimizer_states_and_gradient_swap_in"),
    (
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "_optimizer_states_and_gradient_swap_out",
    ),
    ("in deepspeed.utils.mixed_precision_linkage", "_hp_mapping"),
    ("in torch.amp.grad_scaler", "_step_supports_amp_scaling"),
    ("torch", "_foreach_add_"),
    ("torch", "_foreach_copy_"),
    ("torch", "_foreach_lerp"),
    ("torch", "_foreach_lerp_"),
    ("torch", "_foreach_mul_"),
    ("torch", "_foreach_sub_"),
    ("torch", "_foreach_norm"),
    ("torch", "_foreach_sub"),
    ("torch", "_fused_sdp_choice"),
    ("torch", "_softmax_backward_data"),
    ("torch", "_subclasses"),
    ("torch", "_C"),
    ("torch._C", "_distributed_c10d"),
    ("torch:Tensor", "_version"),
    ("torch:UntypedStorage", "_cdata"),
    ("torch.cuda.memory", "_dump_snapshot"),
    ("torch.cuda.memory", "_record_memory_history"),
]
# Public by name, without a promise: what a program of a sweep is started with.
PROMISELESS = [
    ("wandb.sdk.launch.sweeps.utils", "create_sweep_command"),
    ("wandb.sdk.launch.sweeps.utils", "create_sweep_command_args"),
    ("wandb.sdk.launch.api", "LaunchApi"),
]
BOUNDED = ("torch", "lightning", "deepspeed", "wandb")


def resolve(place: str) -> object:
    module, _, name = place.partition(":")
    holder = importlib.import_module(module)
    return getattr(holder, name) if name else holder


@pytest.mark.parametrize(
    ("place", "name"), PRIVATE + PROMISELESS, ids=[name for _, name in PRIVATE + PROMISELESS]
)
def test_the_installed_version_has_it(place: str, name: str) -> None:
    library = place.removeprefix("in ").partition(".")[0].partition(":")[0]
    if place.startswith("in "):
        there = re.search(rf"\b{name}\b", inspect.getsource(resolve(place.removeprefix("in ")))) is not None
    else:
        there = hasattr(resolve(place), name)
    version = getattr(importlib.import_module(library), "__version__", "of an unknown version")
    assert there, (
        f"{library} {version} has no {name} in {place}: bound it in requirements.txt and mend its use"
    )


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Names with one leading underscore that a file uses as attributes or imports,
    and those that it defines.
    """
    used, defined = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names} | set((node.module or "").split("."))
    return tuple({name for name in names if re.match(r"_[^_]", name)} for names in (used, defined))  # type: ignore[return-value]


def test_every_private_name_in_use_is_listed_here() -> None:
    names = [private_names(path.read_text()) for path in HOUSE.rglob("*.py")]
    used, defined = (set().union(*kind) for kind in zip(*names, strict=True))
    # some are defined here too: overridden methods, a flag that torch reads
    listed = {name for _, name in PRIVATE}
    assert (used - defined - PROTOCOLS - ONEDNN) | (listed & (used | defined)) == listed


@pytest.mark.parametrize("library", BOUNDED)
def test_libraries_with_private_names_are_bounded_on_both_sides(library: str) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    (requirement,) = [Requirement(line) for line in lines if line and Requirement(line).name == library]
    assert {">=", "<"} <= {bound.operator for bound in requirement.specifier}
    installed = Version(importlib.import_module(library).__version__).base_version
    assert requirement.specifier.contains(installed), (
        f"{library} {installed} is not one of {requirement.specifier}"
    )


def test_every_dependency_has_a_lowest_version_that_can_be_installed() -> None:
    """``make test-lowest`` pins what stands behind ``>=``; a line of another form would be installed at its
    newest.
    """
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    (lowest,) = re.findall(r"^LOWEST := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pins = subprocess.run(
        lowest, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert [pin.partition("==")[0] for pin in pins] == [
        Requirement(line.split("#")[0].strip()).name for line in lines
    ]
    for pin, line in zip(pins, lines, strict=True):
        assert Requirement(line.split("#")[0].strip()).specifier.contains(pin.partition("==")[2])
    # withdrawn as malicious
    assert "!=2.6.2,!=2.6.3" in next(line for line in lines if line.startswith("lightning"))
