from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from pairtrace.engine import score_blocks
from pairtrace.engine.convert import ConvertConfig, convert
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.engine.scores_writer import rank_rows
from pairtrace.errors import (
    ConfigError,
    DataFormatError,
    DirectionError,
    LayerError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
)
from tests.engine.small_store import MODEL, TEMPLATE, TOKENIZER, SmallStore, any_values, make_store, reference_cosine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"))


def behavior_file(
    path: Path, *directions: tuple[str, int, np.ndarray], model: str = MODEL, tokenizer: str | None = TOKENIZER
) -> str:
    made = [
        Direction(
            name=name,
            layer=layer,
            values=np.atleast_2d(values),
            kind="vector" if values.ndim == 1 else "bank",
            origin="test",
            model_fingerprint=model,
            tokenizer_fingerprint=tokenizer,
            template_fingerprint=TEMPLATE,
        )
        for name, layer, values in directions
    ]
    save_directions(path, made, {})
    return str(path)


def run(store: SmallStore, out: Path, *directions: str, **options: Any) -> tuple[Any, pd.DataFrame]:
    summary = score(ScoreConfig(store=store.path, directions=directions, out=str(out), **options))
    return summary, pq.read_table(out).to_pandas()


@pytest.mark.parametrize("codec", ["none", "zstd:1"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_scores_equal_the_definition_in_float64(tmp_path: Path, dtype: str, codec: str) -> None:
    store = make_store(tmp_path, dtype=dtype, codec=codec)
    vector, bank = any_values(1, 24), any_values(2, 5, 24)
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, vector), ("harm-bank", 5, bank))
    summary, frame = run(store, tmp_path / "s.parquet", file)
    expected = reference_cosine(store.rows[5], vector)
    each = np.stack([reference_cosine(store.rows[5], row) for row in bank])
    usable = (store.status == 1) & np.isfinite(expected)
    np.testing.assert_allclose(frame["score:harm"][usable], expected[usable], rtol=0, atol=2e-6)
    np.testing.assert_allclose(frame["score:harm-bank"][usable], each.max(axis=0)[usable], rtol=0, atol=2e-6)
    assert (each.max(axis=0)[usable] < 0).any(), "the data must hold rows whose maximum is negative"
    assert summary.layer == 5
    assert (summary.rows, summary.scored, summary.quarantined, summary.undefined, summary.missing) == (
        300, 297, 2, 1, 0,
    )  # fmt: skip
    described = {entry.name: entry for entry in summary.behaviors}
    assert described["harm"].top_row == int(np.nanargmax(np.where(usable, expected, np.nan)))
    assert described["harm"].mean == pytest.approx(expected[usable].mean(), abs=1e-6)
    assert described["harm-bank"].lowest == pytest.approx(each.max(axis=0)[usable].min(), abs=1e-6)


def test_a_bank_whose_maximum_starts_at_zero_would_be_noticed(
    store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = score_blocks.cosine_max
    monkeypatch.setattr(
        score_blocks, "cosine_max", lambda rows, bank, **options: np.maximum(honest(rows, bank, **options), 0)
    )
    bank = any_values(2, 5, 24)
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, bank))
    _, frame = run(store, tmp_path / "s.parquet", file)
    expected = np.stack([reference_cosine(store.rows[5], row) for row in bank]).max(axis=0)
    usable = (store.status == 1) & np.isfinite(expected)
    assert not np.allclose(frame["score:harm"][usable], expected[usable], rtol=0, atol=2e-6)


def test_quarantined_rows_are_null_and_zero_rows_are_nan(store: SmallStore, tmp_path: Path) -> None:
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    run(store, tmp_path / "s.parquet", file)
    column = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert column["row"] == list(range(300))
    assert [row for row, value in enumerate(column["score:harm"]) if value is None] == [7, 130]
    assert [row for row, value in enumerate(column["score:harm"]) if value is not None and np.isnan(value)] == [11]
    assert [row for row, value in enumerate(column["rank:harm"]) if value is None] == [7, 11, 130]
    assert [row for row, value in enumerate(column["percentile:harm"]) if value is None] == [7, 11, 130]
    assert column["source"] == store.sources
    assert all(len(value) == 32 and bytes.fromhex(value) for value in column["pair_id"])


def test_ranks_and_percentiles_equal_those_of_pandas(store: SmallStore, tmp_path: Path) -> None:
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 2, any_values(1, 24)))
    _, frame = run(store, tmp_path / "s.parquet", file, layer=2)
    expected = frame["score:harm"].rank(ascending=False, method="first")
    assert frame["rank:harm"].dropna().tolist() == expected.dropna().tolist()
    reference = frame["score:harm"].rank(ascending=True, pct=True) * 100
    np.testing.assert_allclose(frame["percentile:harm"].dropna(), reference.dropna(), rtol=1e-6)


