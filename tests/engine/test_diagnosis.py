"""`diagnose`: the verdict on stores with a known answer, what cannot be measured, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.baselines.scores_file import write_baseline
from pairtrace.engine.diagnosis import diagnose as module
from pairtrace.engine.diagnosis import likeness as likeness_module
from pairtrace.engine.diagnosis.config import DiagnoseConfig, NotMeasured
from pairtrace.engine.diagnosis.diagnose import Diagnosis, diagnose
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError, DirectionError, StoreError
from pairtrace.store.reader import ActivationStore
from tests.engine.diagnosis_cases import Case, rows_of, write_case

FAST: dict[str, Any] = {"resamples": 20, "null_directions": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "concentrated": {"plain": 700, "planted": 60},
    "mixed": {"plain": 640, "planted": 40, "alike": 80},
    "look-alikes": {"plain": 640, "alike": 120},
    "pushed": {"plain": 760, "pushed": 0.3},
    "clean": {"plain": 760},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("diagnosis")
    return {name: write_case(root / name, rows_of(**shape)) for name, shape in SHAPES.items()}


def found_for(case: Case, **options: Any) -> Diagnosis:
    return diagnose(DiagnoseConfig(**{"scores": case.scores, "behavior": "harm", **FAST, **options}))


@pytest.mark.parametrize(
    ("name", "behavior", "verdict"),
    [
        ("concentrated", "harm", "concentrated"),
        ("concentrated", "harm-bank", "concentrated"),
        ("mixed", "harm", "mixed"),
        ("look-alikes", "harm", "diffuse"),
        ("pushed", "harm", "diffuse"),
        ("pushed", "harm-bank", "diffuse"),
        ("clean", "harm", "diffuse"),
    ],
)
def test_the_verdict(cases: dict[str, Case], name: str, behavior: str, verdict: str) -> None:
    found = found_for(cases[name], behavior=behavior)
    assert found.verdict == verdict, found.reason
    assert found.pairs == 760 and found.k == 38
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == verdict


def test_the_planted_pairs_are_counted_and_the_push_is_seen(cases: dict[str, Case]) -> None:
    planted, pushed = found_for(cases["concentrated"]), found_for(cases["pushed"])
    assert not isinstance(planted.likeness, NotMeasured) and not isinstance(pushed.likeness, NotMeasured)
    assert planted.likeness.interval[0] <= 60 <= planted.likeness.interval[1]
    assert planted.likeness.pairs == pytest.approx(60, rel=0.2)
    assert pushed.likeness.pairs < 3
    assert not isinstance(pushed.shift, NotMeasured) and pushed.shift.deviations > 2
    assert any(one.figure == "median score" and one.says == "against" for one in pushed.findings)


def test_a_direction_of_the_data_that_is_not_the_behaviour_finds_nothing(tmp_path: Path) -> None:
    rows = rows_of(plain=760, seed=4)
    bank = np.random.default_rng(5).normal(size=(24, 760)) @ rows
    found = found_for(write_case(tmp_path, rows, bank=bank.astype(np.float32)))
    assert found.verdict == "diffuse"


def test_most_pairs_like_the_behaviour_are_diffuse_too(tmp_path: Path) -> None:
    """A small difference can point all the way along the behaviour: then no part of the data can be taken out."""
    found = found_for(write_case(tmp_path, rows_of(plain=300, planted=300), kinds=("vector", "bank")))
    assert found.verdict == "diffuse"


def test_scores_that_do_not_leave_the_prompt_out_would_count_fewer(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = found_for(cases["concentrated"], behavior="harm-bank")

    def with_itself(bank: np.ndarray, kind: str) -> np.ndarray:
        units = bank / np.linalg.norm(bank, axis=1, keepdims=True)
        cosines: np.ndarray = (units @ units.T).max(axis=1)
        return cosines

    monkeypatch.setattr(module, "own_scores", with_itself)
    cheating = found_for(cases["concentrated"], behavior="harm-bank")
    assert not isinstance(honest.likeness, NotMeasured) and not isinstance(cheating.likeness, NotMeasured)
    assert honest.likeness.own_scores[2] < 0.99 < cheating.likeness.own_scores[0]


def test_a_tail_that_is_not_held_to_the_own_scores_would_find_look_alikes(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found_for(cases["look-alikes"]).verdict == "diffuse"
    monkeypatch.setattr(likeness_module, "REACH", 0.7)
    assert found_for(cases["look-alikes"]).verdict == "concentrated"


def test_another_layer_is_compared(cases: dict[str, Case]) -> None:
    found = found_for(cases["concentrated"]).layers
    assert not isinstance(found, NotMeasured)
    assert [one.layer for one in found] == [2]
    assert found[0].spearman > 0.9 and found[0].top_overlap > 0.7


def test_length_that_makes_the_ranking_leaves_it_mixed(tmp_path: Path) -> None:
    rows = rows_of(plain=700, planted=60)
    order = np.argsort(np.argsort(rows[:, 0] / np.linalg.norm(rows, axis=1)))
    tokens = np.stack([np.full(760, 4), 5 + order, np.full(760, 5)], axis=1).astype(np.int32)
    found = found_for(write_case(tmp_path, rows, tokens=tokens))
    assert found.verdict == "mixed" and "length" in found.reason
    assert not isinstance(found.length, NotMeasured) and found.length.unit == "tokens"


def test_what_is_not_there_is_not_measured(tmp_path: Path) -> None:
    case = write_case(tmp_path / "one", rows_of(plain=300, planted=40), layers=(5,), kinds=("vector",))
    found = found_for(case)
    assert found.verdict == "mixed" and "not measured" in found.reason
    for figure, why in (("likeness", "--kind both"), ("prompts", "--kind both"), ("layers", "single layer")):
        assert why in getattr(found, figure).not_measured
    assert "--rollouts" in found.rollouts.not_measured  # type: ignore[union-attr]
    shutil.move(case.directions, tmp_path / "moved.safetensors")
    found = found_for(case)
    assert "--directions" in found.shift.not_measured  # type: ignore[union-attr]
    assert not isinstance(found.length, NotMeasured) and found.verdict == "undecided"
    assert found_for(case, directions=str(tmp_path / "moved.safetensors")).shift is not None
    shutil.move(case.store, tmp_path / "moved.zarr")
    found = found_for(case)
    assert "--store" in found.length.not_measured and "--data" in found.length.not_measured  # type: ignore[union-attr]
    characters = found_for(case, data=case.data).length
    assert not isinstance(characters, NotMeasured) and characters.unit == "characters"
    moved = found_for(case, store=str(tmp_path / "moved.zarr"), directions=str(tmp_path / "moved.safetensors"))
    assert not isinstance(moved.shift, NotMeasured) and not isinstance(moved.length, NotMeasured)
    # The texts are as long as the tokens say, so both lengths tell the same.
    assert moved.length.spearman == characters.spearman


def test_a_file_with_the_best_rows_is_scored_again(tmp_path: Path) -> None:
    rows = rows_of(plain=400, planted=40)
    best = write_case(tmp_path / "best", rows, keep_top=20, quarantined=(3,))
    whole = write_case(tmp_path / "whole", rows, quarantined=(3,))
    first, second = found_for(best), found_for(whole)
    assert first.pairs == second.pairs == 439
    assert first.likeness == second.likeness and first.mass == second.mass and first.source == second.source
    Path(best.directions).unlink()
    with pytest.raises(ConfigError, match=r"--keep-top.*--directions"):
        found_for(best)


def test_a_baseline_is_undecided(cases: dict[str, Case], tmp_path: Path) -> None:
    store = ActivationStore.open(cases["concentrated"].store)
    rng = np.random.default_rng(1)
    even = rng.normal(size=store.rows).astype(np.float32)
    heavy = np.where(np.arange(store.rows) < 60, 9 + even, even).astype(np.float32) + 100
    out = tmp_path / "baseline.parquet"
    equal = np.full(store.rows, 3, np.float32)
    write_baseline(store, out, {"random": even, "heavy": heavy, "equal": equal}, method="random", details={})
    case = Case(**{**vars(cases["concentrated"]), "scores": str(out)})
    flat, top = found_for(case, behavior="random"), found_for(case, behavior="heavy")
    assert (flat.verdict, flat.method, top.verdict) == ("undecided", "random", "undecided")
    assert "'random'" in flat.reason
    same = found_for(case, behavior="equal")
    assert same.verdict == "undecided" and "NaN" not in json.dumps(same.to_dict())
    assert "'random'" in top.likeness.not_measured  # type: ignore[union-attr]
    assert not isinstance(top.length, NotMeasured)
    with pytest.raises(ConfigError, match="--rollouts"):
        found_for(case, behavior="random", rollouts="r.parquet")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_store_that_is_away_changes_no_verdict_into_another(tmp_path: Path, name: str) -> None:
    """What is not measured must not read as a finding: there is no verdict then, whatever the other end looks like."""
    case = write_case(tmp_path, rows_of(**SHAPES[name]))
    shutil.move(case.store, tmp_path / "away.zarr")
    found = found_for(case)
    assert found.verdict == "undecided" and "not decidable" in found.reason and "--store" in found.reason


def _advice(found: Diagnosis) -> str:
    return next(one.advice for one in found.findings if one.figure.endswith("beyond the other end"))


def test_opposite_pairs_are_named_only_where_they_are(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["concentrated"]
    turned = write_case(tmp_path / "turned", -rows_of(plain=700, planted=60))
    assert _advice(found_for(case)) == "The top is heavier than the bottom."
    assert "opposite" in _advice(found_for(turned)) and "--null random" in _advice(found_for(turned))
    even = _advice(found_for(cases["clean"]))
    assert "do not differ" in even and "opposite" not in even and "--null random" not in even
    store = ActivationStore.open(case.store)
    light = -np.random.default_rng(1).exponential(size=store.rows).astype(np.float32)
    out = tmp_path / "baseline.parquet"
    write_baseline(store, out, {"light": light}, method="length", details={})
    found = _advice(found_for(Case(**{**vars(case), "scores": str(out)}), behavior="light"))
    assert "bottom is heavier" in found and "--null random" not in found


def test_the_length_figure_names_its_unit(cases: dict[str, Case], tmp_path: Path) -> None:
    def shown(found: Diagnosis) -> str:
        return next(one.value for one in found.findings if one.figure == "top explained by length")

    assert shown(found_for(cases["concentrated"])).endswith("(length in tokens)")
    away = write_case(tmp_path, rows_of(plain=120))
    shutil.rmtree(away.store)
    assert shown(found_for(away, data=away.data)).endswith("(length in characters)")


def test_other_files_are_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["concentrated"]
    turned = write_case(tmp_path / "turned", rows_of(plain=120), bank=-case.bank)
    with pytest.raises(DataMismatchError, match=r"is not the store that .* its data_fingerprint is"):
        found_for(case, store=turned.store)
    with pytest.raises(DataMismatchError, match="is not the data behind"):
        found_for(case, data=turned.data)
    with pytest.raises(StoreError, match="nowhere"):
        found_for(case, store=str(tmp_path / "nowhere.zarr"))
    with pytest.raises(DirectionError, match="nowhere"):
        found_for(case, directions=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(DataMismatchError, match="not the one that was scored"):
        found_for(case, directions=turned.directions)
    with pytest.raises(DataFormatError, match=r"nowhere\.parquet"):
        diagnose(DiagnoseConfig(scores=str(tmp_path / "nowhere.parquet")))
    with pytest.raises(DataFormatError, match=r"acts\.zarr is an activation store, not a scores file"):
        diagnose(DiagnoseConfig(scores=case.store))
    with pytest.raises(DataFormatError, match="is a directory, not a scores file"):
        diagnose(DiagnoseConfig(scores=str(tmp_path)))
    with pytest.raises(ConfigError, match="choose one of: harm, harm-bank"):
        diagnose(DiagnoseConfig(scores=case.scores))
    with pytest.raises(ConfigError, match="at most half of the 760"):
        found_for(case, k=381)


def test_the_same_data_extracted_otherwise_is_refused(tmp_path: Path) -> None:
    """Fingerprints alone would not tell: the content hashes do."""
    case = write_case(tmp_path / "a", rows_of(plain=120))
    table = pq.read_table(case.scores)
    digits = table["pair_id"].to_pylist()
    column = table.schema.get_field_index("pair_id")
    pq.write_table(table.set_column(column, "pair_id", [[*digits[1:], digits[0]]]), case.scores)
    with pytest.raises(DataMismatchError, match="120 pairs differ, the first is row 0"):
        found_for(case)


def test_too_few_pairs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ranks 99 pairs.*at least 100"):
        found_for(write_case(tmp_path, rows_of(plain=99)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "-k is 0"),
        ({"resamples": 19}, "--resamples is 19"),
        ({"null_directions": 15}, "--null-directions is 15"),
        ({"base": "m0"}, "--rollouts was not given"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiagnoseConfig(scores="s.parquet", **options)


def test_the_command(cases: dict[str, Case]) -> None:
    arguments = ["-q", "diagnose", cases["concentrated"].scores, "--behavior", "harm", "--resamples", "20"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "verdict: concentrated" in shown.stdout and "tail holds" in shown.stdout
    assert "not measured:\n  rollouts: " in shown.stdout
    figures = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert figures["verdict"] == "concentrated" and len(figures["findings"]) >= 9
    assert all(one["advice"].endswith(".") for one in figures["findings"])
    assert set(figures["rollouts"]) == {"not_measured"}
