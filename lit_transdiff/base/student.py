"""Student's t: the number of standard errors that an interval extends to either side."""

from __future__ import annotations

import math
from functools import cache

CONFIDENCE = 0.95


@cache
def student(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The two-sided critical value of Student's t; NaN without a degree of freedom."""
    if freedom <= 0:
        return math.nan
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom))
