"""Every metric against numbers that public implementations give for the same features, and closed forms.

The numbers are from torch-fidelity, RDM, cmmd-pytorch, FD-loss, prdc and dgm-eval; see the arrays' roles in
tests/fixtures/metrics/README.md.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_transdiff.evaluation import kernels
from lit_transdiff.evaluation.groups import jackknife_error, jackknife_limit
from lit_transdiff.evaluation.kernels import cmmd_values, kid_values
from lit_transdiff.evaluation.moments import frechet, frechet_by_group, gaussian_of
from lit_transdiff.evaluation.neighbours import Manifold, covered, density_of, is_authentic, is_reached
from lit_transdiff.evaluation.sliced import directions, mind_values
from tests.helpers.small import ROOT

pytestmark = pytest.mark.numeric
FOLDER = ROOT / "tests/fixtures/metrics"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(FOLDER / "features.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("name", ["gen", "val", "few"])
def test_frechet_distance(arrays: dict[str, Tensor], name: str) -> None:
    found = frechet(gaussian_of([arrays[name]]), gaussian_of([arrays["real"]]))
    # the expected value of a singular covariance is from eigenvalues, whose square roots err by 1e-8
    rel = 1e-7 if name == "few" else 1e-9
    assert found == pytest.approx(EXPECTED["frechet"][f"{name}_real"]["total"], rel=rel)


def test_jackknife_of_the_frechet_distance(arrays: dict[str, Tensor]) -> None:
    expected = EXPECTED["jackknife"]
    without = frechet_by_group(arrays["gen"], arrays["group"].long(), gaussian_of([arrays["real"]]))
    assert without.tolist() == pytest.approx(expected["leave_out"], rel=1e-9)
    assert jackknife_error(without) == pytest.approx(expected["se"], rel=1e-7)
    assert jackknife_limit(expected["point"], without) == pytest.approx(expected["limit"], rel=1e-7)


def test_mind_with_stored_directions(arrays: dict[str, Tensor]) -> None:
    real, units = arrays["real"][arrays["pick"].long()], arrays["directions"]
    for name in ("gen", "val"):
        found = float(mind_values(arrays[name], real, units=units))
        assert found == pytest.approx(EXPECTED["mind"][f"{name}_vs_real_pick"], rel=1e-10)


def test_mind_of_a_shift_and_of_a_scale_in_closed_form() -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    shift, units = torch.randn(8, dtype=torch.float64), directions(8)
    expected = 3 * 8 * float((units @ shift).square().mean())
    assert float(mind_values(x, x + shift)) == pytest.approx(expected, rel=1e-10)
    spread = 3 * 8 * 0.5**2 * float((units @ x.T).square().mean())
    assert float(mind_values(x, 1.5 * x)) == pytest.approx(spread, rel=1e-10)
    assert float(mind_values(x, x)) == 0


def test_mind_of_torch_fidelity(arrays: dict[str, Tensor]) -> None:
    """Its stream: the larger set is cut at random first, so the directions follow that permutation."""
    expected = EXPECTED["mind"]["seed2020_M1000_gen_real"]
    stream = torch.Generator().manual_seed(2020)
    kept = torch.randperm(96, generator=stream)[:64]
    units = torch.randn(1000, 16, generator=stream).double()
    units /= units.norm(dim=1, keepdim=True)
    if kept[:8].tolist() != expected["first_rows"]:
        pytest.skip("this torch draws other numbers")
    assert float(mind_values(arrays["gen"], arrays["real"][kept], units=units)) == pytest.approx(
        expected["value"], rel=1e-6
    )


def test_sliced_wasserstein_of_unequal_sets_and_its_ratio(arrays: dict[str, Tensor]) -> None:
    expected, units = EXPECTED["sliced_wasserstein"], arrays["directions"]
    squared = float(mind_values(arrays["gen"], arrays["real"], units=units)) / (3 * 16)
    assert squared == pytest.approx(expected["sw2_pow2_unequal_gen64_real96"], rel=1e-10)
    gen, val = (float(mind_values(arrays[name], arrays["real"][:64], units=units)) for name in ("gen", "val"))
    assert (gen / val) ** 0.5 == pytest.approx(expected["ratio_sw2"], rel=1e-10)


def test_cmmd(arrays: dict[str, Tensor]) -> None:
    expected = EXPECTED["cmmd"]
    assert float(cmmd_values(arrays["gen"], arrays["real"])) == pytest.approx(expected["biased"], abs=1e-10)
    unbiased = float(cmmd_values(arrays["gen"], arrays["real"], biased=False))
    assert unbiased == pytest.approx(expected["unbiased"], abs=1e-10)
    first, second = torch.eye(2)[:1].repeat(3, 1), torch.eye(2)[1:].repeat(3, 1)
    for biased in (True, False):
        found = [float(cmmd_values(first, other, biased=biased)) for other in (second, -first)]
        assert found == pytest.approx([expected["two_points_90deg"], expected["two_points_180deg"]])


def test_kid(arrays: dict[str, Tensor]) -> None:
    assert float(kid_values(arrays["gen"], arrays["real"])) == pytest.approx(
        EXPECTED["kid"]["full_unbiased"], abs=1e-10
    )
    for rows, others, expected in zip(
        arrays["kid_gen"].long(), arrays["kid_real"].long(), EXPECTED["kid"]["subsets"], strict=True
    ):
        assert float(kid_values(arrays["gen"][rows], arrays["real"][others])) == pytest.approx(
            expected, abs=1e-10
        )
    ones = torch.ones(5, 4)  # |y|^2 = D
    assert float(kid_values(torch.zeros(5, 4), ones)) == pytest.approx(1 + 8 - 2)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage(arrays: dict[str, Tensor], k: int) -> None:
    found = prdc(arrays["gen"], arrays["real"], k)
    assert found == pytest.approx(EXPECTED["prdc"][f"gen_real_k{k}"], abs=1e-15)


def prdc(points: Tensor, real: Tensor, k: int) -> dict[str, float]:
    return {
        "precision": covered(points, Manifold(real), k),
        "recall": covered(real, Manifold(points), k),
        "density": density_of(points, Manifold(real), k),
        "coverage": float(is_reached(points, Manifold(real), k).double().mean()),
    }


def test_ties_on_a_lattice_are_inside_for_precision_and_outside_for_density(
    arrays: dict[str, Tensor],
) -> None:
    found = prdc(arrays["grid_g"], arrays["grid_r"], 3)
    closed, strict = EXPECTED["prdc"]["grid_k3_closed"], EXPECTED["prdc"]["grid_k3_strict"]
    assert (found["precision"], found["recall"]) == (closed["precision"], closed["recall"])
    assert (found["density"], found["coverage"]) == pytest.approx((strict["density"], strict["coverage"]))
    itself = prdc(arrays["real"], arrays["real"], 5)
    assert itself == pytest.approx(EXPECTED["prdc"]["real_real_k5_strict"])


def test_authentic_images(arrays: dict[str, Tensor]) -> None:
    real = arrays["real"]
    for name, points in {
        "gen": arrays["gen"],
        "copies": arrays["copies"],
        "self": real,
        "far": real + 1e3,
    }.items():
        assert 100 * float(is_authentic(points, Manifold(real)).double().mean()) == EXPECTED["authpct"][name]


def test_values_without_a_group_are_those_of_the_other_rows(
    arrays: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, too."""
    monkeypatch.setattr(kernels, "KERNEL_VALUES", 500)
    group, gen, real = arrays["group"].long(), arrays["gen"], arrays["real"]
    for score in (mind_values, kid_values, cmmd_values):
        found = score(gen, real, group)
        again = [float(score(gen[group != g], real)) for g in range(8)]
        assert found.tolist() == pytest.approx([float(score(gen, real)), *again], rel=1e-9, abs=1e-12)
