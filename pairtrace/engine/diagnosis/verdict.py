"""From figures to a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pairtrace.engine.diagnosis.agreement import Stability
from pairtrace.engine.diagnosis.config import NotMeasured
from pairtrace.engine.diagnosis.confounding import LengthConfounding
from pairtrace.engine.diagnosis.findings import (
    EXPLAINED,
    FEWEST_ALIKE,
    HOLDS,
    LARGEST_SHARE,
    RUNS_OUT,
    UNSTABLE,
    Finding,
    Measured,
    far_tail,
    findings,
)

Verdict = Literal["concentrated", "mixed", "diffuse", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A verdict.

    Attributes:
        verdict: the verdict.
        reason: what decided it, in one sentence.
        findings: every figure that has a threshold.
    """

    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]


def judge(measured: Measured) -> Judged:
    """Weigh the figures.

    The tail decides between concentrated, mixed and diffuse; a ranking that is unstable or that length explains is at
    most mixed. Without the behaviour's own prompts, what stands out cannot be told from look-alikes: then the verdict
    is mixed at most. Without random directions (no store, no direction file, or scores of a method that has none) there
    is nothing to say what chance would give: such a ranking is undecided, whatever its other end looks like.
    """
    verdict, reason = _tail(measured)
    doubts = _doubts(measured)
    if verdict == "concentrated" and doubts:
        verdict, reason = "mixed", f"{reason}; but {' and '.join(doubts)}"
    return Judged(verdict=verdict, reason=reason, findings=findings(measured))


def _tail(measured: Measured) -> tuple[Verdict, str]:
    """What the upper tail says, in the order of what is known."""
    alike = measured.likeness
    if isinstance(measured.random, NotMeasured):
        why = measured.random.not_measured
        return "undecided", f"not decidable, for want of random directions to compare with: {why}"
    far = far_tail(measured.random)
    if isinstance(alike, NotMeasured):
        if far.interval[0] <= 0:
            return "diffuse", "random directions of the data have as many pairs that far up"
        return "mixed", "pairs stand out, but whether they look like the behaviour itself is not measured"
    if alike.interval[1] < FEWEST_ALIKE or alike.hold < RUNS_OUT:
        return "diffuse", "hardly any pair scores like the behaviour's own prompts: the tail runs out before"
    if alike.share > LARGEST_SHARE:
        return "diffuse", f"{alike.share:.0%} of all pairs score like the behaviour's own prompts"
    if far.interval[0] <= 0:
        return "diffuse", "random directions of the data have as many pairs that far up"
    share = f"about {alike.pairs:,.0f} pairs ({alike.share:.1%}) score like the behaviour's own prompts"
    if alike.interval[0] < FEWEST_ALIKE or alike.hold < HOLDS:
        return "mixed", f"{share}, but most that come near are look-alikes"
    return "concentrated", f"{share} and stand apart from the others"


def _doubts(measured: Measured) -> list[str]:
    doubts = []
    for one in (measured.prompts, measured.rollouts):
        if isinstance(one, Stability) and one.top_overlap.value < UNSTABLE:
            doubts.append(f"the top changes with the {one.over} that were drawn")
    if isinstance(measured.length, LengthConfounding) and measured.length.top_explained > EXPLAINED:
        doubts.append("the length of the responses explains most of the top")
    return doubts
