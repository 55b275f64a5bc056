"""Damage to compressed chunks and to scales, whose length tells little, in every way to read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.errors import StoreDamagedError
from pairtrace.store import chunks
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from tests.store.samples import chunk_files, make_manifest, write_store

KINDS = [("int8", "none"), ("int8", "zstd:3"), ("float16", "blosc-lz4:5")]
NAMES = {"int8": ["chosen/5", "row_scale/chosen/5", "column_scale/chosen/5"], "float16": ["chosen/5"]}
CASES = [(dtype, codec, name) for dtype, codec in KINDS for name in NAMES[dtype]]

READS: dict[str, Callable[[ActivationStore], object]] = {
    "blocks": lambda s: list(s.blocks(5, "chosen")),
    "small blocks": lambda s: list(s.blocks(5, "chosen", 3, read_ahead=0)),
    "take": lambda s: s.take(5, [9, 4], "chosen", checksum=True),
    "vectors": lambda s: s.row_reader().vectors("chosen/5", 1),
    "rows": lambda s: s.row_reader().take("chosen/5", [4]),
    "dask": lambda s: s.dask(5, "chosen").compute(),
}
# Compressed chunks are checked whether that was asked for or not.
TRUSTING: dict[str, Callable[[ActivationStore], object]] = {
    "blocks": lambda s: list(s.blocks(5, "chosen", checksum=False)),
    "take": lambda s: s.take(5, [9, 4], "chosen", checksum=False),
    "vectors": lambda s: s.row_reader().vectors("chosen/5", 1, checksum=False),
    "chunk": lambda s: s.row_reader().chunk("chosen/5", 1, checksum=False),
}


def flip(whole: bytes, byte: int) -> bytes:
    raw = bytearray(whole)
    raw[byte] ^= 4
    return bytes(raw)


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda whole: whole[:-1],
    "half": lambda whole: whole[: len(whole) // 2],
    "tiny": lambda whole: whole[:3],
    "empty": lambda whole: b"",
    "grown": lambda whole: whole + bytes(12),
    "missing": lambda whole: None,
    "first byte": lambda whole: flip(whole, 0),
    "middle": lambda whole: flip(whole, len(whole) // 2),
    "checksum": lambda whole: flip(whole, -1),
}


def store_of(root: Path, dtype: str, codec: str) -> Path:
    write_store(root, make_manifest(dtype=dtype, codec=codec, sides=True))
    return root


def chunk_of(root: Path, name: str) -> Path:
    return next(path for path in chunk_files(root) if path.as_posix().startswith(f"{root}/{name}/c/1"))


def assert_named(root: Path, name: str, read: Callable[[ActivationStore], object]) -> None:
    with pytest.raises(StoreDamagedError) as caught:
        read(ActivationStore.open(root))
    message = str(caught.value)
    assert f"{root}: array {name}, shard 1 (rows 4 to 7) is damaged: its ch" in message
    assert f"delete {root}/status/c/1 " in message


@pytest.mark.parametrize(("dtype", "codec", "name"), CASES)
@pytest.mark.parametrize("harm", HARMS)
def test_every_way_to_read_names_shard_and_rows(tmp_path: Path, dtype: str, codec: str, name: str, harm: str) -> None:
    root = store_of(tmp_path, dtype, codec)
    path = chunk_of(root, name)
    harmed = HARMS[harm](path.read_bytes())
    path.unlink()
    if harmed is not None:
        path.write_bytes(harmed)
    for read in READS.values():
        assert_named(root, name, read)
    problems = verify(root).problems
    assert [(problem.array, problem.shard, problem.rows) for problem in problems] == [(name, 1, (4, 8))]
    assert ActivationStore.open(root).take(5, [3, 8], "chosen").shape == (2, 6)


@pytest.mark.parametrize(("dtype", "codec"), KINDS[1:])
@pytest.mark.parametrize("harm", HARMS)
def test_compressed_chunks_are_always_checked(tmp_path: Path, dtype: str, codec: str, harm: str) -> None:
    root = store_of(tmp_path, dtype, codec)
    path = chunk_of(root, "chosen/5")
    harmed = HARMS[harm](path.read_bytes())
    path.unlink()
    if harmed is not None:
        path.write_bytes(harmed)
    for read in TRUSTING.values():
        assert_named(root, "chosen/5", read)


def test_a_chunk_of_another_array_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Whole, with a right checksum, but of another size once it is decompressed."""
    root = store_of(tmp_path / "a", "int8", "zstd:3")
    write_store(tmp_path / "b", make_manifest(dtype="int8", codec="zstd:3", sides=True, width=7))
    chunk_of(root, "chosen/5").write_bytes(chunk_of(tmp_path / "b", "chosen/5").read_bytes())
    assert_named(root, "chosen/5", READS["blocks"])
    assert "decompresses to 28 bytes instead of 24" in str(verify(root).problems[0])


def test_a_reader_that_trusts_compressed_chunks_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = store_of(tmp_path, "int8", "zstd:3")
    path = chunk_of(root, "chosen/5")
    path.write_bytes(flip(path.read_bytes(), -1))
    assert_named(root, "chosen/5", TRUSTING["blocks"])
    original = chunks._body
    monkeypatch.setattr(
        chunks, "_body", lambda raw, spec, checksum: raw[:-4] if spec.codec else original(raw, spec, checksum=checksum)
    )
    with pytest.raises(pytest.fail.Exception):
        assert_named(root, "chosen/5", TRUSTING["blocks"])


def test_a_store_of_an_unknown_dtype_or_codec(tmp_path: Path) -> None:
    root = store_of(tmp_path, "float16", "zstd:3")
    path = root / "zarr.json"
    whole = path.read_bytes()
    changes: dict[bytes, bytes] = {b'"float16"': b'"float8"', b'"zstd:3"': b'"lzma:3"', b'"zstd:': b'"zstd:9'}
    for old, new in changes.items():
        path.write_bytes(whole.replace(old, new))
        uses: list[Callable[[], Any]] = [lambda: ActivationStore.open(root), lambda: verify(root)]
        for use in uses:
            with pytest.raises(
                StoreDamagedError, match=r"the manifest is damaged \((dtype must be one of|unknown codec)"
            ):
                use()


def test_an_array_with_another_codec_than_the_manifest_says(tmp_path: Path) -> None:
    root = store_of(tmp_path, "float16", "zstd:3")
    path = root / "chosen/5/zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"level": 3', b'"level": 4'))
    with pytest.raises(StoreDamagedError, match=r"array chosen/5 is damaged: its codecs is .*4.*requires .*3"):
        ActivationStore.open(root)


def test_rows_of_int8_come_back_within_half_a_step(tmp_path: Path) -> None:
    """The reference: the rows before they were rounded."""
    manifest = make_manifest(dtype="int8", codec="blosc-zstd:3", rows=50, width=64)
    blocks = write_store(tmp_path, manifest)
    exact = np.concatenate([block.diff[5] for block in blocks])
    store = ActivationStore.open(tmp_path)
    found = store.take(5, np.arange(50))
    for shard in range(13):
        scaled: Any = store.row_reader().vectors("diff/5", shard)
        rows = slice(4 * shard, 4 * shard + len(scaled))
        np.testing.assert_array_equal(found[rows], scaled.decode())
        # Half a step before each row got its norm back.
        step = np.abs(exact[rows] / scaled.column_scale).max(axis=1)[:, None] / 127 * scaled.column_scale
        assert (np.abs(scaled.values * step - exact[rows]) <= 0.5 * step * (1 + 1e-5)).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(exact, axis=1), rtol=1e-5)
    assert 0 < np.abs(found - exact).max() < 0.1
