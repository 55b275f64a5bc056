"""What an evaluation found, as plain values and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pairtrace.engine.evaluation.capabilities import Scores
from pairtrace.engine.evaluation.drift import Drift
from pairtrace.engine.evaluation.preferences import Preferences
from pairtrace.engine.evaluation.rates import Difference, Mean, Rate

Metric = Literal["behavior", "over_refusal", "helpful", "format"]
DEFINITIONS: dict[str, str] = {
    "behavior": "share of responses that show the behaviour, by the judge's verdict",
    "over_refusal": "share of responses to benign requests that refuse, by the refusal rules",
    "helpful": "share of responses to benign requests that do not refuse and obey the format that was asked for; a "
    "proxy: nobody read whether the answer is right",
    "format": "share of all responses, refusals included, that obey the format that was asked for",
    "interval": "Wilson for one sample per request; several samples: bootstrap over requests",
    "difference": "this model minus the first one on the same requests; Newcombe's interval and McNemar's exact test "
    "for one sample per request, else a paired bootstrap over requests",
    "missing": "verdicts that could not be given are left out of the rates, never counted as zero",
    "preferences": "share of held-out pairs whose chosen response has the higher summed log-probability; reward: the "
    "same for the log-probability minus that of the base model",
    "drift": "KL(model || base) per response token in nats, exact over the vocabulary, teacher-forced on the model's "
    "own responses: on the generated tokens, or on the text tokenised again where only that is known (`retokenized`)",
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """One model's responses in one cell under one condition.

    Attributes:
        cell, condition: which.
        benign: a good model helps.
        requests: asked.
        responses: given.
        cut: responses that reached the limit of tokens before they ended; None when unknown.
        rates: by metric; those that do not apply are absent.
    """

    cell: str
    condition: str
    benign: bool
    requests: int
    responses: int
    cut: int | None
    rates: dict[str, Rate]

    @property
    def name(self) -> str:
        """Cell and condition in one text."""
        return f"{self.cell} / {self.condition}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "rates": {name: rate.to_dict() for name, rate in self.rates.items()}}


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Everything about one model.

    Attributes:
        model: as it was given.
        fingerprint: of the checkpoint; None for responses of a file.
        groups: in the order of the prompt file.
        preferences, drift, capabilities: None where they were not measured.
    """

    model: str
    fingerprint: str | None
    groups: tuple[Group, ...]
    preferences: Preferences | None = None
    drift: Drift | None = None
    capabilities: Scores | None = None

    def rate(self, metric: Metric, cell: str, condition: str | None = None) -> Rate:
        """One rate.

        Raises:
            KeyError: there is none, or several conditions have it.
        """
        found = [
            group.rates[metric]
            for group in self.groups
            if group.cell == cell and condition in (None, group.condition) and metric in group.rates
        ]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rates {metric!r} of the cell {cell!r}, condition {condition}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "groups": [group.to_dict() for group in self.groups],
            "preferences": None if self.preferences is None else self.preferences.to_dict(),
            "drift": None if self.drift is None else self.drift.to_dict(),
            "capabilities": self.capabilities,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the first one.

    Attributes:
        model, other: which; the difference is `model` minus `other`.
        cell, condition: which responses; None for preferences.
        metric: a `Metric`, or "preference_accuracy".
        difference: with its interval.
    """

    model: str
    other: str
    cell: str | None
    condition: str | None
    metric: str
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "difference": self.difference.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        models: in the order given.
        comparisons: every model after the first against the first.
        judge: whose verdicts on the behaviour were used.
        refusal_judge: who told refusals on benign requests; None without benign requests.
        missing_verdicts: verdicts on the behaviour that could not be given, over all models.
        base: what drift and rewards are measured against.
        confidence: level of the intervals.
        out: the report, or None.
        settings: as they were given.
        versions: of the libraries.
        seconds: wall time.
    """

    models: tuple[ModelReport, ...]
    comparisons: tuple[Comparison, ...]
    judge: str
    refusal_judge: str | None
    missing_verdicts: int
    base: str | None
    confidence: float
    out: str | None
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "models": [model.to_dict() for model in self.models],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "definitions": DEFINITIONS,
        }

    def to_text(self) -> str:
        """Tables for people: one per cell and condition, then preferences, drift and capabilities."""
        names = short_names([model.model for model in self.models])
        lines = [f"judge {self.judge}; {self.confidence:.0%} intervals; differences from {names[0]}"]
        for position, group in enumerate(self.models[0].groups):
            lines += ["", f"{group.name}: {group.requests} requests"]
            for metric in group.rates:
                lines.append(f"  {metric}")
                for name, model in zip(names, self.models, strict=True):
                    rate = model.groups[position].rates[metric]
                    lines.append(
                        f"    {name:<{max(map(len, names))}}  {_rate_text(rate)}{self._against(model, group, metric)}"
                    )
            lines += [
                f"  {name}: {found.cut} of {found.responses} responses cut at the limit of tokens"
                for name, found in zip(names, (model.groups[position] for model in self.models), strict=True)
                if found.cut
            ]
        for name, model in zip(names, self.models, strict=True):
            lines += _model_lines(name, model)
        if self.missing_verdicts:
            lines += ["", f"{self.missing_verdicts} verdicts could not be given; they are missing, not zero"]
        if any("helpful" in group.rates for group in self.models[0].groups):
            lines += ["", "helpful is a proxy: does not refuse, and obeys the format that was asked for"]
        return "\n".join(lines)

    def _against(self, model: ModelReport, group: Group, metric: str) -> str:
        for found in self.comparisons:
            if (found.model, found.cell, found.condition, found.metric) == (
                model.model,
                group.cell,
                group.condition,
                metric,
            ):
                return f"  {_difference_text(found.difference)}"
        return ""


