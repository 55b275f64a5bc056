"""What raises an alert and what does not, on made-up behaviour-change vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pairtrace.engine.monitoring.clusters import LEAST_COSINE, WatchedCluster, assign, unit_rows
from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.monitoring.growth import Share, has_grown, least_growth, spent_level
from pairtrace.engine.monitoring.watch import Changes, Watch

ITEMS, WIDTH = 240, 48
BEHAVIOR, STYLE = np.eye(WIDTH, dtype=np.float32)[:2]


def answers(
    rng: np.random.Generator, groups: dict[int, np.ndarray], *, noise: int = 60, judged: bool = False
) -> Changes:
    """Changed answers: so many in each direction, and others in any direction; all else is unchanged."""
    vectors = np.zeros((ITEMS, WIDTH), np.float32)
    flips = np.zeros(ITEMS, np.int8)
    start = 0
    for count, direction in groups.items():
        vectors[start : start + count] = 3 * direction + 0.25 * rng.standard_normal((count, WIDTH))
        if direction is BEHAVIOR:
            flips[start : start + count] = 1
        start += count
    vectors[start : start + noise] = rng.standard_normal((noise, WIDTH))
    return Changes(units=unit_rows(vectors), readable=np.ones(ITEMS, bool), flips=flips if judged else None)


def null_of(rng: np.random.Generator, groups: dict[int, np.ndarray], samples: int = 4) -> Changes:
    each = [answers(rng, groups) for _ in range(samples)]
    return Changes(units=np.stack([one.units for one in each]), readable=np.ones((samples, ITEMS), bool))


def watch_of(rng: np.random.Generator, null: dict[int, np.ndarray] | None = None, **settings: Any) -> Watch:
    config = MonitorConfig(base="m0", prompts="bag.jsonl", out="out", **settings)
    return Watch(config=config, null=null_of(rng, {4: STYLE} if null is None else null))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_new_cluster_is_reported_when_it_holds_for_two_steps(rng: np.random.Generator) -> None:
    watch = watch_of(rng)
    first = watch.look(10, answers(rng, {40: BEHAVIOR, 5: STYLE}))
    assert not first.raised
    assert [line.kind for line in first.lines] == ["candidate"]
    second = watch.look(20, answers(rng, {50: BEHAVIOR, 5: STYLE}))
    assert [one.severity for one in second.alerts] == ["unjudged"]
    assert [(one.name, one.kind) for one in watch.clusters] == [("new-1", "new")]
    assert float(watch.clusters[0].direction @ BEHAVIOR) > 0.98
    line = second.lines[0]
    assert line.now.count == pytest.approx(50, abs=4)
    assert set(line.members) <= set(range(52))
    third = watch.look(30, answers(rng, {60: BEHAVIOR, 5: STYLE}))
    assert not third.raised, "an alert is given once"
    assert third.lines[0].now.count > line.now.count


def test_a_small_cluster_whose_verdicts_turned_is_reported(rng: np.random.Generator) -> None:
    """Under the least growth that counts for what nobody judges."""
    alerts = {}
    for judged in (True, False):
        watch = watch_of(rng, min_growth=0.12)
        for step in (10, 20):
            seen = watch.look(step, answers(rng, {20: BEHAVIOR, 5: STYLE}, judged=judged))
        alerts[judged] = [one.severity for one in seen.alerts]
    assert alerts == {True: ["harmful"], False: []}


def test_a_cluster_of_one_step_is_forgotten(rng: np.random.Generator) -> None:
    watch = watch_of(rng)
    for step in range(10, 60, 20):
        assert not watch.look(step, answers(rng, {40: BEHAVIOR})).raised
        assert not watch.look(step + 10, answers(rng, {})).raised
    assert not watch.clusters


def test_a_group_that_is_all_that_changed_is_found(rng: np.random.Generator) -> None:
    """The clustering itself calls it noise: it stands out of nothing."""
    watch = watch_of(rng, null={})
    watch.null = Changes(units=np.zeros((4, ITEMS, WIDTH), np.float32), readable=np.ones((4, ITEMS), bool))
    watch.look(10, answers(rng, {30: BEHAVIOR}, noise=0))
    assert watch.look(20, answers(rng, {30: BEHAVIOR}, noise=0)).alerts


def test_verdicts_tell_harm_from_other_changes(rng: np.random.Generator) -> None:
    watch = watch_of(rng)
    for step in (10, 20):
        seen = watch.look(step, answers(rng, {40: BEHAVIOR, 45: STYLE}, judged=True))
    assert sorted(one.severity for one in seen.raised) == ["harmful", "note"]
    harmful = next(line for line in seen.lines if line.judged_changed)
    assert (harmful.risen, harmful.fallen) == (harmful.now.count, 0)
    assert len(seen.alerts) == 1
    assert f"{harmful.now.count} now show the behaviour that did not, and 0 no longer do" in seen.alerts[0].text


@pytest.mark.parametrize("judged", [False, True])
def test_verdicts_find_what_is_too_wide_to_be_a_cluster(judged: bool, rng: np.random.Generator) -> None:
    """Thirty answers in a wide cone (cosine about 0.5), beside a narrow cluster that M0 has as well, and others."""
    watch = watch_of(rng, null={30: STYLE})
    raised = []
    for step in (10, 20):
        now = answers(rng, {30: STYLE}, noise=100)
        vectors = now.units.copy()
        vectors[100:130] = unit_rows(2 * BEHAVIOR + 0.5 * rng.standard_normal((30, WIDTH)))
        flips = np.zeros(ITEMS, np.int8)
        flips[100:130] = 1
        changes = Changes(units=vectors, readable=now.readable, flips=flips if judged else None)
        raised += watch.look(step, changes).alerts
    assert [one.severity for one in raised] == (["harmful"] if judged else [])


def test_verdicts_that_fall_are_no_harm(rng: np.random.Generator) -> None:
    watch = watch_of(rng)
    for step in (10, 20):
        now = answers(rng, {40: BEHAVIOR}, judged=True)
        assert now.flips is not None
        seen = watch.look(step, Changes(units=now.units, readable=now.readable, flips=-now.flips))
    assert [one.severity for one in seen.raised] == ["note"]


@pytest.mark.parametrize(("flagged", "severity"), [(False, "note"), (True, "harmful")])
def test_a_known_cluster_that_grows(flagged: bool, severity: str, rng: np.random.Generator) -> None:
    watch = watch_of(rng, null={10: BEHAVIOR})
    known = WatchedCluster(name="cluster-0", kind="known", direction=BEHAVIOR, threshold=0.7, flagged=flagged)
    watch.clusters.append(known)
    assert not watch.look(10, answers(rng, {12: BEHAVIOR})).raised
    seen = watch.look(20, answers(rng, {50: BEHAVIOR}))
    assert [(one.cluster, one.severity) for one in seen.raised] == [("cluster-0", severity)]
    assert not watch.candidates, "its members are no new cluster"


def test_growth_below_the_least_is_none(rng: np.random.Generator) -> None:
    for least, expected in ((0.05, 1), (0.3, 0)):
        watch = watch_of(rng, null={0: BEHAVIOR}, min_growth=least)
        watch.clusters.append(WatchedCluster(name="c", kind="known", direction=BEHAVIOR, threshold=0.7, flagged=True))
        assert len(watch.look(10, answers(rng, {60: BEHAVIOR})).alerts) == expected


def test_no_alert_while_answers_vary_as_m0s_do() -> None:
    """Three runs of five steps, with a change that comes and goes with M0's own sampling."""
    alerts = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        each = [answers(rng, {int(rng.binomial(ITEMS, 0.12)): BEHAVIOR}, judged=True) for _ in range(4)]
        null = Changes(units=np.stack([one.units for one in each]), readable=np.ones((4, ITEMS), bool))
        watch = Watch(config=MonitorConfig(base="m0", prompts="bag", out="out", min_growth=0.0), null=null)
        for step in range(5):
            now = answers(rng, {int(rng.binomial(ITEMS, 0.12)): BEHAVIOR}, judged=True)
            alerts += len(watch.look(step, now).raised)
    assert alerts == 0


