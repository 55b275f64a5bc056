"""Stores converted to another dtype or codec: what stays, what is rounded, how scores agree."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from pairtrace.engine import convert as convert_module
from pairtrace.engine import fidelity
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.rounding import LARGEST, round_rows
from pairtrace.errors import (
    StoreIncompleteError,
)
from pairtrace.kernels.int8 import ScaledRows, encode_int8
from pairtrace.store.layout import array_specs, to_float32
from pairtrace.store.reader import ActivationStore
from pairtrace.store.rows import RowReader
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.engine.conversions import behavior_file, run
from tests.engine.small_store import any_values, make_store, reference_cosine
from tests.models import HH, SHAREGPT, make_model, make_tokenizer
from tests.store.samples import make_manifest, tree_bytes, write_store

DTYPES = ["bfloat16", "float16", "float32", "int8"]


def rounded_as_torch(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of rows after rounding, by another library."""
    if dtype == "int8":
        parts = [values[start : start + 4] for start in range(0, len(values), 4)]
        return np.concatenate([encode_int8(part).decode() for part in parts])
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    return torch.from_numpy(values.astype(np.float32)).to(kind).float().numpy()


@pytest.mark.parametrize("after", DTYPES)
@pytest.mark.parametrize("before", DTYPES)
def test_rows_are_rounded_once_and_all_else_stays(before: str, after: str, tmp_path: Path) -> None:
    codec = "zstd:1" if after in (before, "int8") else "none"
    manifest = make_manifest(dtype=before, sides=True, rows=10, width=40)
    write_store(tmp_path / "a", manifest)
    summary = run(tmp_path / "a", tmp_path / "b", dtype=after, codec=codec)
    old, new = RowReader.open(tmp_path / "a"), RowReader.open(tmp_path / "b")
    kept = [name for name in array_specs(make_manifest(sides=True)) if name.partition("/")[0] not in _ROWS]
    assert len(kept) == 7
    for shard in range(3):
        for name in kept:
            np.testing.assert_array_equal(old.chunk(name, shard), new.chunk(name, shard), err_msg=name)
        for name in (f"{kind}/{layer}" for kind in _ROWS for layer in manifest.layers):
            rows = to_float32(old.vectors(name, shard))
            expected = rows if before == after else rounded_as_torch(rows, after)
            np.testing.assert_array_equal(to_float32(new.vectors(name, shard)), expected, err_msg=name)
    assert verify(tmp_path / "b").ok
    assert (summary.dtype_before, summary.dtype_after, summary.codec_after) == (before, after, codec)
    assert (summary.shards, summary.converted, summary.already_complete) == (3, 3, False)
    wanted = replace(manifest, codec=codec, dtype=after, converted_from=None if before == after else before)
    new.manifest.require_same(wanted)
    for name in ("versions", "columns", "data", "model", "attention", "shard_rows"):
        assert getattr(new.manifest, name) == getattr(manifest, name)
    # A change of the codec alone is on record as well.
    assert new.manifest.source_store == {"path": str(tmp_path / "a"), "dtype": before, "codec": "none"}


_ROWS = ("diff", "chosen", "rejected")


def test_a_change_of_codec_alone_keeps_every_bit_of_int8_rows(tmp_path: Path) -> None:
    write_store(tmp_path / "a", make_manifest(dtype="int8"))
    run(tmp_path / "a", tmp_path / "b", codec="blosc-lz4:5")
    old, new = (RowReader.open(tmp_path / name).vectors("diff/2", 1) for name in "ab")
    assert isinstance(old, ScaledRows)
    assert isinstance(new, ScaledRows)
    for name in ("values", "row_scale", "column_scale"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))


def test_bfloat16_is_rounded_to_nearest_even_as_by_torch() -> None:
    words = np.arange(0, 1 << 32, 4099, dtype=np.uint64).astype(np.uint32)
    halves = (np.arange(1 << 15, dtype=np.uint32) << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], np.uint32)
    values = np.concatenate([words, halves.ravel()]).view(np.float32)
    values = values[np.abs(values) <= LARGEST["bfloat16"]][:, None]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(round_rows(values, "float32", "bfloat16"), expected)
    assert np.isfinite(torch.from_numpy(expected).view(torch.bfloat16).float().numpy()).all()


def test_after_several_conversions_the_coarsest_is_on_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_store(tmp_path, dtype="float32")
    for number, (dtype, origin) in enumerate(
        [("float16", "float32"), ("int8", "float16"), ("float16", "int8"), ("float32", "int8")]
    ):
        source = tmp_path / ("acts.zarr" if number == 0 else str(number - 1))
        caplog.clear()
        run(source, tmp_path / str(number), dtype=dtype)
        assert ActivationStore.open(tmp_path / str(number)).manifest.converted_from == origin
        assert ("do not come back" in caplog.text) == (number >= 2)
        assert verify(tmp_path / str(number)).ok


