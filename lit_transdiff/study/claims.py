"""The claim of a study about an arm against the baseline, and the stopping rule.

Each seed gives one difference between the two: the score of the arm less that of the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev

from lit_transdiff.base.student import CONFIDENCE, student
from lit_transdiff.study.verdicts import BETTER, NO_DIFFERENCE, WORSE, in_words, word_for

OPEN = "open"  # not settled
FEWEST = 6  # seeds: if all agree, the sign test's p is 2 / 2^6 = 0.03; with five it is 0.06


@dataclass(frozen=True)
class StudyRule:
    """The claim of a study, and the rule that settles an arm. Both are fixed before the first result.

    An arm is looked at after each seed from FEWEST to ``seeds``. Bonferroni's correction for all looks at all
    arms keeps the probability below 5 % that a study without any difference calls an arm better or worse.
    """

    smallest: float  # the smallest difference worth knowing
    arms: int  # beside the baseline
    seeds: int  # at most
    higher: bool = False  # whether a higher score is better

    @property
    def looks(self) -> int:
        return self.seeds - FEWEST + 1

    @property
    def confidence(self) -> float:
        """The confidence of one interval."""
        return 1 - (1 - CONFIDENCE) / (self.arms * self.looks)


@dataclass(frozen=True)
class Claim:
    """The mean difference over seeds, the half width of its interval, and the p of the sign test."""

    size: float
    half: float
    p: float
    seeds: int
    word: str  # BETTER, WORSE, NO_DIFFERENCE (worth knowing), or OPEN

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"open: {self.seeds} of at least {FEWEST} seeds"
        told = in_words(self.word, self.size, self.half)
        if self.word in (BETTER, WORSE):
            return f"{told} ({self.seeds} seeds, sign test p = {self.p:.2g})"
        told = f"{told} ({self.seeds} seeds)"
        return f"open: {self.size:+.3g} ± {self.half:.2g}, {told}" if self.word == OPEN else told


def claim(differences: Sequence[float], rule: StudyRule) -> Claim:
    """The claim that the differences by seed allow.

    BETTER and WORSE need the t interval over seeds and the sign test to agree; NO_DIFFERENCE needs an
    interval within the smallest difference worth knowing, and comes first. All need FEWEST seeds.
    """
    count = len(differences)
    if count < 2:
        return Claim(mean(differences) if count else math.nan, math.inf, 1.0, count, OPEN)
    size = mean(differences)
    half = student(count - 1, rule.confidence) * stdev(differences) / math.sqrt(count)
    p = sign_test(differences)
    word = OPEN
    if count >= FEWEST and abs(size) + half <= rule.smallest:
        word = NO_DIFFERENCE
    elif count >= FEWEST and p <= 1 - CONFIDENCE and abs(size) > half:
        word = word_for(size, half, rule.higher)
    return Claim(size, half, p, count, word)


def sign_test(differences: Sequence[float]) -> float:
    """The two-sided p of the exact sign test; differences of 0 do not count."""
    signs = [each > 0 for each in differences if each != 0]
    return exact_p(sum(signs), len(signs)) if signs else 1.0


@cache
def exact_p(positive: int, count: int) -> float:
    """The probability of a number of heads at least as far from half of ``count`` throws."""
    from scipy.stats import binomtest

    return float(binomtest(positive, count).pvalue)
