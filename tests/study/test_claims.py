"""Claims against arithmetic, and against simulated studies: without a difference few may claim one."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from benchmarks.intervals import CASES, NOISES, Case, cover_of_frechet, paired, wrong_claims
from lit_transdiff.study.claims import FEWEST, StudyRule, claim, sign_test


def test_intervals_and_the_sign_test_by_hand() -> None:
    rule = StudyRule(smallest=0.1, arms=1, seeds=FEWEST)  # one look at one arm: 95 %
    differences = [-0.5, -0.4, -0.6, -0.45, -0.55, -0.5]
    found = claim(differences, rule)
    half = 2.5706 * statistics.stdev(differences) / math.sqrt(6)  # t of five degrees of freedom
    assert found.word == "better" and found.p == 2 / 2**6
    assert (found.size, found.half) == (pytest.approx(-0.5), pytest.approx(half, rel=1e-4))
    assert str(found) == f"better by 0.5 ± {half:.2g} (6 seeds, sign test p = 0.031)"
    assert claim(differences, StudyRule(0.1, 1, FEWEST, higher=True)).word == "worse"


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-0.5] * 3 + [-0.4] * 2, "open"),  # five seeds: p of the sign test is 0.06
        ([-0.5, -0.4, -0.6, -0.5, -0.4, 0.01], "open"),  # one seed disagrees: p is 0.22
        ([0.01, -0.01, 0.02, -0.02, 0.0, 0.01], "no difference"),
        ([0.2, -0.2, 0.3, -0.1, 0.2, 0.1], "open"),
        ([], "open"),
        ([0.3], "open"),
    ],
)
def test_what_is_not_enough_for_a_claim(differences: list[float], word: str) -> None:
    found = claim(differences, StudyRule(smallest=0.1, arms=1, seeds=FEWEST))
    assert found.word == word and (word != "open" or str(found).startswith("open"))


def test_the_interval_of_a_look_is_wider_with_more_arms_and_looks() -> None:
    differences = np.random.default_rng(0).normal(size=8).tolist()
    halves = [
        claim(differences, StudyRule(0.1, arms, seeds)).half for arms, seeds in ((1, 8), (3, 8), (3, 16))
    ]
    assert halves == sorted(halves) and halves[0] < halves[1] < halves[2]
    assert StudyRule(0.1, 3, 8).confidence == pytest.approx(1 - 0.05 / 9)


def test_the_sign_test_ignores_ties() -> None:
    assert sign_test([1, 1, 0, 0, 1]) == 0.25 and sign_test([0, 0]) == 1


@pytest.mark.parametrize("noise", NOISES)
def test_few_studies_without_a_difference_claim_one(noise: str) -> None:
    """With three arms and every look; 200 studies know a rate of 5 % to 1.5 %."""
    assert wrong_claims(noise, arms=3, seeds=8, studies=200) <= 0.05


@pytest.mark.numeric
def test_the_jackknife_covers_and_refuses_limits_of_too_few_images() -> None:
    """The whole simulation is benchmarks/intervals.py; 60 repetitions know a cover of 0.95 to 0.03."""
    near = cover_of_frechet(Case("near", 8, 500, 60, shift=0.1, scale=0.9))
    assert 0.87 <= near.at_n <= 1 and 0.87 <= near.limit <= 1 and near.refused < 0.3
    few = cover_of_frechet(Case("few", 64, 128, 10, shift=0.01, power_law=True))
    assert few.refused == 1
    assert {case.name for case in CASES} >= {"identical", "far", "power law, near, N = 2 D"}


@pytest.mark.numeric
def test_paired_differences_are_covered_and_cause_few_false_alarms() -> None:
    assert paired(0.7, shift=0.05, repeats=60, images=500, size=8)[0] >= 0.87
    assert paired(0.95, shift=0.0, repeats=60, images=500, size=8)[1] <= 0.13