def test_a_conversion_goes_on_where_it_stopped_and_then_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = make_store(tmp_path).path
    run(source, tmp_path / "whole", dtype="int8")
    real, written = StoreWriter.write_shard, []

    def stop_after_two(writer: StoreWriter, block: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block.index)
        real(writer, block)

    with patch.object(StoreWriter, "write_shard", stop_after_two), pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b", dtype="int8")
    with pytest.raises(StoreIncompleteError, match=f"store convert {source}"):
        ActivationStore.open(tmp_path / "b")
    summary = run(source, tmp_path / "b", dtype="int8")
    assert (summary.shards, summary.converted, summary.already_complete) == (5, 3, False)
    assert "nothing to do" not in caplog.text
    before = tree_bytes(tmp_path / "b")
    again = run(source, tmp_path / "b", dtype="int8")
    assert (again.converted, again.already_complete) == (0, True)
    assert "already converted, all 300 rows: nothing to do" in caplog.text
    assert tree_bytes(tmp_path / "b") == before
    assert again.fidelity == summary.fidelity
    chunks = {name: content for name, content in before.items() if not name.endswith("zarr.json")}
    assert chunks == {n: c for n, c in tree_bytes(tmp_path / "whole").items() if not n.endswith("zarr.json")}


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_the_report_equals_figures_from_the_definition(dtype: str, tmp_path: Path) -> None:
    source = make_store(tmp_path, rows=900, dtype="float32", zero=(11, 500))
    file = behavior_file(tmp_path / "b.safetensors")
    summary = run(source.path, tmp_path / "new", dtype=dtype, directions=(file,))
    found = {(one.behavior, one.layer): one for one in summary.fidelity}
    assert sorted(found) == [(name, layer) for name in ("bank", "harm") for layer in (2, 5)]
    new = ActivationStore.open(tmp_path / "new")
    identifiers = new.pair_ids()
    for (name, layer), one in found.items():
        directions = any_values((10 if name == "harm" else 20) + layer, 1 if name == "harm" else 3, 24)
        after_rows = np.concatenate([to_float32(rows) for _, rows in new.blocks(layer)])
        before, after = (
            np.max([reference_cosine(rows, direction) for direction in directions], axis=0)
            for rows in (source.rows[layer], after_rows)
        )
        scored = ~np.isnan(before)
        assert one.rows == scored.sum() == 896
        assert one.without_score == 0
        assert one.spearman == pytest.approx(spearmanr(before[scored], after[scored]).statistic, abs=1e-5)
        top = [set(np.argsort(-np.nan_to_num(scores, nan=-9), kind="stable")[:9]) for scores in (before, after)]
        assert one.top_rows == 9
        assert one.top_overlap == pytest.approx(len(top[0] & top[1]) / 9)
        differences = np.nan_to_num(np.abs(before - after), nan=-1)
        assert one.largest_difference == pytest.approx(differences.max(), abs=1e-6)
        assert one.worst_row is not None
        assert differences[one.worst_row] == pytest.approx(differences.max(), abs=1e-6)
        assert one.worst_pair_id == identifiers[one.worst_row].tobytes().hex()
        assert one.score_before == pytest.approx(before[one.worst_row], abs=1e-6)
        assert one.score_after == pytest.approx(after[one.worst_row], abs=1e-6)
    assert summary.compared_on == file
    assert json.loads(json.dumps(summary.to_dict()))["fidelity"][0]["worst_pair_id"]


