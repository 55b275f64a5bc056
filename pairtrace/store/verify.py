"""Reading everything in a store to find what is wrong with it.

Chunks are read through Zarr and its codecs, not through pairtrace's own reader, so that the two check each
other. Legend: N rows, D width, S rows per shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.layout import (
    OK,
    QUARANTINED,
    ROW_ARRAYS,
    ArraySpec,
    array_specs,
    nonfinite_rows,
    scale_names,
    to_float32,
)
from pairtrace.store.location import Location, StorePath, open_location
from pairtrace.store.lock import LOCK_KEY
from pairtrace.store.manifest import Manifest
from pairtrace.store.metadata import ZARR_JSON, require_manifest

if TYPE_CHECKING:
    import zarr

# Relative error of one rounding (with a factor 2 to spare) and the smallest positive number, per dtype: the
# norm was taken before rounding, and |norm(x + e) - norm(x)| <= norm(e).
_ROUNDING = {
    "float16": (2.0**-10, 2.0**-24),
    "bfloat16": (2.0**-7, 2.0**-126),
    "float32": (1e-5, 2.0**-126),
}

_NORM_ROWS = 64  # few enough to stay in the processor's cache


class ProgressLike(Protocol):
    """Receives progress; one stage, counted in shards."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage."""

    def advance(self, done: int, **figures: float) -> None:
        """Report `done` more units."""

    def finish(self) -> None:
        """End the stage."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        array: name of the array, or path of a file that belongs to none.
        shard: number of the shard, or None.
        rows: first row and the row after the last one concerned, or None.
        what: what is wrong.
    """

    array: str
    shard: int | None = None
    rows: tuple[int, int] | None = None
    what: str

    def __str__(self) -> str:
        where = "" if self.shard is None else f", shard {self.shard}"
        rows = "" if self.rows is None else f" (rows {self.rows[0]} to {self.rows[1] - 1})"
        return f"{self.array}{where}{rows}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: path or address of the store.
        rows: N.
        shards: number of shards.
        missing_shards: shards without a mark; they make the report not `ok`, but nothing is damaged.
        problems: everything that is wrong.
    """

    path: str
    rows: int
    shards: int
    missing_shards: tuple[int, ...]
    problems: tuple[Problem, ...]

    @property
    def complete(self) -> bool:
        """Whether every shard has its mark."""
        return not self.missing_shards

    @property
    def ok(self) -> bool:
        """Whether the store is complete and nothing is wrong."""
        return self.complete and not self.problems


def verify(path: StorePath, progress: ProgressLike | None = None) -> VerifyReport:
    """Read every chunk of every marked shard and check bytes, values and their agreement.

    Found are: a flipped bit anywhere in a chunk (crc32c); missing, truncated and foreign files; NaN or
    infinities in ok rows; a norm that does not belong to its difference; an ok row without `pair_id`; status,
    reason and zeroed rows that contradict each other.

    Args:
        path: directory, or address of an object store.
        progress: receives `start`, `advance` and `finish`, counted in shards.

    Raises:
        StoreError: there is no store at `path`, or its metadata is damaged or of another schema version.
    """
    location = open_location(path)
    manifest = require_manifest(location)
    specs = array_specs(manifest)
    group = location.open_group("r")
    status = specs["status"]
    problems = list(_foreign_keys(location, specs))
    missing = []
    if progress is not None:
        progress.start("verify", status.shards, "shards")
    for shard in range(status.shards):
        if location.size(status.key(shard)) is None:
            missing.append(shard)
        else:
            problems += _check_shard(location, group, manifest, specs, shard)
        if progress is not None:
            progress.advance(1, problems=len(problems))
    if progress is not None:
        progress.finish()
    return VerifyReport(
        path=location.name,
        rows=manifest.rows,
        shards=status.shards,
        missing_shards=tuple(missing),
        problems=tuple(problems),
    )


def _foreign_keys(location: Location, specs: dict[str, ArraySpec]) -> Iterator[Problem]:
    # Every array, and every group on the way to one.
    nodes = {parent.as_posix() for name in specs for parent in (PurePosixPath(name), *PurePosixPath(name).parents)}
    known = {LOCK_KEY, *(PurePosixPath(node, ZARR_JSON).as_posix() for node in nodes)}
    known |= {spec.key(shard) for spec in specs.values() for shard in range(spec.shards)}
    for key in location.list_keys():
        if key not in known:
            yield Problem(array=key, what="this file does not belong to the store")


def _check_shard(
    location: Location, group: zarr.Group, manifest: Manifest, specs: dict[str, ArraySpec], shard: int
) -> Iterator[Problem]:
    span = specs["status"].span(shard)
    small: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        if name.partition("/")[0] in ROW_ARRAYS:
            continue
        try:
            small[name] = _read(location, group, spec, shard)
        except ValueError as error:
            yield Problem(array=name, shard=shard, rows=span, what=str(error))
    yield from _check_rows(small, shard, span)
    for name, spec in specs.items():
        if name.partition("/")[0] not in ROW_ARRAYS:
            continue
        try:
            rows = _read(location, group, spec, shard)
        except ValueError as error:
            yield Problem(array=name, shard=shard, rows=span, what=str(error))
            continue
        scales = scale_names(name) if manifest.dtype == "int8" else ()
        if {"status", *scales} <= set(small):
            scaled = ScaledRows(rows, small[scales[0]], small[scales[1]][0]) if scales else rows
            yield from _check_vectors(name, scaled, small, manifest, shard, span)


def _read(location: Location, group: zarr.Group, spec: ArraySpec, shard: int) -> np.ndarray:
    """One shard of one array through Zarr, which checks the crc32c.

    Raises:
        ValueError: the chunk is missing, has the wrong length or checksum; the message says which.
    """
    size = location.size(spec.key(shard))
    if size is None:
        raise ValueError("its chunk is missing")
    if spec.chunk_bytes is not None and size != spec.chunk_bytes:
        raise ValueError(f"its chunk has {size} bytes instead of {spec.chunk_bytes}")
    start, stop = spec.span(shard)
    array: Any = group[spec.name]
    try:
        values = array[start:stop]
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"its chunk cannot be decoded ({error})") from error
    return np.asarray(values)


def _check_rows(small: dict[str, np.ndarray], shard: int, span: tuple[int, int]) -> Iterator[Problem]:
    if "status" not in small:
        return
    status = small["status"]
    ok, quarantined = status == OK, status == QUARANTINED

    def problem(name: str, bad: np.ndarray, what: str) -> Iterator[Problem]:
        yield from _row_problem(name, bad, what, shard, span)

    yield from problem("status", ~(ok | quarantined), "a marked shard holds rows that are neither ok nor quarantined")
    if "pair_id" in small:
        yield from problem("pair_id", ok & (small["pair_id"].max(axis=1) == 0), "an ok row has an all-zero pair_id")
    if "tokens" in small:
        yield from problem("tokens", small["tokens"].min(axis=1) < 0, "a token count is negative")
    if "reason" in small:
        has_reason = np.array([text != "" for text in small["reason"].tolist()], dtype=bool)
        yield from problem("reason", ok & has_reason, "an ok row has a quarantine reason")
        yield from problem("reason", quarantined & ~has_reason, "a quarantined row has no reason")


def _check_vectors(
    name: str,
    rows: np.ndarray | ScaledRows,
    small: dict[str, np.ndarray],
    manifest: Manifest,
    shard: int,
    span: tuple[int, int],
) -> Iterator[Problem]:
    kind, _, layer = name.partition("/")
    status = small["status"]
    ok = status == OK
    bad = nonfinite_rows(rows, manifest.dtype)
    yield from _row_problem(name, ok & bad, "an ok row holds NaN or infinity", shard, span)
    moved = status == QUARANTINED
    # Zero itself, also among the int8 values: their scale may not hide what a quarantined row must not hold.
    stored = rows.values if isinstance(rows, ScaledRows) else rows
    moved[moved] = (to_float32(stored[moved]) != 0).any(axis=1)
    yield from _row_problem(name, moved, "a quarantined row is not zero", shard, span)
    norm_name = f"norm/{layer}"
    if kind != "diff" or norm_name not in small:
        return
    written = small[norm_name].astype(np.float64)
    yield from _row_problem(
        norm_name, (status == QUARANTINED) & (written != 0), "a quarantined row has a norm", shard, span
    )
    recomputed = np.empty(len(rows))
    for start in range(0, len(rows), _NORM_ROWS):
        wide = to_float32(rows[start : start + _NORM_ROWS]).astype(np.float64)
        recomputed[start : start + _NORM_ROWS] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    allowed = _allowed(rows, recomputed, manifest.dtype)
    # Written this way round, a NaN norm is a problem as well.
    differs = ok & ~bad & ~(np.abs(written - recomputed) <= allowed)
    yield from _row_problem(norm_name, differs, "the norm does not belong to the difference", shard, span)


def _row_problem(name: str, bad: np.ndarray, what: str, shard: int, span: tuple[int, int]) -> Iterator[Problem]:
    places = np.flatnonzero(bad)
    if places.size:
        first, last = span[0] + int(places[0]), span[0] + int(places[-1])
        many = f" ({places.size} such rows, the first is row {first})"
        yield Problem(array=name, shard=shard, rows=(first, last + 1), what=what + many)


def _allowed(rows: np.ndarray | ScaledRows, norms: np.ndarray, dtype: str) -> np.ndarray:
    """By how much the norm before rounding may differ from that of the rounded row: by the norm of what was lost."""
    if isinstance(rows, ScaledRows):
        # A column of zeros has a scale of 1 and lost nothing.
        columns = float(np.linalg.norm(rows.column_scale.astype(np.float64)[rows.values.any(axis=0)]))
        # Half a step in every column; twice that, because a copied row was rounded twice.
        absolute = rows.row_scale.astype(np.float64) * columns
        relative = _ROUNDING["bfloat16"][0]
    else:
        relative, tiny = _ROUNDING[dtype]
        absolute = np.full(len(rows), tiny * np.sqrt(rows.shape[1]))
    allowed: np.ndarray = relative * norms + absolute
    return allowed
