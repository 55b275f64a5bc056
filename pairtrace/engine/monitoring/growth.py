"""Has a cluster grown, beyond what M0's own answers do when they are sampled again?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from pairtrace.engine.intervals import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the answers.

    Attributes:
        count, of: members, and answers that could be read.
        interval: Wilson's, at the level of the test.
    """

    count: int
    of: int
    interval: tuple[float, float]

    @classmethod
    def at(cls, count: int, of: int, level: float) -> Share:
        """The share with its interval; `level` is the chance that it misses the true one."""
        return cls(count=count, of=of, interval=wilson_interval(count, of, 1.0 - level))

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.of if self.of else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "share": self.value}


def spent_level(alpha: float, test: int, clusters: int) -> float:
    """Level of one cluster's test.

    The levels of all tests of a run add up to at most `alpha`, however many steps it will have: 1 / (t (t + 1)) adds up
    to 1 over all t (alpha spending), and the clusters of one step share its part (Bonferroni).

    Args:
        alpha: for the whole run.
        test: number of the step that is tested, from 1.
        clusters: that are tested at this step.
    """
    assert test >= 1
    return alpha / (test * (test + 1)) / max(1, clusters)


def least_growth(now: Share, start: Share) -> float:
    """Lower end of the interval of the difference, made of the Wilson intervals of both shares.

    R. G. Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven
    methods", Statistics in Medicine 17 (1998), method 10. The answers are to the same prompts, whose likeness makes the
    difference vary less than that of independent samples: the interval is wider than it need be.
    """
    below, above = now.value - now.interval[0], start.interval[1] - start.value
    return now.value - start.value - sqrt(below * below + above * above)


def has_grown(now: Share, start: Share, min_growth: float) -> bool:
    """Whether a share lies above what it was, beyond chance at the level of the shares, and by `min_growth` or more."""
    return least_growth(now, start) > 0 and now.value - start.value >= min_growth
