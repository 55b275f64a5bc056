"""Figures over runs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pairtrace.engine.detectability.figures import Figure, ModelFigures, over_runs, pooled_rate, summarised
from pairtrace.engine.detectability.plot import picture
from pairtrace.engine.evaluation.rates import Resampling, rate_of
from pairtrace.engine.intervals import wilson_interval


def test_interval_over_runs_is_students() -> None:
    values = [0.61, 0.55, 0.7, 0.58, 0.66]
    found = over_runs(values, 0.95)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-12)
    assert over_runs([0.99, 1.0, 0.9], 0.95, bounds=(0.0, 1.0)).high == 1.0
    assert over_runs([0.4], 0.95) == Figure(value=0.4, low=None, high=None)
    assert over_runs([0.4, None], 0.95).value is None


def test_rates_of_several_groups_are_pooled() -> None:
    rates = [rate_of(np.array([[1]] * yes + [[0]] * no, np.int8), Resampling()) for yes, no in ((3, 7), (10, 20))]
    found = pooled_rate(rates, 0.95)
    assert (found.value, found.low, found.high) == (13 / 40, *wilson_interval(13, 40, 0.95))
    assert pooled_rate([], 0.95) == Figure(value=None, low=0.0, high=1.0)


def model(name: str, **values: float) -> ModelFigures:
    figures = {
        metric.replace("_", "-"): Figure(value=value, low=value - 0.1, high=value + 0.1)
        for metric, value in values.items()
    }
    return ModelFigures(name=name, model=f"./{name}", fingerprint="f", figures=figures, probes={})


def test_methods_are_compared_with_the_model_of_their_own_run() -> None:
    """With organisms of several seeds the model before training differs as well."""
    runs = [
        (
            model("before", behavior=0.4, training=0.9, retrained=0.95),
            model("dpo", behavior=0.1, training=0.8, retrained=0.9),
        ),
        (
            model("before", behavior=0.6, training=0.8, retrained=0.8),
            model("dpo", behavior=0.2, training=0.6, retrained=0.8),
        ),
    ]
    found = summarised("dpo", runs)
    assert found.runs == 2
    assert found.figures["behavior"].value == pytest.approx(0.15)
    assert found.changes["behavior"].value == pytest.approx(-0.35)
    assert found.kept["training"].value == pytest.approx((0.8 / 0.9 + 0.6 / 0.8) / 2)
    # What new probes recover, of what the old ones had.
    assert found.kept["retrained"].value == pytest.approx((0.9 / 0.9 + 0.8 / 0.8) / 2)
    (before, after), _ = runs
    assert summarised("dpo", runs[:1]).figures["training"] == after.figures["training"]
    drawn = picture(before, [found])
    assert drawn.count("<circle") == 2 + 3 + 3
    assert "dpo, 2 runs: training 0.700" in drawn
