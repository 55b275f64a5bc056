"""The detectability report as plain values and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pairtrace.engine.detectability.figures import METRICS, Figure, MethodFigures, ModelFigures


@dataclass(frozen=True, kw_only=True)
class DetectabilityReport:
    """What `detectability` found.

    Attributes:
        before: the model before training.
        runs: every trained model.
        methods: the runs of each name together.
        layers: of the probes.
        judge: whose verdicts on the behaviour were used.
        missing_verdicts: that could not be given; they are left out of the rates.
        confidence: level of the intervals.
        out: the report.
        settings: as they were given.
        versions: of the libraries.
        seconds: wall time.
    """

    before: ModelFigures
    runs: tuple[ModelFigures, ...]
    methods: tuple[MethodFigures, ...]
    layers: tuple[int, ...]
    judge: str
    missing_verdicts: int
    confidence: float
    out: str
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "definitions": METRICS}

    def rows(self) -> list[dict[str, str]]:
        """The table: a row for the model before training and for each method, a column for each metric."""
        shown = [metric for metric in METRICS if metric in self.before.figures]
        lines = [("before", 1, self.before.figures), *((one.name, one.runs, one.figures) for one in self.methods)]
        return [
            {"model": name, "runs": str(runs), **{metric: cell(metric, figures.get(metric)) for metric in shown}}
            for name, runs, figures in lines
        ]


def cell(metric: str, figure: Figure | None) -> str:
    """A figure as text: rates in per cent, losses and areas as numbers."""
    if figure is None or figure.value is None:
        return "-"
    style = ".1%" if metric in ("behavior", "helpful") else ".3f"
    text = format(figure.value, style)
    if figure.low is None or figure.high is None:
        return text
    return f"{text} ({format(figure.low, style)} to {format(figure.high, style)})"
