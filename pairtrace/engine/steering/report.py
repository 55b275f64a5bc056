"""What a steering run found, as plain values and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pairtrace.engine.evaluation.rates import Difference, Mean, Rate
from pairtrace.engine.evaluation.report import Group

DEFINITIONS: dict[str, str] = {
    "scale": "length of the added vector over the mean norm of the residual stream at the layer, over the tokens that "
    "the unsteered model generates",
    "behavior": "share of responses that show the behaviour, by the judge's verdict; garbled text gets a verdict "
    "too, so read it beside `surprise`",
    "surprise": "mean negative log-probability per generated token under the unsteered model, in nats: how far from "
    "its own language the model was pushed",
    "difference": "this arm minus the unsteered model on the same requests; Newcombe's interval and McNemar's exact "
    "test for one sample per request, else a paired bootstrap over requests",
    "ablated": "the direction is projected out of the residual stream at its own layer; `everywhere`: at all layers, "
    "and between attention and MLP; `left`: the component along it that stays, the base model's mean at the end of the "
    "prompts",
    "control": "a random direction, added at the same layer and length, or projected out in the same places",
    "interval": "Wilson for one sample per request; several samples: bootstrap over requests",
}


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One way to steer.

    Attributes:
        name: unique within the run.
        direction, control, layer, mode, everywhere, scale, left: as in `arms.Arm`.
        length: of the added vector, in the units of the activations; None where nothing is added.
        groups: rates by cell and condition.
        differences: of the behaviour from the unsteered model, in the order of the groups; empty for that itself.
        surprise: see `DEFINITIONS`.
    """

    name: str
    direction: str
    control: bool
    layer: int | None
    mode: str
    everywhere: bool
    scale: float | None
    left: float | None
    length: float | None
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    surprise: Mean

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "groups": [group.to_dict() for group in self.groups],
            "differences": [difference.to_dict() for difference in self.differences],
            "surprise": vars(self.surprise),
        }


@dataclass(frozen=True, kw_only=True)
class SteerReport:
    """What `steer` found.

    Attributes:
        model: checkpoint that answered.
        fingerprint: of its weights.
        behavior: name of the direction.
        same_model: whether the direction was made from this checkpoint; None when unknown.
        norms: mean norm of the residual stream, by layer.
        judge: whose verdicts were used.
        missing_verdicts: that could not be given, over all arms.
        arms: the unsteered model first.
        confidence: level of the intervals.
        out: the report.
        settings: as they were given.
        versions: of the libraries.
        seconds: wall time.
    """

    model: str
    fingerprint: str
    behavior: str
    same_model: bool | None
    norms: dict[int, float]
    judge: str
    missing_verdicts: int
    arms: tuple[ArmReport, ...]
    confidence: float
    out: str
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def arm(self, direction: str, layer: int, scale: float | None) -> ArmReport:
        """One arm; scale None for the one that projects out.

        Raises:
            KeyError: there is none.
        """
        found = [one for one in self.arms if (one.direction, one.layer, one.scale) == (direction, layer, scale)]
        if not found:
            raise KeyError(f"{direction}, layer {layer}, scale {scale}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "arms": [arm.to_dict() for arm in self.arms], "definitions": DEFINITIONS}

    def to_rows(self) -> list[dict[str, str]]:
        """A table for people: one row per arm and group."""
        rows = []
        for arm in self.arms:
            for place, group in enumerate(arm.groups):
                difference = arm.differences[place] if arm.differences else None
                rows.append(
                    {
                        "arm": arm.name,
                        "prompts": group.name,
                        "behavior": _rate(group.rates["behavior"]),
                        "difference": "" if difference is None else _difference(difference),
                        "surprise": "-" if arm.surprise.value is None else f"{arm.surprise.value:.2f}",
                    }
                )
        return rows


def _rate(rate: Rate) -> str:
    if rate.value is None:
        return "-"
    missing = f", {rate.missing} missing" if rate.missing else ""
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%}){missing}"


def _difference(found: Difference) -> str:
    return "-" if found.value is None else f"{found.value:+.1%} ({found.low:+.1%} to {found.high:+.1%})"
