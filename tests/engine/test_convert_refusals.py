"""What a conversion refuses, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.errors import (
    ConfigError,
    DirectionError,
    LayerError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreMismatchError,
)
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.engine.conversions import behavior_file, run
from tests.engine.small_store import make_store
from tests.store.samples import make_block, make_manifest, write_store


@pytest.mark.parametrize(("sides", "array"), [(False, "diff"), (True, "rejected")])
def test_values_that_do_not_fit_are_refused_before_anything_is_written(sides: bool, array: str, tmp_path: Path) -> None:
    manifest = make_manifest(dtype="float32", sides=sides)
    with StoreWriter.create_or_resume(tmp_path / "a", manifest, fsync=False) as writer:
        for shard in range(3):
            block = make_block(manifest, shard)
            if shard == 2:
                rows = getattr(block, array)[5]
                rows[1, 3] = -65520
                block.norm[5][1] = np.linalg.norm(block.diff[5][1])  # type: ignore[call-overload]
            writer.write_shard(block)
    with pytest.raises(ConfigError, match=rf"row 9 of {array}/5 holds a value of 6.552e\+04.*float16.*Nothing"):
        run(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()
    run(tmp_path / "a", tmp_path / "c", dtype="bfloat16")


def test_damage_of_the_source_is_not_converted(tmp_path: Path) -> None:
    source = make_store(tmp_path).path
    chunk = Path(source, "diff/5/c/1/0")
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreDamagedError, match=r"diff/5.*shard 1"):
        run(source, tmp_path / "b", dtype="int8", layer=2)


def test_damage_of_a_converted_store_names_the_conversion(tmp_path: Path) -> None:
    source = make_store(tmp_path).path
    run(source, tmp_path / "b", codec="zstd:1")
    chunk = tmp_path / "b/diff/5/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:50])
    with pytest.raises(StoreDamagedError) as caught:
        list(ActivationStore.open(tmp_path / "b").blocks(5))
    command = f"pairtrace store convert {source} {tmp_path}/b --dtype float16 --codec zstd:1"
    assert f"delete {tmp_path}/b/status/c/1 and run the same conversion again: {command}" in str(caught.value)
    assert command in verify(tmp_path / "b").advice
    (tmp_path / "b/status/c/1").unlink()
    run(*command.split()[3:5], dtype="float16", codec="zstd:1")
    assert verify(tmp_path / "b").ok


def test_an_incomplete_source_is_refused_with_advice(tmp_path: Path) -> None:
    source = make_store(tmp_path, skip_shards=(2,)).path
    with pytest.raises(StoreIncompleteError, match=r"64 of 300 rows are missing.*pairtrace extract"):
        run(source, tmp_path / "b", dtype="int8")
    assert not (tmp_path / "b").exists()


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    source = make_store(tmp_path).path
    with pytest.raises(StoreError, match="no"):
        run(tmp_path / "nowhere", tmp_path / "b", dtype="int8")
    with pytest.raises(ConfigError, match="is the store to convert"):
        run(source, f"{tmp_path}/../{tmp_path.name}/acts.zarr", dtype="int8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text").write_text("mine")
    with pytest.raises(StoreError, match="not a pairtrace store"):
        run(source, tmp_path / "notes", dtype="int8")
    run(source, tmp_path / "b", dtype="int8")
    with pytest.raises(StoreMismatchError, match="dtype"):
        run(source, tmp_path / "b", dtype="float32")
    other = make_store(tmp_path / "other", data_fingerprint="9" * 64).path
    with pytest.raises(StoreMismatchError, match="data_fingerprint"):
        run(other, tmp_path / "b", dtype="int8")
    # Computed with float32, not converted to it.
    exact = make_store(tmp_path / "exact", dtype="float32").path
    with pytest.raises(StoreMismatchError, match="converted_from"):
        run(source, exact, dtype="float32")


def test_a_store_in_shards_of_another_size_is_not_resumed(tmp_path: Path) -> None:
    for name, shard_rows in (("a", 4), ("b", 5)):
        write_store(tmp_path / name, make_manifest(shard_rows=shard_rows))
    run(tmp_path / "a", tmp_path / "c", dtype="int8")
    with pytest.raises(StoreMismatchError, match="shard_rows"):
        run(tmp_path / "b", tmp_path / "c", dtype="int8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to convert to"),
        ({"dtype": "int4"}, "--dtype is 'int4'"),
        ({"codec": "gzip:3"}, "unknown codec 'gzip:3'"),
        ({"dtype": "float16"}, "already float16 with codec none"),
        ({"codec": "none"}, "already float16 with codec none"),
    ],
)
def test_settings_that_convert_nothing_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    source = make_store(tmp_path).path
    with pytest.raises(ConfigError, match=message):
        run(source, tmp_path / "b", **settings)


def _npy(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


def test_directions_that_cannot_be_used_are_refused_before_the_work(tmp_path: Path) -> None:
    source = make_store(tmp_path).path
    file = behavior_file(tmp_path / "b.safetensors", layers=(2, 5))
    foreign = behavior_file(tmp_path / "f.safetensors", model_fingerprint="7" * 64)
    elsewhere = behavior_file(tmp_path / "e.safetensors", layers=(1,))
    plain = _npy(tmp_path / "plain.npy", np.ones(24))
    for directions, layer, error, message in (
        ((_npy(tmp_path / "w.npy", np.ones(23)),), 2, DirectionError, "width 23; expected 24"),
        ((_npy(tmp_path / "z.npy", np.zeros(24)),), 2, DirectionError, "is zero"),
        ((_npy(tmp_path / "n.npy", np.full(24, np.nan)),), 2, DirectionError, "NaN or infinity"),
        ((foreign,), None, DirectionError, "made from the model"),
        ((file,), 3, LayerError, "layer 3 is not in"),
        ((), 3, LayerError, "layer 3 is not in"),
        ((elsewhere,), None, LayerError, "no layer is common"),
        ((plain,), None, LayerError, "choose one with --layer"),
        ((str(tmp_path / "nowhere.npy"),), 2, DirectionError, "cannot read"),
    ):
        with pytest.raises(error, match=message):
            run(source, tmp_path / "b", dtype="int8", directions=directions, layer=layer)
        assert not (tmp_path / "b").exists()
    summary = run(source, tmp_path / "b", dtype="int8", directions=(file, plain), layer=5)
    assert sorted((one.behavior, one.layer) for one in summary.fidelity) == [("bank", 5), ("harm", 5), ("plain", 5)]
