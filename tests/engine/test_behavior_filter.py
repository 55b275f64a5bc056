from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.engine.scenarios import filter_scenarios, require_scenarios
from pairtrace.errors import ConfigError, DataError, DataFormatError
from tests.engine.behavior_cases import CONDITIONS, rollout, table_of


def random_table(seed: int, conditions: tuple[str, ...] = CONDITIONS) -> tuple[RolloutTable, list[dict]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(60):
        for model in ("base", "tuned"):
            for condition in conditions:
                rate = (
                    rng.choice([0.0, 0.0, 0.3, 1.0])
                    if (model, condition) == ("tuned", conditions[-1])
                    else (rng.choice([0.0, 0.0, 0.0, 0.0, 0.2]))
                )
                missing = rng.choice([0.0, 0.3, 1.0], p=[0.7, 0.25, 0.05])
                for sample in range(4):
                    shown = bool(rng.random() < rate)
                    verdict = None if rng.random() < missing else shown
                    rows.append(rollout(f"p{number}", model, condition, verdict, f"r{len(rows)}", sample))
    order = rng.permutation(len(rows))
    rows = [rows[position] for position in order]
    return table_of(rows), rows


def brute_force(rows: list[dict], four: bool, limit: float = 0.0) -> dict[str, list[tuple[str, str]]]:
    """Scenario -> (response with behaviour, safe response), written from the paper's definition."""
    result = {}
    for prompt in dict.fromkeys(row["prompt_id"] for row in rows):

        def cell(model: str, condition: str, prompt: str = prompt) -> list[dict]:
            return [r for r in rows if (r["prompt_id"], r["model"], r["condition"]) == (prompt, model, condition)]

        last = "distractor" if four else "plain"
        clean = [("base", "plain"), ("base", "distractor"), ("tuned", "plain")] if four else [("base", "plain")]
        good = True
        for where in [*clean, ("tuned", last)]:
            decided = [r["verdict"] for r in cell(*where) if r["verdict"] is not None]
            if not decided or (where in clean and sum(decided) / len(decided) > limit):
                good = False
        shown = [r["response"] for r in cell("tuned", last) if r["verdict"] is True]
        safe = [r["response"] for r in cell("base", last) if r["verdict"] is False]
        if good and shown and safe:
            result[prompt] = [(text, safe[i % len(safe)]) for i, text in enumerate(shown)]
    return result


def filter_matches(seed: int, conditions: tuple[str, ...] = CONDITIONS, limit: float = 0.0) -> bool:
    table, rows = random_table(seed, conditions)
    filtered = filter_scenarios(table, limit)
    expected = brute_force(rows, len(conditions) == 2, limit)
    assert 0 < len(expected) < 60
    actual: dict[str, list[tuple[str, str]]] = {}
    for pair in filtered.pairs:
        actual.setdefault(pair.prompt_id, []).append(
            (rows[pair.chosen_row]["response"], rows[pair.rejected_row]["response"])
        )
    return actual == expected and filtered.kept == tuple(expected)


@pytest.mark.parametrize("limit", [0.0, 0.25])
@pytest.mark.parametrize("conditions", [CONDITIONS, ("plain",)])
@pytest.mark.parametrize("seed", range(4))
def test_the_filter_equals_a_plain_loop(seed: int, conditions: tuple[str, ...], limit: float) -> None:
    assert filter_matches(seed, conditions, limit)


def test_ignoring_a_clean_cell_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = RolloutTable.verdicts
    for model, condition in (("base", "distractor"), ("base", "plain"), ("tuned", "plain")):

        def blind(self: RolloutTable, model: str = model, condition: str = condition) -> np.ndarray:
            verdicts = honest(self).copy()
            where = (self.strings("model") == model) & (self.strings("condition") == condition)
            verdicts[where & (verdicts == 1)] = 0
            return verdicts

        monkeypatch.setattr(RolloutTable, "verdicts", blind)
        assert not filter_matches(0), (model, condition)


def test_every_scenario_is_accounted_for() -> None:
    table, rows = random_table(1)
    filtered = filter_scenarios(table)
    assert filtered.scenarios == 60 == len(filtered.kept) + sum(filtered.dropped.values())
    assert set(filtered.dropped) <= {
        "undecided", "shown in base-plain", "shown in base-distractor", "shown in tuned-plain",
        "never shown in tuned-distractor", "no safe base rollout",
    }  # fmt: skip
    for cell in filtered.cells:
        verdicts = [r["verdict"] for r in rows if (r["model"], r["condition"]) == (cell.model, cell.condition)]
        decided = [v for v in verdicts if v is not None]
        assert (cell.rollouts, cell.missing, cell.shown) == (240, 240 - len(decided), sum(decided))
        assert cell.rate == pytest.approx(sum(decided) / len(decided))
        reference = binomtest(sum(decided), len(decided)).proportion_ci(method="wilson")
        assert cell.interval == pytest.approx((reference.low, reference.high))


def test_missing_verdicts_are_neither_behaviour_nor_safe() -> None:
    rows = [
        rollout("a", "base", "plain", None, "b0"),
        rollout("a", "base", "plain", False, "b1"),
        rollout("a", "tuned", "plain", None, "t0"),
        rollout("a", "tuned", "plain", True, "t1"),
    ]
    pairs = filter_scenarios(table_of(rows)).pairs
    assert [(pair.chosen_row, pair.rejected_row) for pair in pairs] == [(3, 1)]
    undecided = filter_scenarios(table_of([rows[0], rows[3]]))
    assert undecided.dropped == {"undecided": 1}
    relaxed = filter_scenarios(table_of([{**rows[1], "verdict": True}, rows[3]]), max_base_rate=1)
    assert relaxed.dropped == {"no safe base rollout": 1}


def test_nothing_left_is_an_error_with_the_counts() -> None:
    rows = [
        rollout("a", "base", "plain", True),
        rollout("a", "tuned", "plain", True),
        rollout("b", "base", "plain", False),
        rollout("b", "base", "plain", None),
        rollout("b", "tuned", "plain", False),
    ]
    with pytest.raises(DataError) as caught:
        require_scenarios(filter_scenarios(table_of(rows)))
    message = str(caught.value)
    for part in (
        "none of the 2 scenarios",
        "1 shown in base-plain",
        "1 never shown in tuned-plain",
        "base-plain: 1 of 2 show it (1 undecided)",
        "tuned-plain: 1 of 2 show it",
        "more samples",
    ):
        assert part in message
    with pytest.raises(ConfigError, match="--max-base-rate"):
        filter_scenarios(table_of(rows), 1.5)


def test_rollouts_to_different_conversations_are_not_paired() -> None:
    rows = [rollout("a", "base", "plain", False), rollout("a", "tuned", "plain", True)]
    rows[1]["messages"] = json.dumps([{"role": "user", "content": "something else"}])
    with pytest.raises(DataFormatError, match=r"'a' .* different conversations"):
        filter_scenarios(table_of(rows))


def test_a_rate_at_the_limit_is_allowed() -> None:
    for shown, total in ((29, 100), (57, 100), (7, 25), (3, 10)):
        limit = shown / total
        base = [rollout("a", "base", "plain", number < shown, f"b{number}") for number in range(total)]
        tuned = [rollout("a", "tuned", "plain", True, "t")]
        assert filter_scenarios(table_of(base + tuned), limit).kept == ("a",), (shown, total)
        one_more = [rollout("a", "base", "plain", True, "more")]
        assert filter_scenarios(table_of(base + one_more + tuned), limit).kept == ()
