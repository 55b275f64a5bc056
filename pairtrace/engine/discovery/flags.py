"""Which clusters of prompts deserve attention: those where the verdicts on the answers changed beyond chance.

Letters: P items, C clusters.

The unit is the prompt, not the rollout, since rollouts of one prompt are alike. With one rollout per model a prompt has
a verdict before and one after, and the test is McNemar's, exact: Q. McNemar, "Note on the sampling error of the
difference between correlated proportions or percentages", Psychometrika 12 (1947). With several rollouts the share of
the decided ones that show the behaviour takes the verdict's place, and the test is the sign test, of which McNemar's is
the case of one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pairtrace.engine.discovery.enrichment import benjamini_hochberg
from pairtrace.engine.discovery.prompt_bag import BagItem
from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.errors import ConfigError

NOTHING_JUDGED = "no prompt has a verdict on both models' answers, so nothing could be flagged; judge with --rules"


@dataclass(frozen=True, kw_only=True)
class VerdictChange:
    """How the verdicts on the members of a cluster changed.

    Attributes:
        judged: members with at least one verdict on either model's answers.
        missing: members without.
        base_rate, tuned_rate: mean share of answers that show the behaviour, over the judged members; None without any.
        risen, fallen: judged members whose share is larger, or smaller, with M1.
        p_value: two-sided, that of `risen` and `fallen` when either is as likely as the other.
        q_value: `p_value` corrected for all clusters (Benjamini and Hochberg).
        flagged: beyond chance, and more of the behaviour than before.
    """

    judged: int
    missing: int
    base_rate: float | None
    tuned_rate: float | None
    risen: int
    fallen: int
    p_value: float
    q_value: float
    flagged: bool

    def to_dict(self) -> dict[str, Any]:
        """The change as plain JSON values."""
        return asdict(self)


def shown_shares(table: RolloutTable, items: Sequence[BagItem]) -> tuple[np.ndarray, np.ndarray]:
    """Share of the decided answers that show the behaviour, per item: float64 [P] of M0 and of M1, NaN without any."""
    verdicts = table.verdicts()

    def share(rows: tuple[int, ...]) -> float:
        found = verdicts[list(rows)]
        decided = found[found >= 0]
        return float(decided.mean()) if decided.size else float("nan")

    base = [share(item.base_rows) for item in items]
    return np.array(base), np.array([share(item.tuned_rows) for item in items])


def verdict_changes(
    base: np.ndarray, tuned: np.ndarray, labels: np.ndarray, clusters: int, false_discovery_rate: float = 0.05
) -> list[VerdictChange]:
    """Test every cluster, and flag those where the behaviour has become more frequent.

    Args:
        base: float64 [P], share of M0's answers that show the behaviour, NaN without a verdict.
        tuned: float64 [P], of M1's.
        labels: int [P], number of the cluster; -1 for noise, which is never tested.
        clusters: C.
        false_discovery_rate: largest q-value of a flagged cluster.

    Raises:
        ConfigError: `false_discovery_rate` is not between 0 and 1.
    """
    if not 0 < false_discovery_rate < 1:
        raise ConfigError(f"--flag-fdr is {false_discovery_rate}; expected above 0 and below 1")
    known = np.isfinite(base) & np.isfinite(tuned)
    members = [np.flatnonzero((labels == number) & known) for number in range(clusters)]
    sizes = np.bincount(labels[labels >= 0], minlength=clusters)
    # Shares of different denominators that are equal may differ in the last bit.
    moved = np.where(known, np.sign(np.round(np.nan_to_num(tuned) - np.nan_to_num(base), 9)), 0).astype(int)
    counts = [(int((moved[rows] > 0).sum()), int((moved[rows] < 0).sum())) for rows in members]
    p_values = np.array([exact_mcnemar(*pair) for pair in counts])
    # A cluster that nobody judged is no test.
    tested = np.array([len(rows) > 0 for rows in members], bool)
    q_values = np.ones(clusters)
    q_values[tested] = benjamini_hochberg(p_values[tested])
    return [
        VerdictChange(
            judged=len(rows),
            missing=int(sizes[number]) - len(rows),
            base_rate=float(base[rows].mean()) if len(rows) else None,
            tuned_rate=float(tuned[rows].mean()) if len(rows) else None,
            risen=risen,
            fallen=fallen,
            p_value=float(p_values[number]),
            q_value=float(q_values[number]),
            flagged=bool(q_values[number] <= false_discovery_rate and risen > fallen),
        )
        for number, (rows, (risen, fallen)) in enumerate(zip(members, counts, strict=True))
    ]


def exact_mcnemar(risen: int, fallen: int) -> float:
    """Two-sided p-value of the exact McNemar test: that of a fair coin which fell `risen` against `fallen` times."""
    tosses = risen + fallen
    ways = tail = 1
    # Whole numbers, which thousands of tosses do not take out of their range.
    for count in range(min(risen, fallen)):
        ways = ways * (tosses - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << tosses))
