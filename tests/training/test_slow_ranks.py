"""Which rank makes the others wait: the arithmetic. (Two ranks: in distributed/test_nodes.)"""

from __future__ import annotations

import pytest

from lit_transdiff.training.slow_ranks import lag_of
from tests.helpers.small import small_run


@pytest.mark.parametrize(
    "seconds, slowest, lag",
    [
        ([0.1, 0.1, 0.3, 0.1], 2, 3.0),
        ([0.1, 0.2], 1, 2.0),  # the median of two ranks is the faster one
        ([0.0001, 0.0004], 1, 1.0),  # within the clock's noise
        ([0.0, 0.5], 1, 1.0),  # nothing to compare with
    ],
)
def test_the_slowest_rank_is_compared_with_the_median(seconds, slowest: int, lag: float) -> None:
    assert lag_of(seconds) == (slowest, pytest.approx(lag))


def test_a_threshold_that_every_rank_exceeds_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"safety\.slow_rank: got 0\.5; allowed: 0 \(off\) or above 1"):
        small_run(tmp_path, safety={"slow_rank": 0.5})
