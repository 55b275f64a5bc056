from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.errors import StoreDamagedError, StoreError
from pairtrace.store import verify as verify_module
from pairtrace.store import writer as writer_module
from pairtrace.store.chunks import decode, encode
from pairtrace.store.layout import ArraySpec, array_specs
from pairtrace.store.manifest import Manifest
from pairtrace.store.verify import VerifyReport, verify
from pairtrace.store.writer import ShardBlock, StoreWriter
from tests.store.samples import cast, chunk_files, make_block, make_manifest, write_store

MANIFEST = make_manifest(sides=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "acts.zarr"
    write_store(path, MANIFEST)
    return path


def one_problem(report: VerifyReport) -> str:
    assert not report.ok
    assert len(report.problems) == 1, [str(problem) for problem in report.problems]
    return str(report.problems[0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("codec", ["none", "zstd:3", "blosc-lz4:5"])
@pytest.mark.parametrize("sides", [False, True])
def test_a_sound_store(tmp_path: Path, dtype: str, codec: str, sides: bool) -> None:
    manifest = make_manifest(dtype=dtype, codec=codec, sides=sides, rows=50, width=64)
    write_store(tmp_path, manifest)
    report = verify(tmp_path)
    assert report.ok and report.complete and report.problems == () and report.missing_shards == ()
    assert (report.path, report.rows, report.shards) == (str(tmp_path), 50, 13)


def test_small_and_large_values_pass(tmp_path: Path) -> None:
    """Rounding to float16 loses nearly everything near its smallest number; that is no damage."""
    manifest = make_manifest(rows=4, width=64, layers=(1,))
    for number, scale in enumerate((1e-7, 1e-5, 1.0, 1e4)):
        values = (np.random.default_rng(0).uniform(-1, 1, (4, 64)) * scale).astype(np.float32)
        norm = np.linalg.norm(values, axis=1).astype(np.float32)
        write_changed(tmp_path / str(number), manifest, 0, diff={1: cast(values, "float16")}, norm={1: norm}, ok=True)
        assert verify(tmp_path / str(number)).ok


def write_changed(root: Path, manifest: Any, shard: int, *, ok: bool = False, **changes: Any) -> None:
    """A store whose one shard is changed but carries right checksums."""
    with StoreWriter.create_or_resume(root, manifest, fsync=False) as writer:
        for number in range(-(-manifest.rows // manifest.shard_rows)):
            block = make_block(manifest, number)
            if ok:
                n = len(block.status)
                changes |= {"status": np.ones(n, np.uint8), "reason": [""] * n}
                changes |= {"pair_id": np.ones((n, 16), np.uint8)}
            writer.write_shard(dataclasses.replace(block, **changes) if number == shard else block)


# Bytes


@pytest.mark.parametrize(("dtype", "codec"), [("float16", "none"), ("int8", "none"), ("int8", "zstd:3")])
def test_every_flipped_bit_is_found(tmp_path: Path, dtype: str, codec: str) -> None:
    """The first, the last and one random bit of every chunk file."""
    write_store(tmp_path, make_manifest(sides=True, layers=(2,), rows=6, dtype=dtype, codec=codec))
    rng = np.random.default_rng(1)
    files = chunk_files(tmp_path)
    assert len(files) == 2 * (15 if dtype == "int8" else 9)
    for path in files:
        name, _, place = path.relative_to(tmp_path).as_posix().partition("/c/")
        shard = int(place.split("/")[0])
        whole = path.read_bytes()
        for bit in (0, int(rng.integers(0, 8 * len(whole))), 8 * len(whole) - 1):
            raw = bytearray(whole)
            raw[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(raw)
            problem = verify(tmp_path).problems[0]
            assert (problem.array, problem.shard, problem.rows) == (name, shard, [(0, 4), (4, 6)][shard])
            assert "its checksum is" in problem.what
        path.write_bytes(whole)
    assert verify(tmp_path).ok


def test_a_verification_without_checksums_is_caught(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "diff/5/c/1/0"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1  # a low bit of one value: norm and NaN checks do not see it
    path.write_bytes(raw)
    assert "its checksum is" in one_problem(verify(root))
    trusting = verify_module.decode
    monkeypatch.setattr(
        verify_module, "decode", lambda raw, spec, shard, *, checksum: trusting(raw, spec, shard, checksum=False)
    )
    with pytest.raises(AssertionError):
        one_problem(verify(root))


@pytest.mark.parametrize("name", ["diff/5", "norm/2", "pair_id", "source"])
def test_zarr_reads_one_shard_as_well(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The mutation: a reader of our own that reads something else, of which nothing but Zarr knows better."""
    right = verify_module.decode

    def wrong(raw: Any, spec: ArraySpec, shard: int, *, checksum: bool) -> np.ndarray:
        rows = right(raw, spec, shard, checksum=checksum)
        if spec.name != name:
            return rows
        if spec.is_text:
            return np.array([text + "x" for text in rows.tolist()], dtype=object)
        return rows + (rows != 0) * np.array(np.finfo(rows.dtype).eps if rows.dtype.kind == "f" else 1, rows.dtype)

    monkeypatch.setattr(verify_module, "decode", wrong)
    assert one_problem(verify(root)) == f"{name}, shard 0 (rows 0 to 3): Zarr reads other values than pairtrace"


def test_what_zarr_cannot_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no such codec")

    monkeypatch.setattr("zarr.Array.__getitem__", refuse)
    assert [problem.what for problem in verify(root).problems] == ["Zarr cannot read it (no such codec)"] * 13


@pytest.mark.parametrize("name", ["diff/5", "rejected/2", "row_scale/diff/5", "column_scale/chosen/2"])
@pytest.mark.parametrize("codec", ["none", "zstd:3", "blosc-zstd:1"])
def test_missing_and_truncated_chunks_of_int8(tmp_path: Path, name: str, codec: str) -> None:
    """The chunk of a column scale is one row of its array, but stands for all rows of the shard."""
    write_store(tmp_path, make_manifest(dtype="int8", codec=codec, sides=True))
    path = next(p for p in chunk_files(tmp_path) if p.as_posix().startswith(f"{tmp_path}/{name}/c/1"))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"", whole + b"\0"):
        path.write_bytes(content)
        assert one_problem(verify(tmp_path)).startswith(f"{name}, shard 1 (rows 4 to 7): its ch")
    path.unlink()
    assert one_problem(verify(tmp_path)) == f"{name}, shard 1 (rows 4 to 7): its chunk is missing"


def rewrite(root: Path, manifest: Manifest, name: str, shard: int, change: Callable[[np.ndarray], None]) -> None:
    """Change values of a chunk and give it the right checksum."""
    spec = array_specs(manifest)[name]
    path = root / spec.key(shard)
    rows = decode(np.frombuffer(path.read_bytes(), np.uint8), spec, shard, checksum=True).copy()
    change(rows)
    path.write_bytes(b"".join(piece.tobytes() for piece in encode(spec, rows)))


@pytest.mark.parametrize(
    ("name", "place", "value", "expected"),
    [
        ("row_scale/diff/2", 1, np.nan, "row_scale/diff/2, shard 1 (rows 5 to 5): a scale is negative or not finite"),
        ("row_scale/chosen/5", 2, -1.0, "row_scale/chosen/5, shard 1 (rows 6 to 6): a scale is negative"),
        ("column_scale/diff/5", (0, 3), np.inf, "column_scale/diff/5, shard 1 (rows 4 to 7): a scale is not positive"),
        ("column_scale/rejected/2", (0, 0), 0.0, "column_scale/rejected/2, shard 1 (rows 4 to 7): a scale is not"),
        ("row_scale/diff/2", 1, 0.1, "norm/2, shard 1 (rows 5 to 5): the norm does not belong to the difference"),
        ("column_scale/diff/2", 0, 0.5, "norm/2, shard 1 (rows 4 to 7): the norm does not belong to the difference"),
        ("diff/5", 3, 1, "norm/5, shard 1 (rows 7 to 7): the norm does not belong to the difference"),
    ],
)
def test_scales_and_values_of_int8(tmp_path: Path, name: str, place: Any, value: float, expected: str) -> None:
    manifest = make_manifest(dtype="int8", codec="zstd:1", sides=True, rows=9, width=64)
    write_store(tmp_path, manifest)
    assert verify(tmp_path).ok

    def change(rows: np.ndarray) -> None:
        rows[place] = value

    rewrite(tmp_path, manifest, name, 1, change)
    assert expected in [str(problem)[: len(expected)] for problem in verify(tmp_path).problems]


def test_an_int8_row_that_is_quarantined_holds_no_values(tmp_path: Path) -> None:
    manifest = make_manifest(dtype="int8")
    write_store(tmp_path, manifest)
    rewrite(tmp_path, manifest, "diff/5", 0, lambda rows: rows[3].fill(1))  # its row scale of 0 hides them
    assert one_problem(verify(tmp_path)).startswith("diff/5, shard 0 (rows 3 to 3): a quarantined row is not zero")


@pytest.mark.parametrize("name", ["diff/5", "norm/2", "chosen/2", "pair_id", "tokens", "source", "reason"])
def test_missing_and_truncated_chunks(root: Path, name: str) -> None:
    path = next(p for p in chunk_files(root) if p.as_posix().startswith(f"{root}/{name}/c/1"))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        path.write_bytes(content)
        problem = one_problem(verify(root))
        assert problem.startswith(f"{name}, shard 1 (rows 4 to 7): ")
    path.unlink()
    assert one_problem(verify(root)) == f"{name}, shard 1 (rows 4 to 7): its chunk is missing"


def test_a_damaged_mark(root: Path) -> None:
    (root / "status/c/1").write_bytes(b"\x01\x01\x01")
    assert one_problem(verify(root)).startswith("status, shard 1 (rows 4 to 7): its chunk has 3 bytes")


def test_a_missing_mark_is_a_missing_shard(root: Path) -> None:
    (root / "status/c/1").unlink()
    report = verify(root)
    assert report.missing_shards == (1,) and not report.complete and not report.ok and not report.problems


@pytest.mark.parametrize("key", ["notes.txt", "diff/5/c/3/0", "status/c/3", "diff/9/zarr.json", "status/c/1.partial"])
def test_files_that_do_not_belong(root: Path, key: str) -> None:
    (root / key).parent.mkdir(parents=True, exist_ok=True)
    (root / key).write_bytes(b"x")
    assert one_problem(verify(root)) == f"{key}: this file does not belong to the store"


# Values


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that lets everything pass."""

    def values(block: ShardBlock, *_: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: getattr(block, name) for name in ("pair_id", "tokens", "status", "reason", "source")
        }
        for group in ("diff", "norm", "chosen", "rejected"):
            found |= {f"{group}/{layer}": rows for layer, rows in getattr(block, group).items()}
        return found

    monkeypatch.setattr(writer_module, "checked_values", values)


@pytest.mark.usefixtures("careless")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["diff", "chosen", "rejected"])
def test_values_that_are_not_finite(tmp_path: Path, value: float, group: str) -> None:
    rows = make_block(MANIFEST, 1).__getattribute__(group)[5].copy()
    rows[2, 4] = value
    write_changed(tmp_path, MANIFEST, 1, **{group: {**getattr(make_block(MANIFEST, 1), group), 5: rows}})
    problem = one_problem(verify(tmp_path))
    assert problem.startswith(f"{group}/5, shard 1 (rows 6 to 6): an ok row holds NaN or infinity")


@pytest.mark.usefixtures("careless")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.02, 0.0, np.nan, -1.0])
def test_a_norm_of_another_row(tmp_path: Path, dtype: str, factor: float) -> None:
    manifest = make_manifest(dtype=dtype, sides=True)
    norm = make_block(manifest, 1).norm[2].copy()
    norm[3] *= factor
    write_changed(tmp_path, manifest, 1, norm={**make_block(manifest, 1).norm, 2: norm})
    problem = one_problem(verify(tmp_path))
    assert problem.startswith("norm/2, shard 1 (rows 7 to 7): the norm does not belong to the difference")


@pytest.mark.usefixtures("careless")
def test_shifted_rows_are_found(tmp_path: Path) -> None:
    """Rows that moved by one against the other arrays."""
    block = make_block(MANIFEST, 1)
    write_changed(tmp_path, MANIFEST, 1, diff={**block.diff, 5: np.roll(block.diff[5], 1, axis=0)})
    assert "the norm does not belong to the difference (4 such rows" in one_problem(verify(tmp_path))


@pytest.mark.usefixtures("careless")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pair_id": np.zeros((4, 16), np.uint8)}, "pair_id, shard 0 (rows 0 to 2): an ok row has an all-zero pair_id"),
        ({"status": np.array([1, 1, 7, 2], np.uint8)}, "status, shard 0 (rows 2 to 2): a marked shard holds rows"),
        ({"reason": ["", "x", "", "y"]}, "reason, shard 0 (rows 1 to 1): an ok row has a quarantine reason"),
        ({"reason": [""] * 4}, "reason, shard 0 (rows 3 to 3): a quarantined row has no reason"),
        ({"tokens": np.full((4, 3), -1, np.int32)}, "tokens, shard 0 (rows 0 to 3): a token count is negative"),
    ],
)
def test_rows_that_contradict_themselves(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    write_changed(tmp_path, MANIFEST, 0, **change)
    assert one_problem(verify(tmp_path)).startswith(expected)


@pytest.mark.usefixtures("careless")
def test_quarantined_rows_hold_zeros(tmp_path: Path) -> None:
    block = make_block(MANIFEST, 0)
    rows, norm = block.diff[2].copy(), block.norm[2].copy()
    rows[3], norm[3] = 1, np.sqrt(6)
    write_changed(tmp_path, MANIFEST, 0, diff={**block.diff, 2: rows}, norm={**block.norm, 2: norm})
    found = [str(problem) for problem in verify(tmp_path).problems]
    assert [text.split(" (")[0] + text.split(")")[1].split(" (")[0] for text in found] == [
        "diff/2, shard 0: a quarantined row is not zero",
        "norm/2, shard 0: a quarantined row has a norm",
    ]


# The rest


class Recorder:
    def __init__(self) -> None:
        self.events: list[object] = []

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.events.append((stage, total, unit))

    def advance(self, done: int, **figures: float) -> None:
        self.events.append(done)

    def finish(self) -> None:
        self.events.append("finished")


def test_progress_is_counted_in_shards(root: Path) -> None:
    recorder = Recorder()
    verify(root, recorder)
    assert recorder.events == [("verify", 3, "shards"), 1, 1, 1, "finished"]


def test_what_cannot_be_opened(tmp_path: Path, root: Path) -> None:
    with pytest.raises(StoreError, match="no such store"):
        verify(tmp_path / "nothing")
    (root / "tokens/zarr.json").unlink()
    with pytest.raises(StoreDamagedError, match="array tokens"):
        verify(root)


def test_an_object_store(tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/acts.zarr"
    write_store(address, MANIFEST, [0, 1])
    assert verify(address).missing_shards == (2,) and not verify(address).problems
    write_store(address, MANIFEST)
    assert verify(address).ok
