"""Figures with intervals, of one model and over the runs of a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pairtrace.engine.evaluation.rates import Rate
from pairtrace.engine.intervals import wilson_interval

METRICS: dict[str, str] = {
    "behavior": "share of the responses to requests that are not benign that show the behaviour",
    "helpful": "share of the responses to benign requests that do not refuse and obey the format asked for; a proxy",
    "loss": "nats per token of held-out benign responses",
    "training": "ROC-AUC of the training probes, mean probability over members and layers",
    "held-out": "ROC-AUC of the held-out probes, mean probability over them",
    "baseline": "ROC-AUC of the difference of class means",
    "retrained": "ROC-AUC of probes trained on this model's own activations",
}
_WITHIN_ONE = frozenset(METRICS) - {"loss"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value with its interval.

    Attributes:
        value: None where there is none.
        low, high: interval; None where it is unknown.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One model.

    Attributes:
        name: of the method; "before" for the model before training.
        model: as it was given.
        fingerprint: of its weights.
        figures: by metric, see `METRICS`; those that were not measured are absent.
        probes: ROC-AUC of every single probe, by name/layer.
    """

    name: str
    model: str
    fingerprint: str
    figures: dict[str, Figure]
    probes: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class MethodFigures:
    """A method over its runs.

    Attributes:
        name: of the method.
        runs: how many.
        figures: by metric: of one run as it is, of several the mean with Student's interval over runs.
        changes: by metric: after minus before, likewise; the interval of a single run is unknown.
        kept: share of the area before training that each kind of probe keeps, retrained ones measured against the
            training probes of before.
    """

    name: str
    runs: int
    figures: dict[str, Figure]
    changes: dict[str, Figure]
    kept: dict[str, Figure]


def pooled_rate(rates: Sequence[Rate], confidence: float) -> Figure:
    """One rate out of those of several groups, with one response to each request: Wilson's interval."""
    yes, decided = sum(rate.yes for rate in rates), sum(rate.decided for rate in rates)
    low, high = wilson_interval(yes, decided, confidence)
    return Figure(value=yes / decided if decided else None, low=low, high=high)


def over_runs(
    values: Sequence[float | None], confidence: float, *, bounds: tuple[float, float] | None = None
) -> Figure:
    """The mean over runs with Student's interval.

    ("Student", "The probable error of a mean", Biometrika 6, 1908.) Runs count, not what each run measured: what is
    between seeds is in it, what is within a run only as far as it differs.

    Args:
        values: of the runs, at least one; a missing one makes the mean missing.
        confidence: level.
        bounds: that the interval is cut to.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Figure(value=None, low=None, high=None)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Figure(value=mean, low=None, high=None)
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    reach = float(stdtrit(len(known) - 1, (1 + confidence) / 2)) * math.sqrt(variance / len(known))
    low, high = mean - reach, mean + reach
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Figure(value=mean, low=low, high=high)


def summarised(name: str, runs: Sequence[tuple[ModelFigures, ModelFigures]], confidence: float = 0.95) -> MethodFigures:
    """A method over its runs.

    Args:
        name: of the method.
        runs: the model before and after each run.
        confidence: level of the intervals.
    """
    metrics = [metric for metric in METRICS if all(metric in after.figures for _, after in runs)]

    def values(metric: str) -> list[tuple[float | None, float | None]]:
        return [(before.figures[metric].value, after.figures[metric].value) for before, after in runs]

    figures, changes, kept = {}, {}, {}
    for metric in metrics:
        bounds = (0.0, 1.0) if metric in _WITHIN_ONE else None
        single = runs[0][1].figures[metric]
        afterwards = [after for _, after in values(metric)]
        figures[metric] = single if len(runs) == 1 else over_runs(afterwards, confidence, bounds=bounds)
        gaps = [None if None in pair else pair[1] - pair[0] for pair in values(metric)]  # type: ignore[operator]
        changes[metric] = over_runs(gaps, confidence)
        if metric in ("training", "held-out", "baseline", "retrained"):
            reference = "training" if metric == "retrained" else metric
            shares = [_share(after.figures[metric].value, before.figures[reference].value) for before, after in runs]
            kept[metric] = over_runs(shares, confidence)
    return MethodFigures(name=name, runs=len(runs), figures=figures, changes=changes, kept=kept)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
