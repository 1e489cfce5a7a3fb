"""The words for a difference, the same wherever two results are compared."""

from __future__ import annotations

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference"
BEST, UNKNOWN = "best", "unknown"  # beside WORSE and NO_DIFFERENCE: the words of a group against the best one


def word_for(size: float, half: float, higher: bool) -> str:
    """BETTER, WORSE, or NO_DIFFERENCE if the interval ``size`` ± ``half`` contains 0."""
    if abs(size) <= half:
        return NO_DIFFERENCE
    return BETTER if (size > 0) == higher else WORSE


def word_against_best(gap: float, noise: float) -> str:
    """The word for a group that differs by ``gap`` from the best one, which is known up to ``noise``."""
    if gap == 0:
        return BEST
    return UNKNOWN if noise != noise else NO_DIFFERENCE if abs(gap) <= noise else WORSE


def in_words(word: str, size: float, half: float) -> str:
    """A difference with its interval, as in "better by 0.2 ± 0.1" and "no difference above 0.3"."""
    if word in (BETTER, WORSE):
        return f"{word} by {abs(size):.3g} ± {half:.2g}"
    return f"{NO_DIFFERENCE} above {abs(size) + half:.2g}"