def test_rows_that_lose_their_score_are_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_manifest(dtype="float32", layers=(2,), rows=4, width=6)
    from tests.store.samples import make_block

    block = make_block(manifest, 0)
    rows = block.diff[2]
    assert isinstance(rows, np.ndarray)
    rows[1] = 1e-20  # float16 knows it only as zero
    with StoreWriter.create_or_resume(tmp_path / "a", manifest, fsync=False) as writer:
        writer.write_shard(replace(block, norm={2: np.linalg.norm(rows, axis=1).astype(np.float32)}))
    summary = run(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert [one.without_score for one in summary.fidelity] == [1] * len(summary.fidelity)
    assert "rows with a score in only one store: 1" in caplog.text


def test_without_direction_files_random_ones_and_the_mean_row_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = make_store(tmp_path).path
    summary = run(source, tmp_path / "b", dtype="int8")
    names = [(one.behavior, one.layer) for one in summary.fidelity]
    assert names == [(name, layer) for layer in (2, 5) for name in (*(f"random-{n}" for n in range(8)), "mean")]
    assert "8 random directions and the mean row" in caplog.text
    assert summary.compared_on == "random directions and the mean row"
    assert run(source, tmp_path / "c", dtype="int8", layer=5).fidelity == summary.fidelity[9:]
    assert "differ from" not in caplog.text


def test_the_mean_row_is_the_mean_of_the_ok_rows(tmp_path: Path) -> None:
    source = make_store(tmp_path)
    directions = fidelity.fidelity_directions(ActivationStore.open(source.path), (), 5)
    (mean,) = (one for one in directions[5] if one.name == "mean")
    expected = source.rows[5].astype(np.float64).mean(axis=0)
    assert reference_cosine(mean.values, expected)[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "others"),
    [([1, 2, 3, 4], [1, 2, 4, 3]), ([1, 1, 2, 2, 5], [3, 1, 2, 2, 9]), ([0.0, -0.0, 1], [1, 2, 3])],
)
def test_rank_correlation_with_ties(scores: list[float], others: list[float]) -> None:
    first, second = np.array(scores, np.float32), np.array(others, np.float32)
    assert fidelity.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_rank_correlation_of_nothing_and_of_equal_scores() -> None:
    assert fidelity.spearman(np.empty(0, np.float32), np.empty(0, np.float32)) is None
    assert fidelity.spearman(np.ones(3, np.float32), np.arange(3, dtype=np.float32)) is None


def _shifted(rows: Any, before: str, after: str) -> Any:
    return round_rows(np.roll(rows, 1, axis=0), before, after)


def _truncated(rows: Any, before: str, after: str) -> Any:
    scaled = round_rows(rows, before, after)
    return ScaledRows(scaled.values // 32 * 32, scaled.row_scale, scaled.column_scale)


def _without_column_scales(rows: Any, before: str, after: str) -> Any:
    scaled = round_rows(rows, before, after)
    return ScaledRows(scaled.values, scaled.row_scale, np.ones_like(scaled.column_scale))


@pytest.mark.parametrize("mutant", [_shifted, _truncated, _without_column_scales])
def test_a_wrong_conversion_is_seen_in_the_report(
    mutant: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_store(tmp_path, quarantined=(), zero=()).path
    monkeypatch.setattr(convert_module, "round_rows", mutant)
    summary = run(source, tmp_path / "b", dtype="int8", layer=2)
    assert not all(one.sufficient for one in summary.fidelity)
    assert "differ from those of the source" in caplog.text


@pytest.mark.parametrize("data", [HH, SHAREGPT], ids=["hh", "sharegpt"])
def test_int8_keeps_the_ranking_of_real_pairs(data: Path, tmp_path: Path) -> None:
    """A tiny random checkpoint over real pairs; the gate for a store that is to be scored.

    The top 1 % of few rows is a handful: the overlap is that of many directions together.
    """
    if not data.is_file():
        pytest.skip(f"the shared preference data is not at {data.parent}")
    make_tokenizer(tmp_path / "m0")
    make_model("llama", tmp_path / "m0", hidden_size=128, num_attention_heads=4, num_hidden_layers=2)
    store = str(tmp_path / "acts.zarr")
    extract(
        ExtractConfig(
            data=str(data),
            model=str(tmp_path / "m0"),
            layers=(1,),
            store=store,
            limit=500,
            max_length=1024,
            fsync=False,
        )
    )
    opened = ActivationStore.open(store)
    rows = np.concatenate([np.asarray(part, np.float64) for _, part in opened.blocks(1)])[opened.status() == 1]
    rng = np.random.default_rng(0)
    # Behaviours are means over some pairs; random directions besides.
    means = [rows[rng.choice(len(rows), 30)].mean(axis=0) for _ in range(80)]
    values = np.concatenate([means, rng.standard_normal((120, 128))]).astype(np.float32)
    made = [
        Direction(name=f"d{number}", layer=1, values=one[None], kind="vector", origin="test")
        for number, one in enumerate(values)
    ]
    save_directions(tmp_path / "many.safetensors", made, {})
    summary = run(store, tmp_path / "int8.zarr", dtype="int8", directions=(str(tmp_path / "many.safetensors"),))
    assert len(summary.fidelity) == 200
    assert min(one.spearman for one in summary.fidelity if one.spearman is not None) >= 0.999
    overlaps = [one.top_overlap for one in summary.fidelity if one.top_overlap is not None]
    assert np.mean(overlaps) >= 0.98, overlaps
