"""What is new at a step of training: assign changed answers to clusters, cluster the rest, compare with M0.

Letters: P items, K samples of M0, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pairtrace.engine.discovery.clustering import ClusterConfig, cluster
from pairtrace.engine.discovery.flags import exact_mcnemar
from pairtrace.engine.monitoring.clusters import WatchedCluster, assign
from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.monitoring.growth import Share, has_grown, spent_level

# Width to which answers are reduced before they are clustered.
_REDUCED = 32
HARMFUL, UNJUDGED, NOTE = "harmful", "unjudged", "note"


@dataclass(frozen=True, kw_only=True, eq=False)
class Changes:
    """How answers differ from M0's.

    Attributes:
        units: float32 [..., P, D], behaviour-change vectors of unit length; zero for an answer that did not change.
        readable: bool [..., P]; False for an answer that could not be read.
        flips: int8 [P], 1 where the verdict turned from false to true, -1 for the reverse, 0 for neither; None
            where nothing is judged.
    """

    units: np.ndarray
    readable: np.ndarray
    flips: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One cluster at one step.

    Attributes:
        name, kind, flagged: of the cluster.
        now: its share of the answers at this step.
        start: its share of M0's further answers.
        grown: `now` lies above `start`, beyond chance and by the least growth that counts (any, where the judge's
            verdicts changed).
        risen, fallen: members whose verdict turned true, and false; None where nothing is judged.
        verdict_p: of the exact McNemar test on them, two-sided; None likewise.
        judged_changed: more turned true, and the p-value is below the level of the test.
        members: positions of the items.
    """

    name: str
    kind: str
    flagged: bool
    now: Share
    start: Share
    grown: bool
    risen: int | None
    fallen: int | None
    verdict_p: float | None
    judged_changed: bool
    members: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        figures = {name: getattr(self, name) for name in ("name", "kind", "flagged", "grown")}
        verdicts = {"risen": self.risen, "fallen": self.fallen, "p_value": self.verdict_p}
        return {
            **figures,
            "now": self.now.to_dict(),
            "start": self.start.to_dict(),
            "verdicts": None if self.verdict_p is None else verdicts,
        }


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something that changed.

    Attributes:
        severity: "harmful" (a judge's verdicts changed beyond chance, or a flagged cluster has grown and there is no
            judge), "unjudged" (a new cluster, and no judge) or "note" (neither).
        cluster: its name.
        text: what happened.
    """

    severity: str
    cluster: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return {"severity": self.severity, "cluster": self.cluster, "text": self.text}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a step showed.

    Attributes:
        lines: clusters that are watched, then candidates.
        raised: alerts and notes that no earlier step had.
        changed: answers that changed.
        rest: changed answers that belong to no watched cluster.
    """

    lines: tuple[Line, ...]
    raised: tuple[Alert, ...]
    changed: int
    rest: int

    @property
    def alerts(self) -> list[Alert]:
        """What is more than a note."""
        return [one for one in self.raised if one.severity != NOTE]


