"""Reading everything in a store to find what is wrong with it.

Chunks are read with pairtrace's own reader, several shards at a time; one shard is read through Zarr and its codecs as
well. Legend: N rows, S rows per shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.advice import repair_advice
from pairtrace.store.checks import Problem, check_rows, check_scales, check_vectors, coarser
from pairtrace.store.chunks import decode
from pairtrace.store.layout import ROW_ARRAYS, ArraySpec, array_specs, is_scaled, scale_names
from pairtrace.store.location import Location, StorePath, open_location
from pairtrace.store.lock import LOCK_KEY
from pairtrace.store.manifest import Manifest
from pairtrace.store.metadata import ZARR_JSON, require_manifest
from pairtrace.store.read_ahead import ahead

# Shards that are read and checked at the same time, and so in memory.
_THREADS = 8


class ProgressLike(Protocol):
    """Receives progress; one stage, counted in shards."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin a stage."""

    def advance(self, done: int, **figures: float) -> None:
        """Report `done` more units."""

    def finish(self) -> None:
        """End the stage."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: path or address of the store.
        rows: N.
        shards: number of shards.
        missing_shards: shards without a mark; they make the report not `ok`, but nothing is damaged.
        problems: everything that is wrong.
        advice: how to have rows made again, in words that go behind "and".
    """

    path: str
    rows: int
    shards: int
    missing_shards: tuple[int, ...]
    problems: tuple[Problem, ...]
    advice: str

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
    status = specs["status"]
    problems = list(_foreign_keys(location, specs))
    missing: list[int] = []
    compared = False
    if progress is not None:
        progress.start("verify", status.shards, "shards")

    def check(shard: int) -> list[Problem] | None:
        if location.size(status.key(shard)) is None:
            return None
        return list(_check_shard(location, manifest, specs, shard))

    threads = max(2, min(_THREADS, os.cpu_count() or 1))
    for shard, found in ahead(range(status.shards), check, count=threads, threads=threads):
        if found is None:
            missing.append(shard)
        else:
            problems += found
            if not found and not compared:
                problems += _compare_with_zarr(location, specs, shard)
                compared = True
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
        advice=repair_advice(manifest, location.name),
    )


def _foreign_keys(location: Location, specs: dict[str, ArraySpec]) -> Iterator[Problem]:
    # Every array, and every group on the way to one.
    nodes = {parent for name in specs for parent in (PurePosixPath(name), *PurePosixPath(name).parents)}
    known = {LOCK_KEY, *((node / ZARR_JSON).as_posix() for node in nodes)}
    known |= {spec.key(shard) for spec in specs.values() for shard in range(spec.shards)}
    for key in location.list_keys():
        if key not in known:
            yield Problem(array=key, what="this file does not belong to the store")


def _check_shard(location: Location, manifest: Manifest, specs: dict[str, ArraySpec], shard: int) -> Iterator[Problem]:
    span = specs["status"].span(shard)
    small: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        if not _is_vectors(name):
            try:
                small[name] = _read(location, spec, shard)
            except ValueError as error:
                yield Problem(array=name, shard=shard, rows=span, what=str(error))
    yield from check_rows(small, shard, span)
    for name in filter(_is_vectors, specs):
        try:
            rows: np.ndarray | ScaledRows = _read(location, specs[name], shard)
        except ValueError as error:
            yield Problem(array=name, shard=shard, rows=span, what=str(error))
            continue
        if is_scaled(name, specs):
            row_scale, column_scale = (small.get(scale) for scale in scale_names(name))
            if row_scale is None or column_scale is None:
                continue
            yield from check_scales(row_scale, column_scale, name, shard, span)
            assert isinstance(rows, np.ndarray)
            rows = ScaledRows(rows, row_scale, column_scale[0])
        if "status" in small:
            rounded = coarser(manifest.dtype, manifest.converted_from)
            yield from check_vectors(name, rows, small, rounded, shard, span)


def _is_vectors(name: str) -> bool:
    return name.partition("/")[0] in ROW_ARRAYS


def _read(location: Location, spec: ArraySpec, shard: int) -> np.ndarray:
    """One shard of one array, its checksum compared.

    Raises:
        ValueError: the chunk is missing or damaged; the message says how.
    """
    # Not mapped: where a disk fails, reading is an error, but looking at a mapped page the end of the process.
    raw = location.read(spec.key(shard), mapped=False)
    if raw is None:
        raise ValueError("its chunk is missing")
    return decode(raw, spec, shard, checksum=True)


def _compare_with_zarr(location: Location, specs: dict[str, ArraySpec], shard: int) -> Iterator[Problem]:
    """Read one sound shard through Zarr and its codecs as well, so that the two readers check each other.

    All shards have the same form. Reading every one of them this way would take several times as long: Zarr copies
    each chunk, and computes its checksum with Python's lock held.
    """
    group = location.open_group("r")
    for name, spec in specs.items():
        start, stop = spec.span(shard)
        array: Any = group[name]
        try:
            theirs = np.asarray(array[start:stop])
        except (ValueError, RuntimeError, OSError) as error:
            yield Problem(array=name, shard=shard, rows=spec.pair_span(shard), what=f"Zarr cannot read it ({error})")
            continue
        ours = _read(location, spec, shard)
        if not spec.is_text:  # bits are compared: there may be NaN
            theirs, ours = (np.ascontiguousarray(values).reshape(-1).view(np.uint8) for values in (theirs, ours))
        if not np.array_equal(theirs, ours):
            yield Problem(
                array=name, shard=shard, rows=spec.pair_span(shard), what="Zarr reads other values than pairtrace"
            )
