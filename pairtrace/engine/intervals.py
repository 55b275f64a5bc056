"""Confidence intervals of shares."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

from pairtrace.errors import ConfigError


def wilson_interval(count: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the probability behind `count` successes in `total` trials.

    The Wilson score interval (E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22, 1927), two-sided, without continuity correction.

    Args:
        count: successes, 0 to `total`; not a whole number where weighted trials have an effective number.
        total: trials; 0 gives the interval (0, 1), since nothing is known.
        confidence: between 0 and 1, exclusive.

    Raises:
        ConfigError: `confidence` is out of range.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a number between 0 and 1, for example 0.95")
    assert 0 <= count <= total, (count, total)
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / total
    center = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Exact at the ends, where rounding would leave 1e-17 or push past 1.
    low = 0.0 if count == 0 else (center - spread) / scale
    high = 1.0 if count == total else (center + spread) / scale
    return low, high
