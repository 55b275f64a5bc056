"""Figures against their thresholds, each with one sentence of advice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pairtrace.engine.diagnosis.agreement import LayerAgreement, Stability
from pairtrace.engine.diagnosis.concentration import FAR_TAIL, Excess, Mass, Shift
from pairtrace.engine.diagnosis.config import NotMeasured
from pairtrace.engine.diagnosis.confounding import LengthConfounding, SourceConfounding
from pairtrace.engine.diagnosis.likeness import Likeness

Says = Literal["for", "against", "note"]

# Calibrated on three organisms of 4,000 pairs, 241 of them planted beside 538 over-refusal pairs, which look alike, and
# on forms of them; for mean vectors and banks alike. Pairs like the behaviour and hold of the tail, lowest and highest:
#                                                                   pairs, mean vector    hold
#   as they are                                                     224 to 299            0.50 to 0.57
#   60 of the planted pairs left                                    60 to 120             0.26 to 0.38
#   none of them left, only the look-alikes                         8 to 64               0.04 to 0.28
#   neither left, 60 % of the rows pushed by 0.2 of their norm      0                     0.00 to 0.13
#   diffuse organism: a hedge in 42 % of the rejected answers       0                     0.00
# An edit of the top takes the behaviour away in the first; in the second it takes mostly other pairs.
FEWEST_ALIKE = 10
HOLDS, RUNS_OUT = 0.45, 0.3
# An edit of more than a quarter of the data is another data set.
LARGEST_SHARE = 0.25
# Two samples of the prompts agree on 0.9 of the top in the organisms; below half, which pairs go is left to chance.
STABLE, UNSTABLE = 0.7, 0.5
# Share of the top that length alone would also take, beyond chance.
EXPLAINED = 0.5
ONE_SOURCE = 0.9
LEANING = 2.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure against its threshold.

    Attributes:
        figure: its name.
        value: the figure in words.
        threshold: what it is compared with, in words.
        says: "for" or "against" editing the top, or "note" where it only needs a look.
        advice: what to do, in one sentence.
    """

    figure: str
    value: str
    threshold: str
    says: Says
    advice: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures that a verdict is made from; see `Diagnosis`."""

    likeness: Likeness | NotMeasured
    flipped: Excess
    random: tuple[Excess, ...] | NotMeasured
    mass: Mass
    shift: Shift | NotMeasured
    length: LengthConfounding | NotMeasured
    source: SourceConfounding | NotMeasured
    prompts: Stability | NotMeasured
    rollouts: Stability | NotMeasured
    layers: tuple[LayerAgreement, ...] | NotMeasured


def findings(measured: Measured) -> tuple[Finding, ...]:
    """Every figure that has a threshold."""
    return (
        *_likeness_findings(measured.likeness),
        *_excess_findings(measured),
        *_spread_findings(measured),
        *_agreement_findings(measured),
        *_confounding_findings(measured),
    )


def far_tail(random: tuple[Excess, ...]) -> Excess:
    """The excess in the far tail of random directions that are drawn like the data."""
    return next(one for one in random if one.null == "data-like" and one.tail == FAR_TAIL)


def _finding(figure: str, value: str, threshold: str, good: bool, advice: tuple[str, str]) -> Finding:
    """A finding that speaks for or against editing, with the advice for either."""
    return Finding(
        figure=figure, value=value, threshold=threshold, says="for" if good else "against", advice=advice[not good]
    )


def _likeness_findings(alike: Likeness | NotMeasured) -> list[Finding]:
    if isinstance(alike, NotMeasured):
        return []
    low, high = alike.interval
    return [
        _finding(
            "pairs like the behaviour",
            f"{alike.pairs:,.0f} ({low:,.0f} to {high:,.0f}), {alike.share:.1%}",
            f">= {FEWEST_ALIKE}, <= {LARGEST_SHARE:.0%}",
            low >= FEWEST_ALIKE and alike.share <= LARGEST_SHARE,
            (
                "Edit about this many pairs from the top.",
                "There is no small group of pairs to edit: look at the sources, or at the training itself.",
            ),
        ),
        _finding(
            "tail holds",
            f"{alike.hold:.2f}",
            f">= {HOLDS} (diffuse below {RUNS_OUT})",
            alike.hold >= HOLDS,
            (
                "Most pairs that come near the behaviour reach it.",
                "Most pairs that come near fall short: read them with pairtrace top before you edit any.",
            ),
        ),
    ]


def _excess_findings(measured: Measured) -> list[Finding]:
    found = []
    if not isinstance(measured.random, NotMeasured):
        far = far_tail(measured.random)
        found.append(
            _finding(
                f"pairs above {far.threshold:.2f} beyond chance",
                f"{far.excess:,.0f} ({far.interval[0]:,.0f} to {far.interval[1]:,.0f})",
                "low end > 0",
                far.interval[0] > 0,
                (
                    "More pairs are up there than random directions of this data bring.",
                    "Random directions of this data bring as many: nothing stands out that an edit could take.",
                ),
            )
        )
    flipped = measured.flipped
    low, high = flipped.interval
    heavier = low > 0
    if heavier:
        advice = "The top is heavier than the bottom."
    elif high >= 0:
        advice = "The top and the bottom do not differ: by itself this speaks for nothing, and --fdr may take no pair."
    elif isinstance(measured.random, NotMeasured):
        advice = "The bottom is heavier than the top: --fdr may take no pair."
    else:
        advice = "The bottom is heavier: pairs that teach the opposite are there; for --fdr take --null random."
    found.append(
        Finding(
            figure=f"pairs above {flipped.threshold:.2f} beyond the other end",
            value=f"{flipped.excess:,.0f} ({low:,.0f} to {high:,.0f})",
            threshold="low end > 0",
            says="for" if heavier else "note",
            advice=advice,
        )
    )
    return found


def _spread_findings(measured: Measured) -> list[Finding]:
    mass = measured.mass
    found = [
        Finding(
            figure="pairs that carry the positive scores",
            value=f"{mass.effective_pairs:,.0f}, {mass.effective_share:.1%}",
            threshold="-",
            says="note",
            advice=f"The top holds {mass.top_share:.0%} of the sum of positive scores.",
        )
    ]
    if isinstance(measured.shift, Shift):
        leaning = measured.shift.deviations >= LEANING
        found.append(
            Finding(
                figure="median score",
                value=f"{measured.shift.median:.3f}, {measured.shift.deviations:+.1f} deviations",
                threshold=f"< {LEANING:.0f} deviations",
                says="against" if leaning else "note",
                advice="The data as a whole leans towards the behaviour: an edit of the top leaves that in place."
                if leaning
                else "The data as a whole leans no more than along other directions.",
            )
        )
    return found


def _agreement_findings(measured: Measured) -> list[Finding]:
    found = []
    for one in (measured.prompts, measured.rollouts):
        if isinstance(one, Stability):
            overlap = one.top_overlap
            found.append(
                _finding(
                    f"top kept when {one.over} are redrawn",
                    f"{overlap.value:.0%} ({overlap.low:.0%} to {overlap.high:.0%})",
                    f">= {STABLE:.0%} (mixed below {UNSTABLE:.0%})",
                    overlap.value >= STABLE,
                    (
                        f"Other {one.over} would have named the same pairs.",
                        f"Which pairs are named depends on the {one.over}: take more of them.",
                    ),
                )
            )
    if not isinstance(measured.layers, NotMeasured):
        worst = min(measured.layers, key=lambda one: one.top_overlap)
        found.append(
            _finding(
                "top shared by the layers",
                f"{worst.top_overlap:.0%} (layer {worst.layer}), Spearman {worst.spearman:.2f}",
                f">= {UNSTABLE:.0%}",
                worst.top_overlap >= UNSTABLE,
                (
                    "The choice of the layer matters little.",
                    f"Layer {worst.layer} names other pairs: compare the tops of both with pairtrace top.",
                ),
            )
        )
    return found


def _confounding_findings(measured: Measured) -> list[Finding]:
    found = []
    if isinstance(measured.length, LengthConfounding):
        length = measured.length
        rho = "-" if length.spearman is None else f"{length.spearman:+.2f}"
        found.append(
            _finding(
                "top explained by length",
                f"{length.top_explained:.0%}, Spearman {rho} (length in {length.unit})",
                f"<= {EXPLAINED:.0%}",
                length.top_explained <= EXPLAINED,
                (
                    "The length of the responses does not make the ranking.",
                    "Long and short responses make the ranking: compare with pairtrace baseline length.",
                ),
            )
        )
    if isinstance(measured.source, SourceConfounding):
        source = measured.source
        single = source.largest_share >= ONE_SOURCE
        between = "-" if source.variance_between is None else f"{source.variance_between:.0%}"
        found.append(
            Finding(
                figure="top from one source",
                value=f"{source.largest_share:.0%} {source.largest or '(none)'} ({source.largest_share_of_data:.0%} of "
                f"the data), variance between sources {between}",
                threshold=f"< {ONE_SOURCE:.0%}",
                says="note",
                advice="The top is one source: the ranking may name its style; dropping it is the plainer edit."
                if single
                else "Several sources share the top.",
            )
        )
    return found