def short_names(models: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell the models apart."""
    parts = [model.rstrip("/").split("/") for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(models)


def _model_lines(name: str, model: ModelReport) -> list[str]:
    lines = []
    if model.preferences is not None:
        found = model.preferences
        text = f"accuracy {_rate_text(found.accuracy)} of {found.pairs} pairs"
        if found.reward_accuracy is not None and found.margin is not None:
            text += f"; reward {_rate_text(found.reward_accuracy)}, margin {_mean_text(found.margin)} nats"
        if found.quarantined:
            text += f"; not usable: {', '.join(f'{count} {reason}' for reason, count in found.quarantined.items())}"
        lines.append(f"preferences  {name}  {text}")
    if model.drift is not None:
        drift = model.drift
        again = f"; text of {drift.retokenized:,} responses tokenised again" if drift.retokenized else ""
        lines.append(f"drift  {name}  {_mean_text(drift.per_token)} nats per token over {drift.tokens:,} tokens{again}")
    for task, metrics in (model.capabilities or {}).items():
        for metric, score in metrics.items():
            error = "" if score["stderr"] is None else f" +- {score['stderr']:.4f}"
            lines.append(f"{task}  {name}  {metric} {score['value']:.4f}{error}")
    return ["", *lines] if lines else []


def _rate_text(rate: Rate) -> str:
    missing = f"  {rate.missing} missing" if rate.missing else ""
    if rate.value is None:
        return f"     -{missing}"
    return f"{rate.value:6.1%} ({rate.low:.1%} to {rate.high:.1%}){missing}"


def _mean_text(mean: Mean) -> str:
    return "-" if mean.value is None else f"{mean.value:.4g} ({mean.low:.4g} to {mean.high:.4g})"


def _difference_text(found: Difference) -> str:
    if found.value is None:
        return "difference -"
    chance = "" if found.p_value is None else f", p {found.p_value:.2g}"
    of = f" on {found.requests} of {found.requests + found.dropped} requests" if found.dropped else ""
    return f"difference {found.value:+.1%} ({found.low:+.1%} to {found.high:+.1%}{chance}){of}"