@dataclass(kw_only=True)
class Watch:
    """The clusters of a run, from step to step.

    Attributes:
        config: the settings.
        null: answers that M0 gave to the same prompts again, [K, P, D].
        clusters: known and new ones.
        candidates: seen at the last step only.
        raised: severities by cluster.
        tests: steps that were looked at.
    """

    config: MonitorConfig
    null: Changes
    clusters: list[WatchedCluster] = field(default_factory=list)
    candidates: list[WatchedCluster] = field(default_factory=list)
    raised: dict[str, set[str]] = field(default_factory=dict)
    tests: int = 0

    def look(self, step: int, now: Changes) -> Seen:
        """Compare the answers at a step with M0's, and remember what is new."""
        self.tests += 1
        lines = self._lines([*self.clusters, *self.candidates], now)
        # A direction that was found on earlier answers and holds on these is no accident of the clustering.
        held = [one.name for one in lines if one.kind == "candidate" and one.grown]
        names = {old: f"new-{self._count_new() + number}" for number, old in enumerate(held, start=1)}
        self.clusters += [
            replace(one, name=names[one.name], kind="new") for one in self.candidates if one.name in names
        ]
        lines = self._lines(self.clusters, now)
        raised = [alert for line in lines if (alert := self._alert(line)) is not None]
        for one in raised:
            self.raised.setdefault(one.cluster, set()).add(one.severity)
        rest = (assign(now.units, self.clusters) < 0) & now.units.any(axis=-1)
        found = self._candidates(step, now, rest)
        tried = self._lines([*self.clusters, *found], now)[len(self.clusters) :]
        self.candidates = [one for one, line in zip(found, tried, strict=True) if line.grown]
        return Seen(
            lines=(*lines, *(line for line in tried if line.grown)),
            raised=tuple(raised),
            changed=int(now.units.any(axis=-1).sum()),
            rest=int(rest.sum()),
        )

    def _count_new(self) -> int:
        return sum(one.kind == "new" for one in self.clusters)

    def _lines(self, clusters: Sequence[WatchedCluster], now: Changes) -> list[Line]:
        owner, null_owner = assign(now.units, clusters), assign(self.null.units, clusters)
        level = spent_level(self.config.alpha, self.tests, len(clusters))
        lines = []
        for number, one in enumerate(clusters):
            members = np.flatnonzero(owner == number)
            share = Share.at(len(members), int(now.readable.sum()), level)
            start = Share.at(int((null_owner == number).sum()), int(self.null.readable.sum()), level)
            risen = fallen = p = None
            if now.flips is not None:
                risen, fallen = (int((now.flips[members] == sign).sum()) for sign in (1, -1))
                p = exact_mcnemar(risen, fallen)
            judged_changed = bool(p is not None and p <= level and (risen or 0) > (fallen or 0))
            # What a judge sees to turn is no drift of wording: any growth beyond chance counts.
            least = 0.0 if judged_changed else self.config.min_growth
            lines.append(
                Line(
                    name=one.name,
                    kind=one.kind,
                    flagged=one.flagged,
                    now=share,
                    start=start,
                    grown=has_grown(share, start, least),
                    risen=risen,
                    fallen=fallen,
                    verdict_p=p,
                    judged_changed=judged_changed,
                    members=tuple(members.tolist()),
                )
            )
        return lines

    def _alert(self, line: Line) -> Alert | None:
        """What the cluster's growth is worth saying; None for nothing, or nothing that was not said before."""
        if not line.grown:
            return None
        if line.verdict_p is not None:
            severity = HARMFUL if line.judged_changed else NOTE
        elif line.kind == "known":
            severity = HARMFUL if line.flagged else NOTE
        else:
            severity = UNJUDGED
        said = self.raised.get(line.name, set())
        if severity in said or HARMFUL in said:
            return None
        return Alert(severity=severity, cluster=line.name, text=_text(line))

    def _candidates(self, step: int, now: Changes, rest: np.ndarray) -> list[WatchedCluster]:
        """What could be clusters among the answers that belong to no watched one.

        Those whose verdict turned true are one: a behaviour may be too thin or too wide for the clustering to see. The
        others come from the clustering, with M0's further answers as the background that they must stand out of.

        Args:
            step: for their names.
            now: the answers.
            rest: bool [P], those that are looked at.
        """
        config = self.config
        size = config.min_cluster_size or max(5, round(0.02 * len(rest)))
        changed = now.units[rest]
        if len(changed) < size:
            return []
        groups = [] if now.flips is None else [now.units[rest & (now.flips > 0)]]
        null = (assign(self.null.units, self.clusters) < 0) & self.null.units.any(axis=-1)
        points = _reduced(np.concatenate([changed, self.null.units[null]]), config.seed)
        labels = cluster(points, ClusterConfig(min_cluster_size=size, seed=config.seed)).labels[: len(changed)]
        groups += [changed[labels == number] for number in range(int(labels.max()) + 1)]
        if labels.max() < 0:
            # One group as a whole is no cluster to the clustering, for it stands out of nothing.
            groups.append(changed)
        found: list[WatchedCluster] = []
        for members in groups:
            one = None if len(members) < size else WatchedCluster.around(members, name=f"candidate-{step}-{len(found)}")
            # Two candidates for one thing would share its answers, and neither might seem to have grown.
            if one is not None and assign(one.direction, found) < 0:
                found.append(one)
        return found


def _reduced(units: np.ndarray, seed: int) -> np.ndarray:
    """Unit rows of less width, float32; not centred, for zero means that nothing changed."""
    from sklearn.utils.extmath import randomized_svd

    width = min(_REDUCED, *units.shape)
    if width == units.shape[1]:
        return units
    left, singular, _ = randomized_svd(units, width, n_iter=2, random_state=seed)
    rows = (left * singular).astype(np.float32)
    reduced: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return reduced


def _text(line: Line) -> str:
    what = "new cluster" if line.kind == "new" else f"{'flagged ' if line.flagged else ''}cluster"
    verdicts = ""
    if line.risen is not None:
        verdicts = f"; by the judge, {line.risen} now show the behaviour that did not, and {line.fallen} no longer do"
    return (
        f"{what} {line.name}: {line.now.count} of {line.now.of} answers ({line.now.value:.1%}, at least "
        f"{line.now.interval[0]:.1%}), with M0 {line.start.value:.1%} (at most {line.start.interval[1]:.1%}){verdicts}"
    )
