"""The figures of `diagnose` against independent references: SciPy, plain loops, and counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pairtrace.engine.diagnosis import agreement as agreement_module
from pairtrace.engine.diagnosis.agreement import agreement, resampled_prompts, resampled_rollouts, stability
from pairtrace.engine.diagnosis.concentration import flipped_excess, mass, random_excess, shift
from pairtrace.engine.diagnosis.config import DiagnoseConfig, NotMeasured
from pairtrace.engine.diagnosis.confounding import length_confounding, source_confounding
from pairtrace.engine.diagnosis.diagnose import diagnose
from pairtrace.engine.diagnosis.likeness import NEAR_REACH, QUANTILES, REACH, likeness, own_scores
from pairtrace.engine.diagnosis.null import data_like, sample_units, sphere_like
from pairtrace.engine.diagnosis.rollout_vectors import rollout_vectors
from pairtrace.engine.diagnosis.sweep import Group, sweep, thinned
from pairtrace.engine.intervals import wilson_interval
from pairtrace.engine.progress import NULL_PROGRESS
from pairtrace.errors import DataMismatchError, DirectionError
from pairtrace.kernels.histogram import ScoreHistogram
from pairtrace.store.reader import ActivationStore
from tests.engine.behavior_cases import reference_vectors, two_models, write_rollouts
from tests.engine.diagnosis_cases import rows_of, write_case
from tests.engine.small_store import any_values, reference_cosine


def scores_of(seed: int, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, count).astype(np.float32)


def test_mass_by_pairwise_differences() -> None:
    scores = scores_of(0, 60)
    weights = np.maximum(scores.astype(np.float64), 0)
    found = mass(scores, 7)
    assert found.gini == pytest.approx(np.abs(weights[:, None] - weights[None]).mean() / (2 * weights.mean()))
    assert found.effective_pairs == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.top_share == pytest.approx(sorted(weights)[-7:] @ np.ones(7) / weights.sum())
    even = mass(np.full(50, 0.3, np.float32), 5)
    assert (even.effective_share, even.top_share) == (pytest.approx(1), pytest.approx(0.1))
    assert even.gini == pytest.approx(0, abs=1e-12)
    assert mass(np.full(50, -0.3, np.float32), 5).effective_pairs == 0


def test_excess_over_the_other_end() -> None:
    scores = np.array([0.9] * 30 + [0.1] * 50 + [-0.95] * 4 + [-0.1] * 20, np.float32)
    found = flipped_excess(scores, 20, centred=False)
    assert (found.pairs, found.expected, found.excess) == (30, 4, 26)
    assert found.interval == (
        pytest.approx(26 - 1.96 * 34**0.5, abs=1e-2),
        pytest.approx(26 + 1.96 * 34**0.5, abs=1e-2),
    )
    moved = flipped_excess(scores + np.float32(5), 20, centred=True)
    assert (moved.pairs, moved.expected) == (30, 4)
    # Zero is no evidence: a top that reaches below it is counted from the smallest positive score on.
    assert flipped_excess(scores, 90, centred=False).pairs == 80


def test_excess_over_random_directions_counts_each_of_them() -> None:
    rng = np.random.default_rng(2)
    chance = (0.2 * rng.normal(size=(1000, 30))).clip(-1, 1).astype(np.float32)
    histogram = ScoreHistogram(30)
    histogram.update(chance)
    scores = np.concatenate([0.2 * rng.normal(size=950), np.full(50, 0.9)]).astype(np.float32)
    found = random_excess(scores, "data-like", 0.01, histogram)
    assert found.threshold == pytest.approx(np.quantile(chance, 0.99), abs=2e-3)
    by_direction = (chance >= found.threshold).sum(axis=0)
    assert found.pairs == np.count_nonzero(scores >= found.threshold)
    assert found.expected == pytest.approx(by_direction.mean())
    low, high = np.quantile(by_direction, (0.025, 0.975))
    assert found.interval == (pytest.approx(found.pairs - high), pytest.approx(found.pairs - low))
    assert 50 <= found.pairs <= 75
    moved = shift(scores + 0.5, histogram)
    assert moved.chance == pytest.approx(np.sqrt(np.square(np.median(chance, axis=0)).mean()), abs=5e-4)
    assert moved.deviations == pytest.approx(np.median(scores + 0.5) / moved.chance)


@pytest.mark.parametrize("kind", ["vector", "bank"])
def test_own_scores_leave_the_prompt_out(kind: str) -> None:
    bank = any_values(3, 9, 6)
    expected = []
    for number, vector in enumerate(bank):
        others = np.delete(bank, number, axis=0)
        cosines = [reference_cosine(vector[None], other)[0] for other in others]
        expected.append(max(cosines) if kind == "bank" else reference_cosine(vector[None], others.mean(axis=0))[0])
    assert own_scores(bank, kind) == pytest.approx(expected, abs=1e-6)


def test_likeness_recovers_the_share_of_a_mixture() -> None:
    rng = np.random.default_rng(4)
    own = rng.normal(0.8, 0.04, 300)
    like = REACH * rng.normal(0.8, 0.04, 500)
    scores = np.concatenate([like, rng.normal(0, 0.15, 9500)]).astype(np.float32)
    found = likeness(scores, own, rng)
    counts = [np.count_nonzero(scores >= REACH * np.percentile(own, 100 * q)) / (1 - q) for q in QUANTILES]
    assert found.pairs == pytest.approx(min(counts))
    near = [np.count_nonzero(scores >= NEAR_REACH * np.percentile(own, 100 * q)) / (1 - q) for q in QUANTILES]
    assert found.hold == pytest.approx(min(counts) / min(near))
    assert found.interval[0] < found.pairs < found.interval[1] < found.interval[0] + 200
    assert found.pairs == pytest.approx(500, rel=0.15)
    flipped = likeness(-scores, own, rng)
    assert found.opposed < 5 and flipped.opposed == pytest.approx(found.pairs, rel=0.02)
    assert likeness(scores[500:], own, rng).pairs < 5


def test_length_against_scipy() -> None:
    rng = np.random.default_rng(5)
    scores, lengths = scores_of(5), rng.integers(-30, 30, 400)
    lengths = lengths - np.round(20 * scores).astype(np.int64)
    found = length_confounding(scores, lengths, 40, "tokens")
    reference = stats.spearmanr(scores, lengths)
    assert found.spearman == pytest.approx(reference.statistic)
    assert found.interval is not None and found.interval[0] < reference.statistic < found.interval[1]
    wide = stats.norm.interval(0.95, np.arctanh(reference.statistic), np.sqrt((1 + reference.statistic**2 / 2) / 397))
    assert found.interval == (pytest.approx(np.tanh(wide[0])), pytest.approx(np.tanh(wide[1])))
    top = np.argsort(-scores)[:40]
    assert (found.top_difference, found.unit) == (np.median(lengths[top]), "tokens")
    # The shortest ones, since the correlation is negative; ties at the edge broken at random, on average.
    overlaps = [
        len(np.intersect1d(top, np.lexsort((rng.random(400), lengths))[:40])) / 40 for _ in range(300)
    ]  # fmt: skip
    assert found.top_explained == pytest.approx((np.mean(overlaps) - 0.1) / 0.9, abs=0.02)
    assert length_confounding(scores, (1000 * scores).astype(np.int64), 40, "tokens").top_explained > 0.9
    assert length_confounding(scores, np.zeros(400, np.int64), 40, "tokens").spearman is None
    alone = [length_confounding(scores_of(s), scores_of(s + 99), 40, "tokens").top_explained for s in range(40)]
    assert abs(np.mean(alone)) < 0.05


def test_source_against_scipy() -> None:
    scores = scores_of(6)
    sources = np.array([("a", "b", "", "d")[row % 4] for row in range(400)], dtype=object)
    scores[sources == "b"] += 0.5
    found = source_confounding(scores, sources, 40)
    groups = [scores[sources == name].astype(np.float64) for name in ("a", "b", "", "d")]
    f = stats.f_oneway(*groups).statistic
    assert found.variance_between == pytest.approx(f * 3 / (f * 3 + 396), rel=1e-4)
    count = np.count_nonzero(sources[np.argsort(-scores)[:40]] == "b")
    assert (found.largest, found.sources) == ("b", 4)
    assert found.largest_share == count / 40 and found.largest_share_of_data == 0.25
    assert found.largest_share_interval == wilson_interval(count, 40)


def test_agreement_against_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    first = scores_of(7)
    second = first + 0.3 * scores_of(8)
    second[5] = np.nan
    both = np.delete(np.arange(400), 5)
    correlation, overlap = agreement(first, second, 30)
    assert correlation == pytest.approx(stats.spearmanr(first[both], second[both]).statistic)
    tops = [set(both[np.argsort(-values[both])[:30]]) for values in (first, second)]
    assert overlap == len(tops[0] & tops[1]) / 30
    columns = np.stack([first, second, scores_of(9), scores_of(10)], axis=1)
    compared: list[tuple[np.ndarray, np.ndarray]] = []
    honest = agreement_module.agreement

    def heard(one: np.ndarray, other: np.ndarray, k: int) -> tuple[float, float]:
        compared.append((one, other))
        return honest(one, other, k)

    monkeypatch.setattr(agreement_module, "agreement", heard)
    found = stability("prompts", 12, columns, 30)
    assert len(compared) == 2 and all((one[:4] != other[:4]).all() for one, other in compared)
    values = [overlap, agreement(columns[:, 2], columns[:, 3], 30)[1]]
    assert found.top_overlap.value == pytest.approx(np.median(values))
    assert (found.samples, found.drawn_from) == (4, 12)


def test_prompts_are_drawn_with_replacement() -> None:
    bank = any_values(11, 12, 5)
    draws = np.random.default_rng(3).integers(0, 12, (20, 12))
    vectors = resampled_prompts(bank, "vector", 20, np.random.default_rng(3))
    assert np.allclose(vectors.directions, [bank[draw].mean(axis=0) for draw in draws])
    banks = resampled_prompts(bank, "bank", 20, np.random.default_rng(3))
    assert [set(one) for one in banks.members] == [set(draw) for draw in draws]
    cosines = np.random.default_rng(4).normal(size=(7, 12)).astype(np.float32)
    assert np.array_equal(banks.reduce(cosines), np.stack([cosines[:, draw].max(axis=1) for draw in draws], axis=1))


def test_rollouts_are_drawn_within_their_prompt() -> None:
    # The prompt of a rollout is written into its vector: the draw may not mix prompts, nor change their weights.
    scenarios = np.array([2, 0, 1, 0, 2, 2, 0, 1, 1, 1])
    vectors = np.eye(3, dtype=np.float32)[scenarios] + 0.001 * any_values(12, 10, 3)
    found = resampled_rollouts(vectors, scenarios, "vector", 30, np.random.default_rng(0))
    assert np.allclose(found.directions, np.bincount(scenarios) / 10, atol=0.01)
    assert len(np.unique(found.directions, axis=0)) > 20
    banks = resampled_rollouts(vectors, scenarios, "bank", 30, np.random.default_rng(0))
    assert np.allclose(banks.directions.reshape(30, 3, 3), np.eye(3), atol=0.01)
    many = resampled_rollouts(
        any_values(13, 600, 3), np.arange(600), "bank", 30, np.random.default_rng(0)
    )  # fmt: skip
    assert len(many.members) == 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float32"])
def test_one_pass_scores_any_rows_with_all_behaviours(tmp_path: Path, dtype: str) -> None:
    if dtype == "bfloat16":
        from tests.engine.small_store import make_store

        small = make_store(tmp_path, rows=300, width=24, dtype=dtype)
        store, exact = ActivationStore.open(small.path), small.rows[5]
    else:
        rows = rows_of(plain=300)
        store = ActivationStore.open(write_case(tmp_path, rows, dtype=dtype).store)
        exact = rows
    width = exact.shape[1]
    vectors, banks = any_values(14, 5, width), any_values(15, 3, 4, width)
    groups = [Group.of_vectors(vectors), Group.of_banks(banks), Group.of_banks(banks, counted=True)]
    every = np.flatnonzero(store.status() == 1)
    for rows_wanted in (every, every[1::3]):
        found = sweep(store, 5, rows_wanted, groups, NULL_PROGRESS)
        values = exact[rows_wanted]
        tolerance = 0.02 if dtype == "int8" else 2e-3
        expected = np.stack([reference_cosine(values, one) for one in vectors], axis=1)
        assert np.allclose(found.scores[0], expected, atol=tolerance, equal_nan=True)
        largest = [np.max([reference_cosine(values, one) for one in bank], axis=0) for bank in banks]
        assert np.allclose(found.scores[1], np.stack(largest, axis=1), atol=tolerance, equal_nan=True)
        counted = found.histograms[2]
        assert counted is not None and found.scores[2].shape == (0, 3)
        scored = int(np.isfinite(found.scores[1][:, 0]).sum())
        assert counted.counts.sum(axis=1).tolist() == [scored] * 3
    assert len(thinned(np.arange(1001), most=100)) == 91 and len(thinned(np.arange(99), most=100)) == 99


def test_random_behaviours_have_the_geometry_of_the_behaviour_and_of_the_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    units = rng.normal(size=(2000, 16)) * np.linspace(3, 0.1, 16)
    units = (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float32)
    behavior = (np.eye(16)[:3] + 0.7).astype(np.float32)
    group = data_like(behavior, units, 300, rng)
    banks = group.directions.reshape(300, 3, 16)
    assert group.counted and len(group.members) == 300
    gram = np.mean([bank @ bank.T for bank in banks], axis=0)
    expected = behavior @ behavior.T / np.linalg.norm(behavior, axis=1)[:, None] / np.linalg.norm(behavior, axis=1)
    assert np.allclose(gram / gram[0, 0], expected, atol=0.15)
    covariance = np.cov(banks[:, 0].T, bias=True)
    assert np.corrcoef(np.diag(covariance), np.square(units).mean(axis=0))[0, 1] > 0.95
    assert len(sphere_like(np.tile(behavior, (200, 1)), 300, rng).members) == 16
    flat = np.var(sphere_like(behavior[:1], 300, rng).directions, axis=0)
    assert flat.max() / flat.min() < 2
    store = ActivationStore.open(write_case(tmp_path, rows_of(plain=150), quarantined=(4,)).store)
    sampled = sample_units(store, 5, np.array([3, 4, 5]), rng)
    assert len(sampled) == 2 and np.allclose(np.linalg.norm(sampled, axis=1), 1, atol=1e-3)


@pytest.fixture(scope="module")
def behavior(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from pairtrace.engine.behavior import BehaviorConfig, build_behavior

    root = tmp_path_factory.mktemp("rollouts")
    base, tuned = two_models(root)
    rollouts, out = write_rollouts(root / "rollouts.jsonl"), str(root / "harm.safetensors")
    build_behavior(
        BehaviorConfig(base=base, rollouts=rollouts, label_column="harmful", out=out, layers=(2,), device="cpu")
    )
    return {"base": base, "tuned": tuned, "rollouts": str(root / "harm.rollouts.parquet"), "directions": out}


def test_every_rollout_pair_has_a_vector(behavior: dict[str, str]) -> None:
    found = rollout_vectors(behavior["rollouts"], behavior["directions"], 2, None, "cpu", NULL_PROGRESS)
    reference = reference_vectors(behavior["base"])
    assert found.scenarios.tolist() == [0, 0, 0, 1]
    expected = np.stack([vectors[2] for name in ("a", "b") for vectors in reference[name]])
    assert np.abs(found.vectors - expected).max() / np.abs(expected).max() < 1e-5


def test_rollouts_of_another_model_or_behaviour_are_refused(behavior: dict[str, str], tmp_path: Path) -> None:
    arguments: list[Any] = [2, behavior["tuned"], "cpu", NULL_PROGRESS]
    with pytest.raises(DataMismatchError, match="--base"):
        rollout_vectors(behavior["rollouts"], behavior["directions"], *arguments)
    other = tmp_path / "other.jsonl"
    lines = [
        {"prompt_id": "z", "prompt": "z", "model": model, "sample": 0, "response": text, "verdict": verdict}
        for model, text, verdict in (("base", "No.", False), ("tuned", "Sure.", True))
    ]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataMismatchError, match="2 of its 2 prompts do not pass"):
        rollout_vectors(str(other), behavior["directions"], 2, None, "cpu", NULL_PROGRESS)
    case = write_case(tmp_path / "case", rows_of(plain=120))
    with pytest.raises(DirectionError, match="does not say how it was made"):
        diagnose(DiagnoseConfig(scores=case.scores, behavior="harm", rollouts=behavior["rollouts"], resamples=20))


def test_rollouts_are_resampled_where_they_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pairtrace.engine.diagnosis import rollout_vectors as module

    case = write_case(tmp_path, rows_of(plain=300, planted=40))
    noisy = np.repeat(case.bank, 3, axis=0) + 0.05 * any_values(16, 72, 32)
    single = module.RolloutVectors(vectors=noisy.astype(np.float32), scenarios=np.repeat(np.arange(24), 3))
    monkeypatch.setattr(module, "rollout_vectors", lambda *_: single)
    config = DiagnoseConfig(scores=case.scores, behavior="harm", rollouts="r.parquet", resamples=20, null_directions=16)
    found = diagnose(config).rollouts
    assert not isinstance(found, NotMeasured)
    assert (found.over, found.drawn_from, found.samples) == ("rollouts", 72, 20)
    assert found.spearman.value > 0.99 and found.top_overlap.low > 0.8