def test_ties_go_by_row() -> None:
    scores = np.array([0.5, np.nan, 0.9, 0.5, -1, 0.9, 0.5], np.float32)
    assert rank_rows(scores).tolist() == [3, 0, 1, 4, 6, 2, 5]
    assert rank_rows(np.full(3, np.nan, np.float32)).tolist() == [0, 0, 0]
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 10_000, dtype=np.uint32).view(np.float32)
    signed_zeros = np.array([0.0, -0.0, 0.0, -1e-45, 1e-45, -0.0], np.float32)
    for many in (rng.integers(-2, 3, 10_000).astype(np.float32), any_bits[np.isfinite(any_bits)], signed_zeros):
        assert rank_rows(many).tolist() == pd.Series(many).rank(ascending=False, method="first").tolist()


def test_row_groups_do_not_change_the_file(store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    run(store, tmp_path / "one.parquet", file)
    monkeypatch.setattr("pairtrace.engine.scores_writer.ROW_GROUP", 37)
    run(store, tmp_path / "many.parquet", file)
    assert pq.ParquetFile(tmp_path / "many.parquet").num_row_groups == 9
    # NaN differs from itself in Table.equals: compare as bytes.
    one, many = (pq.read_table(tmp_path / f"{name}.parquet").to_pandas() for name in ("one", "many"))
    pd.testing.assert_frame_equal(one, many)


def test_the_manifest_names_store_directions_and_versions(store: SmallStore, tmp_path: Path) -> None:
    first = behavior_file(tmp_path / "a.safetensors", ("one", 5, any_values(1, 24)))
    second = behavior_file(tmp_path / "b.safetensors", ("two", 5, any_values(2, 3, 24)))
    run(store, tmp_path / "s.parquet", first, second)
    manifest = json.loads(pq.read_schema(tmp_path / "s.parquet").metadata[b"pairtrace"])
    assert manifest["store"] == store.path
    assert manifest["store_manifest"]["model_fingerprint"] == MODEL
    assert manifest["layer"] == 5
    assert [(d["name"], d["kind"], d["directions"], d["file"]) for d in manifest["directions"]] == [
        ("one", "vector", 1, first),
        ("two", "bank", 3, second),
    ]
    assert manifest["counts"]["undefined"] == 1
    assert "pairtrace" in manifest["versions"]
    table = ScoresTable.open(tmp_path / "s.parquet")
    assert table.behaviors == ("one", "two")
    assert table.choose("two") == "two"
    with pytest.raises(ConfigError, match=r"several behaviours are .* choose one of: one, two"):
        table.choose(None)
    with pytest.raises(ConfigError, match="'three' is not"):
        table.choose("three")


def test_the_layer_is_the_deepest_common_one(store: SmallStore, tmp_path: Path) -> None:
    both = behavior_file(tmp_path / "both.safetensors", ("x", 2, any_values(1, 24)), ("x", 5, any_values(2, 24)))
    low = behavior_file(tmp_path / "low.safetensors", ("y", 2, any_values(3, 24)))
    deep = behavior_file(tmp_path / "deep.safetensors", ("z", 9, any_values(3, 24)))
    np.save(tmp_path / "plain.npy", any_values(4, 24))
    plain = str(tmp_path / "plain.npy")
    assert run(store, tmp_path / "s.parquet", both)[0].layer == 5
    assert run(store, tmp_path / "s.parquet", both, low)[0].layer == 2
    # A plain array goes along with a file that says its layer, or with the layer given.
    summary, frame = run(store, tmp_path / "s.parquet", both, plain)
    assert summary.layer == 5
    usable = np.isfinite(frame["score:plain"])
    reference = reference_cosine(store.rows[5], any_values(4, 24))
    np.testing.assert_allclose(frame["score:plain"][usable], reference[usable], rtol=0, atol=2e-6)
    assert run(store, tmp_path / "s.parquet", plain, layer=2)[0].layer == 2
    with pytest.raises(LayerError, match="choose one with --layer"):
        run(store, tmp_path / "s.parquet", plain)
    with pytest.raises(LayerError, match=r"no layer is common .*\[2, 5\].*z in .*\[9\]"):
        run(store, tmp_path / "s.parquet", deep)
    with pytest.raises(LayerError, match=r"layer 9 is not in .* layers \[2, 5\]"):
        run(store, tmp_path / "s.parquet", deep, layer=9)
    with pytest.raises(LayerError, match="no layer 5 for y"):
        run(store, tmp_path / "s.parquet", low, layer=5)


def test_directions_that_do_not_fit_the_store_are_refused(store: SmallStore, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    narrow = behavior_file(tmp_path / "narrow.safetensors", ("x", 5, any_values(1, 23)))
    other = behavior_file(tmp_path / "other.safetensors", ("x", 5, any_values(1, 24)), model="f" * 64)
    good = behavior_file(tmp_path / "good.safetensors", ("x", 5, any_values(1, 24)))
    again = behavior_file(tmp_path / "again.safetensors", ("x", 5, any_values(2, 24)))
    with pytest.raises(DirectionError, match="width 23; expected 24"):
        run(store, out, narrow)
    with pytest.raises(DirectionError, match="f" * 64 + ".*" + MODEL):
        run(store, out, other)
    with pytest.raises(DirectionError, match=r"'x' is in .*good\.safetensors and in .*again\.safetensors"):
        run(store, out, good, again)
    with pytest.raises(ConfigError, match="no direction file"):
        run(store, out)
    with pytest.raises(ConfigError, match=r"--out is '.*s\.csv'; scores files are parquet"):
        run(store, tmp_path / "s.csv", good)
    foreign = behavior_file(tmp_path / "foreign.safetensors", ("x", 5, any_values(1, 24)), tokenizer="e" * 64)
    with pytest.raises(DirectionError, match="tokenizer with fingerprint " + "e" * 64 + ".*" + TOKENIZER):
        run(store, out, foreign)
    assert not out.exists()


def test_a_direction_that_does_not_name_its_tokenizer_is_taken(store: SmallStore, tmp_path: Path) -> None:
    silent = behavior_file(tmp_path / "silent.safetensors", ("x", 5, any_values(1, 24)), tokenizer=None)
    assert run(store, tmp_path / "s.parquet", silent)[0].scored == 297


def test_another_chat_template_is_reported(store: SmallStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Direction(
        name="x", layer=5, values=any_values(1, 1, 24), kind="vector", origin="t",
        model_fingerprint=MODEL, template_fingerprint="other",
    )  # fmt: skip
    save_directions(tmp_path / "x.safetensors", [made], {})
    run(store, tmp_path / "s.parquet", str(tmp_path / "x.safetensors"))
    assert "another chat template" in caplog.text


def test_incomplete_stores_are_refused_unless_allowed(tmp_path: Path) -> None:
    store = make_store(tmp_path, skip_shards=(1,))
    vector = any_values(1, 24)
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, vector))
    with pytest.raises(StoreIncompleteError, match="64 of 300"):
        run(store, tmp_path / "s.parquet", file)
    summary, frame = run(store, tmp_path / "s.parquet", file, allow_incomplete=True)
    assert (summary.missing, summary.rows) == (64, 300)
    assert summary.rows == summary.scored + summary.quarantined + summary.undefined + summary.missing
    assert frame["score:harm"][64:128].isna().all()
    expected = reference_cosine(store.rows[5], vector)
    # The gap shifts no later row.
    np.testing.assert_allclose(frame["score:harm"][131:], expected[131:], rtol=0, atol=2e-6)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink, flip])