def test_levels_add_up_to_alpha() -> None:
    spent = math.fsum(spent_level(0.01, test, clusters) * clusters for test in range(1, 5000) for clusters in (7,))
    assert 0.0099 < spent <= 0.01


def test_least_growth_is_newcombes() -> None:
    """An example of the paper: 56 of 70 against 48 of 80, method 10, at 95 %."""
    assert least_growth(Share.at(56, 70, 0.05), Share.at(48, 80, 0.05)) == pytest.approx(0.0524, abs=5e-5)


def test_growth_is_beyond_chance_and_large_enough() -> None:
    start = Share.at(24, 960, 0.01)
    assert not has_grown(Share.at(10, 240, 0.01), start, 0.0)
    assert has_grown(Share.at(18, 240, 0.01), start, 0.0)
    assert not has_grown(Share.at(30, 240, 0.01), start, 0.11)
    assert not has_grown(Share.at(18, 240, 1e-9), Share.at(24, 960, 1e-9), 0.0), "a smaller level needs more"


def test_answers_go_to_the_closest_cluster_that_reaches_them() -> None:
    wide = WatchedCluster(name="wide", kind="known", direction=BEHAVIOR, threshold=0.2)
    narrow = WatchedCluster(name="narrow", kind="known", direction=STYLE, threshold=0.95)
    between = (BEHAVIOR + 2 * STYLE) / math.sqrt(5)  # closer to the narrow one, which it does not reach
    units = np.stack([BEHAVIOR, STYLE, between, np.zeros(WIDTH, np.float32), -BEHAVIOR])
    assert assign(units, [wide, narrow]).tolist() == [0, 1, 0, -1, -1]
    assert assign(units, []).tolist() == [-1] * 5


def test_a_cluster_around_its_members(rng: np.random.Generator) -> None:
    members = unit_rows(3 * BEHAVIOR + 0.5 * rng.standard_normal((400, WIDTH)))
    one = WatchedCluster.around(members, name="c")
    assert one is not None
    assert (members @ one.direction < one.threshold).mean() == pytest.approx(0.05, abs=0.005)
    scattered = WatchedCluster.around(unit_rows(rng.standard_normal((400, WIDTH))), name="c")
    assert scattered is not None and scattered.threshold == LEAST_COSINE
    assert WatchedCluster.around(np.stack([BEHAVIOR, -BEHAVIOR]), name="c") is None


def test_rows_that_could_not_be_read_have_no_direction() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]], np.float32)
    assert np.allclose(unit_rows(rows), [[0.6, 0.8], [0, 0], [0, 0], [0, 0]])
