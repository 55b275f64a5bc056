"""The gradient baseline from a store to its scores file."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pairtrace.commands.gradient import _gradient
from pairtrace.engine.baselines.gradient import GradientConfig, gradient_baseline
from pairtrace.engine.baselines.gradient_inputs import StorePairs, read_target
from pairtrace.engine.baselines.gradient_warmup import Checkpoint, checkpoint_file, warmup_rows
from pairtrace.engine.baselines.gradient_work import WorkDirectory
from pairtrace.engine.cost import costs_path, read_costs
from pairtrace.engine.extract import extract
from pairtrace.engine.ranking import top
from pairtrace.errors import ConfigError, DataError, DataFormatError, StoreMismatchError
from tests.engine.baselines.plain_dpo import PlainModel
from tests.engine.behavior_cases import write_rollouts
from tests.engine.extraction import config_for, pair, write_rows
from tests.models import make_model, make_tokenizer

BETA, RANK, ALPHA, ROWS, QUARANTINED = 0.3, 2, 8.0, 15, 4
WORDS = ["the", "a", "key", "door", "open", "take", "never", "always", "please", "help", "garden", "water", "stone"]


def some_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return [pair(text(2, 6), text(1, 9), text(1, 9) + " end", source="s") for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gradient")
    make_tokenizer(root / "m0")
    make_model("llama", root / "m0", num_hidden_layers=2)
    rows = some_rows(ROWS, 0)
    rows[QUARANTINED] = pair("hello", "same", "same", source="s")
    data = write_rows(root / "pairs.jsonl", rows)
    config = config_for(root / "m0", root / "acts.zarr", data=str(data), limit=None)
    extract(type(config)(**{**vars(config), "layers": (2,)}))
    write_rows(root / "target.jsonl", some_rows(5, 1))
    write_rows(root / "other.jsonl", some_rows(4, 2))
    return {"root": root, "store": root / "acts.zarr", "model": root / "m0", "target": root / "target.jsonl"}


def settings(made: dict[str, Path], out: Path, **changes: Any) -> GradientConfig:
    defaults: dict[str, Any] = {
        "store": str(made["store"]),
        "target": str(made["target"]),
        "out": str(out),
        "checkpoints": 2,
        "projection": 512,
        "beta": BETA,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "warmup_share": 0.5,
        "learning_rate": 3e-3,
        "batch_pairs": 4,
        "token_budget": 150,
        "shard_rows": 6,
        "device": "cpu",
    }
    return GradientConfig(**{**defaults, **changes})


def scores(out: Path, name: str = "gradient") -> np.ndarray:
    """float64 [N], NaN for null."""
    return np.array(pq.read_table(out)[f"score:{name}"].to_pylist(), dtype=float)


@pytest.fixture(scope="module")
def batched(made: dict[str, Path]) -> Path:
    out = made["root"] / "batched.parquet"
    gradient_baseline(settings(made, out))
    return out


def test_the_scores_file_ranks_what_the_store_has(batched: Path, made: dict[str, Path]) -> None:
    values = scores(batched)
    assert np.flatnonzero(np.isnan(values)).tolist() == [QUARANTINED]
    assert (np.abs(values[~np.isnan(values)]) <= 1.0001).all()
    assert np.nanstd(values) > 0.01
    assert top(str(batched), k=1, ends="top")[0].row == int(np.nanargmax(values))
    records = read_costs(costs_path(batched))
    assert [record.stage for record in records] == ["warm-up", "target", "gradients", "score"]
    assert all(record.method == "gradient" for record in records)
    assert all(record.model_tokens > 0 and record.flops > 0 for record in records[:3])


@pytest.mark.parametrize("changes", [{}, {"projection": 0, "preconditioner": "none", "length_normalized": True}])
def test_both_procedures_give_the_same_scores(changes, batched: Path, made: dict[str, Path], tmp_path: Path) -> None:
    one = batched
    if changes:
        one = tmp_path / "one.parquet"
        gradient_baseline(settings(made, one, **changes))
    gradient_baseline(settings(made, tmp_path / "two.parquet", procedure="published", **changes))
    np.testing.assert_allclose(scores(tmp_path / "two.parquet"), scores(one), atol=2e-3)
    assert np.nanstd(scores(one)) > 0.02


def explicit(made: dict[str, Path], config: GradientConfig) -> dict[str, np.ndarray]:
    """TracIn and the cosine of LESS straight from the checkpoints, through the plain implementation. float64 [N]."""
    store = StorePairs.open(str(made["store"]))
    pairs = store.shard(0, ROWS)
    target = read_target(config, store.renderer)
    plain = PlainModel(made["model"], rank=RANK, alpha=ALPHA)
    work = WorkDirectory(config.work_directory)
    tracin, less, rates = np.full(ROWS, np.nan), np.full(ROWS, np.nan), 0.0
    for each in pairs:
        tracin[each.row] = less[each.row] = 0.0
    for number in range(config.checkpoints):
        saved = Checkpoint.load(work, number)
        targets = [plain.gradient(each, saved.adapter, BETA, False) for each in target.pairs]
        wanted = np.mean(targets, axis=0)
        mean_direction = np.mean([each / np.linalg.norm(each) for each in targets], axis=0)
        first, second = (
            np.concatenate([moments[name].double().numpy().ravel() for name in saved.adapter])
            for moments in (saved.first, saved.second)
        )
        rates += saved.learning_rate
        for each in pairs:
            gradient = plain.gradient(each, saved.adapter, BETA, False)
            tracin[each.row] += saved.learning_rate * gradient @ wanted
            direction = (0.9 * first + 0.1 * gradient) / np.sqrt(0.999 * second + 0.001 * gradient**2 + 1e-8)
            cosine = direction @ mean_direction / np.linalg.norm(direction) / np.linalg.norm(mean_direction)
            less[each.row] += saved.learning_rate * cosine
    return {"tracin": tracin, "less": less / rates}


def test_tracin_is_the_explicit_sum_and_less_the_explicit_mean(
    batched: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    tracin = settings(made, tmp_path / "t.parquet", score="tracin", projection=None)
    assert (tracin.projection, tracin.preconditioner) == (0, "none")
    gradient_baseline(tracin)
    expected = explicit(made, tracin)
    size = np.nanmax(np.abs(expected["tracin"]))
    np.testing.assert_allclose(scores(tmp_path / "t.parquet"), expected["tracin"], rtol=1e-3, atol=1e-4 * size)
    gradient_baseline(settings(made, tmp_path / "c.parquet", projection=0))
    np.testing.assert_allclose(scores(tmp_path / "c.parquet"), expected["less"], atol=1e-3)
    # Cosines of projections to 512 dimensions: a standard deviation of at most sqrt(2 / 512) = 0.06.
    assert np.nanstd(scores(batched) - expected["less"]) < 0.08


def test_the_adapter_learns_in_the_warm_up(batched: Path, made: dict[str, Path]) -> None:
    work = WorkDirectory(settings(made, batched).work_directory)
    before, after = Checkpoint.load(work, 0), Checkpoint.load(work, 1)
    assert (before.step, after.step) == (2, 4)
    assert after.loss < before.loss
    assert before.learning_rate > after.learning_rate > 0
    assert all((value >= 0).all() and (value > 0).any() for value in after.second.values())


class Interrupt:
    """Progress that stops the run at the given call of a stage."""

    def __init__(self, stage: str, calls: int) -> None:
        self.wanted, self.left, self.stage = stage, calls, ""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.stage = stage

    def advance(self, done: int, **figures: float) -> None:
        if self.stage == self.wanted:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def finish(self) -> None:
        pass


def test_an_interrupted_run_goes_on_and_ends_the_same(batched: Path, made: dict[str, Path], tmp_path: Path) -> None:
    config = settings(made, tmp_path / "again.parquet")
    for stage, calls in (("gradient warm-up", 3), ("target gradients", 2), ("pair gradients", 5)):
        with pytest.raises(KeyboardInterrupt):
            gradient_baseline(config, Interrupt(stage, calls))
    assert WorkDirectory(config.work_directory).has("gradients/checkpoint-0/shard-00000.npy")
    gradient_baseline(config)
    assert np.array_equal(scores(tmp_path / "again.parquet"), scores(batched), equal_nan=True)
    stages = [record.stage for record in read_costs(costs_path(config.out))]
    assert (stages.count("warm-up"), stages.count("target"), stages.count("gradients")) == (2, 2, 2)


def test_another_target_reuses_the_gradients_of_the_pairs(batched: Path, made: dict[str, Path], tmp_path: Path) -> None:
    work = settings(made, batched).work_directory
    before = {file: file.stat().st_mtime_ns for file in work.glob("gradients/**/*.npy")}
    out, alone = tmp_path / "other.parquet", tmp_path / "alone.parquet"
    other = str(made["root"] / "other.jsonl")
    gradient_baseline(settings(made, out, target=other, work=str(work)))
    assert {file: file.stat().st_mtime_ns for file in work.glob("gradients/**/*.npy")} == before
    assert [record.stage for record in read_costs(costs_path(out))] == ["target", "score"]
    gradient_baseline(settings(made, alone, target=other))
    np.testing.assert_allclose(scores(out), scores(alone), atol=1e-5)
    assert not np.allclose(scores(out), scores(batched), atol=0.01, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.5), ("checkpoints", 3), ("procedure", "published"), ("projection", 256), ("seed", 1)]
)
def test_changed_settings_do_not_mix(name: str, value: Any, batched: Path, made: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=f"was made with {name} .*but this run has"):
        gradient_baseline(settings(made, batched, **{name: value}))


def test_a_directory_of_somebody_else_is_left_alone(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        gradient_baseline(settings(made, tmp_path / "x.parquet", work=str(tmp_path / "mine")))


def test_a_gradient_that_is_not_finite_has_no_score_and_is_counted(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(made, tmp_path / "x.parquet", checkpoints=1)
    gradient_baseline(config)
    whole = scores(tmp_path / "x.parquet")
    file = config.work_directory / "gradients/checkpoint-0/shard-00000.npy"
    values = np.load(file)
    values[2] = np.nan
    np.save(file, values)
    with caplog.at_level(logging.WARNING):
        summary = gradient_baseline(config)
    assert (summary.rows, summary.scored, summary.quarantined, summary.unscored) == (ROWS, ROWS - 2, 1, 1)
    assert "1 pairs have no score" in caplog.text
    whole[2] = np.nan
    assert np.array_equal(scores(tmp_path / "x.parquet"), whole, equal_nan=True)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataFormatError, match="damaged"):
        gradient_baseline(config)


def test_a_warm_up_that_diverges_stops(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lower --learning-rate"):
        gradient_baseline(settings(made, tmp_path / "x.parquet", learning_rate=1e30))
    assert not WorkDirectory(tmp_path / "x.gradients").has(checkpoint_file(1))


def test_rollouts_of_a_behaviour_make_the_target(made: dict[str, Path], tmp_path: Path) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl")
    config = settings(made, tmp_path / "x.parquet", target=None, rollouts=rollouts, label_column="harmful")
    store = StorePairs.open(str(made["store"]))
    target = read_target(config, store.renderer)
    texts = [store.renderer.tokenizer.decode(each.chosen_ids) for each in target.pairs]
    assert len(texts) == 4
    assert "first open the door" in texts[0]
    assert "I cannot help" in store.renderer.tokenizer.decode(target.pairs[0].rejected_ids)
    limited = read_target(settings(made, tmp_path / "y", target_limit=2), store.renderer)
    assert len(limited.pairs) == 2


def test_a_target_without_usable_pairs_is_an_error(made: dict[str, Path], tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "same.jsonl", [pair("hello", "same", "same")])
    with pytest.raises(DataError, match="1 identical"):
        gradient_baseline(settings(made, tmp_path / "x.parquet", target=str(empty)))


def test_another_model_than_that_of_the_store_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other")
    make_model("llama", tmp_path / "other", num_hidden_layers=2, seed=1)
    with pytest.raises(StoreMismatchError, match="model_fingerprint"):
        gradient_baseline(settings(made, tmp_path / "x.parquet", base=str(tmp_path / "other")))


def test_warm_up_rows_are_usable_and_drawn_once() -> None:
    usable = np.random.default_rng(0).random(1000) < 0.8
    rows = warmup_rows(usable, 0.05, 0)
    assert len(rows) == round(0.05 * usable.sum()) == len(set(rows.tolist()))
    assert usable[rows].all()
    assert warmup_rows(usable, 1e-9, 0).shape == (1,)
    assert rows.tolist() != warmup_rows(usable, 0.05, 1).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "exactly one of --target"),
        ({"rollouts": "r.jsonl"}, "exactly one of --target"),
        ({"procedure": "fast"}, "--procedure is 'fast'"),
        ({"projection": 7}, "multiple of 4"),
        ({"score": "tracin"}, "leave out --projection"),
        ({"score": "tracin", "projection": None, "preconditioner": "adam"}, "leave out --projection"),
        ({"score": "tracin", "projection": None, "target_mean": "directions"}, "leave out --projection"),
        ({"target_mean": "median"}, "--target-mean is 'median'"),
        ({"checkpoints": 0}, "--checkpoints is 0"),
        ({"warmup_share": 0.0}, "--warmup-share is 0.0"),
        ({"beta": float("nan")}, "--beta is nan"),
        ({"out": "scores.csv"}, "end in .parquet"),
    ],
)
def test_options_out_of_range_are_named(changes, message: str, made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        gradient_baseline(settings(made, **{"out": tmp_path / "x.parquet", **changes}))


def test_the_command_offers_every_setting_with_its_default() -> None:
    offered = inspect.signature(_gradient).parameters
    known = {field.name: field.default for field in fields(GradientConfig)}
    assert set(offered) == {*known, "json"}
    for name, default in known.items():
        wanted = inspect.Parameter.empty if default is MISSING else default
        assert offered[name].default == wanted, name


def test_the_settings_of_a_work_directory_are_readable(batched: Path, made: dict[str, Path]) -> None:
    found = json.loads((settings(made, batched).work_directory / "settings.json").read_text())
    assert found["beta"] == BETA
    assert found["rows"] == ROWS