@pytest.mark.parametrize("array", ["diff/5", "pair_id", "source"])
def test_damaged_shards_are_named(tmp_path: Path, array: str, harm: Callable[[Path], None]) -> None:
    store = make_store(tmp_path)
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    chunk = Path(store.path) / array / "c/3"
    harm(chunk if chunk.is_file() else chunk / "0")
    with pytest.raises(StoreDamagedError, match=rf"array {array}, shard 3 \(rows 192 to 255\)"):
        run(store, tmp_path / "s.parquet", file)
    assert not (tmp_path / "s.parquet").exists()


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    flip(Path(store.path) / "diff/5/c/3/0")
    assert run(store, tmp_path / "s.parquet", file, checksum=False)[0].rows == 300


@pytest.mark.parametrize("bad", [np.zeros(24, np.float32), np.full(24, np.nan, np.float32)])
def test_directions_without_a_cosine_are_refused(store: SmallStore, tmp_path: Path, bad: np.ndarray) -> None:
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(DirectionError, match=r"is zero|NaN or infinity"):
        run(store, tmp_path / "s.parquet", str(tmp_path / "bad.npy"), layer=5)


def test_a_failed_run_leaves_the_old_file(store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    run(store, tmp_path / "s.parquet", file)
    before = (tmp_path / "s.parquet").read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_batch", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        run(store, tmp_path / "s.parquet", file)
    assert (tmp_path / "s.parquet").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


def test_places_that_cannot_be_written_are_refused_before_the_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dir.parquet").mkdir()
    (tmp_path / "file").write_text("x")
    for out, message in (
        ("dir.parquet", "it is a directory"),
        ("file/scores.parquet", "is a file, not a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            # Were it not refused first, the absent store would be.
            score(ScoreConfig(store=str(tmp_path / "absent"), directions=("b.npy",), out=str(tmp_path / out)))
    assert not list((tmp_path / "dir.parquet").iterdir())
    monkeypatch.setattr("pairtrace.engine.atomic.os.access", lambda place, mode: False)
    with pytest.raises(ConfigError, match=f"no permission to write to {tmp_path}"):
        score(ScoreConfig(store=str(tmp_path / "absent"), directions=("b.npy",), out=str(tmp_path / "s.parquet")))


def test_swapped_arguments_and_files_that_are_no_stores_are_told(store: SmallStore, tmp_path: Path) -> None:
    direction = tmp_path / "b.npy"
    np.save(direction, np.ones(24, np.float32))
    out = str(tmp_path / "s.parquet")
    with pytest.raises(ConfigError, match=rf"swapped.*: pairtrace score {store.path} {direction}"):
        score(ScoreConfig(store=str(direction), directions=(str(store.path),), out=out))
    with pytest.raises(StoreError, match=rf"{direction} is a file, not an activation store \(a directory\)"):
        score(ScoreConfig(store=str(direction), directions=(str(direction),), out=out))


def test_a_direction_made_elsewhere_is_noted_once(
    store: SmallStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    direction = tmp_path / "b.safetensors"
    save_file({"b/5": np.ones(24, np.float32), "b/2": np.ones(24, np.float32)}, direction)
    caplog.set_level(logging.INFO)
    score(ScoreConfig(store=str(store.path), directions=(str(direction),), out=str(tmp_path / "s.parquet")))
    assert caplog.text.count("made elsewhere") == 1
    caplog.clear()
    settings = ConvertConfig(
        source=str(store.path), out=str(tmp_path / "c"), dtype="int8", directions=(str(direction),), fsync=False
    )
    assert {one.layer for one in convert(settings).fidelity} == {2, 5}
    assert caplog.text.count("made elsewhere") == 1


def test_other_files_are_no_scores_files(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataFormatError, match=r"is not a scores file \(columns a\)"):
        ScoresTable.open(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("x")
    for name, message in (
        ("text.parquet", "text.parquet is not a scores file: it is not even parquet"),
        ("absent.parquet", "cannot read the scores file .*absent.parquet"),
        (".", "is a directory, not a scores file"),
    ):
        with pytest.raises(DataFormatError, match=message):
            ScoresTable.open(tmp_path / name)


def with_metadata(path: Path, metadata: bytes) -> Path:
    other = path.with_name("other.parquet")
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"pairtrace": metadata}), other)
    return other


def test_files_with_our_key_but_other_content_are_no_scores_files(store: SmallStore, tmp_path: Path) -> None:
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    run(store, tmp_path / "s.parquet", file)
    for metadata, message in (
        (b"{", "not valid JSON"),
        (b"[1]", "schema version is None"),
        (b'{"schema_version": 3}', "schema version is 3"),
    ):
        with pytest.raises(DataFormatError, match=message):
            ScoresTable.open(with_metadata(tmp_path / "s.parquet", metadata))
    table = pq.read_table(tmp_path / "s.parquet")
    pq.write_table(table.drop_columns(["rank:harm"]), tmp_path / "short.parquet")
    with pytest.raises(DataFormatError, match="missing or of another type: rank:harm"):
        ScoresTable.open(tmp_path / "short.parquet")
    index = table.schema.get_field_index("score:harm")
    pq.write_table(table.set_column(index, "score:harm", table["source"]), tmp_path / "typed.parquet")
    with pytest.raises(DataFormatError, match="missing or of another type: score:harm"):
        ScoresTable.open(tmp_path / "typed.parquet")


def test_a_damaged_scores_file_is_a_format_error(store: SmallStore, tmp_path: Path) -> None:
    file = behavior_file(tmp_path / "b.safetensors", ("harm", 5, any_values(1, 24)))
    run(store, tmp_path / "s.parquet", file)
    opened = ScoresTable.open(tmp_path / "s.parquet")
    (tmp_path / "s.parquet").write_bytes((tmp_path / "s.parquet").read_bytes()[:100])
    with pytest.raises(DataFormatError, match="is damaged"):
        opened.ranks("harm")


@pytest.mark.parametrize(
    "module", ["behavior", "directions", "judge", "plan", "prompts", "ranking", "rollouts", "score"]
)
def test_importing_a_stage_loads_no_model_library(module: str) -> None:
    code = f"import sys, pairtrace.engine.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "trl", "triton"} & set(loaded)
