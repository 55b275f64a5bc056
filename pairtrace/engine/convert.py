"""Conversion of a store to another dtype or codec, with a report of what that does to scores.

Letters: N pairs, n rows of a shard, D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.fidelity import (
    LOWEST_OVERLAP,
    LOWEST_SPEARMAN,
    RANDOM_DIRECTIONS,
    DirectionFidelity,
    compare,
    fidelity_directions,
)
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rounding import DIGITS, LARGEST, round_rows
from pairtrace.errors import ConfigError, StoreDamagedError, StoreMismatchError
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.kernels.norms import row_norms
from pairtrace.store.codecs import parse_codec
from pairtrace.store.layout import ROW_ARRAYS, to_float32
from pairtrace.store.manifest import DTYPES, SCHEMA_VERSION, Manifest
from pairtrace.store.reader import ActivationStore
from pairtrace.store.rows import RowReader
from pairtrace.store.writer import ShardBlock, StoreWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `convert` does.

    Attributes:
        source: path of a complete store.
        out: path of the store to make or resume.
        dtype: of its rows; None keeps that of the source.
        codec: of its rows; None keeps that of the source.
        directions: direction files for the report; without any, random directions and the mean row of the store.
        layer: only this layer in the report; None for every layer that the store and all behaviours have. All layers
            are converted in any case.
        fsync: force each shard to disk before it is marked.
    """

    source: str
    out: str
    dtype: str | None = None
    codec: str | None = None
    directions: tuple[str, ...] = ()
    layer: int | None = None
    fsync: bool = True

    def __post_init__(self) -> None:
        if self.dtype is None and self.codec is None:
            raise ConfigError("nothing to convert to: give --dtype, --codec or both")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.codec is not None:
            parse_codec(self.codec)
        if _same_place(self.source, self.out):
            raise ConfigError(f"{self.out} is the store to convert; choose another DST")


@dataclass(frozen=True, kw_only=True)
class ConvertSummary:
    """What a conversion did.

    Attributes:
        source: the store converted.
        out: the store made.
        rows: N.
        dtype_before, dtype_after: of their rows.
        codec_before, codec_after: of their rows.
        bytes_before, bytes_after: on disk.
        shards: shards of the store.
        converted: shards that this run converted.
        already_complete: whether there was nothing left to convert.
        seconds: wall time of the conversion.
        compared_on: where the directions of the report came from.
        fidelity: agreement of the scores, per behaviour and layer.
    """

    source: str
    out: str
    rows: int
    dtype_before: str
    dtype_after: str
    codec_before: str
    codec_after: str
    bytes_before: int
    bytes_after: int
    shards: int
    converted: int
    already_complete: bool
    seconds: float
    compared_on: str
    fidelity: tuple[DirectionFidelity, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return {**asdict(self), "fidelity": [asdict(one) for one in self.fidelity]}

    def to_rounded_dict(self) -> dict[str, Any]:
        """`to_dict` for people: correlations with the digits that tell them from 1."""
        figures = self.to_dict()
        for one in figures["fidelity"]:
            for name in ("spearman", "top_overlap", "largest_difference"):
                one[name] = _shown(one[name])
        return figures


def convert(config: ConvertConfig, progress: Progress = NULL_PROGRESS) -> ConvertSummary:
    """Write the rows of a store in another dtype or codec, resuming what an earlier run left unfinished.

    Ids, token counts, status, reasons, sources and norms stay as they are.

    Raises:
        ConfigError: the new store would be the old one, or a value does not fit into the new dtype (found before
            anything is written).
        DirectionError: a direction cannot be used with the store.
        LayerError: a layer is not in the store.
        StoreError: the source cannot be read, is incomplete or damaged; the new store cannot be written, or was made
            from something else.
    """
    begun = time.perf_counter()
    source = ActivationStore.open(config.source)
    place = config.source if "://" in config.source else str(Path(config.source).resolve())
    manifest = converted_manifest(source.manifest, place, config.dtype, config.codec)
    # Before the long work, so that a direction that cannot be used costs nothing.
    directions = fidelity_directions(source, config.directions, config.layer, progress)
    converted = _write(config, source, manifest, progress)
    seconds = time.perf_counter() - begun
    after = ActivationStore.open(config.out)
    shards = len(after.finished_shards())
    if not converted:
        logger.info("%s is already converted, all %s rows: nothing to do", config.out, f"{after.rows:,}")
    if not config.directions:
        logger.info(
            "scores are compared on %d random directions and the mean row of the store; with --directions on your own",
            RANDOM_DIRECTIONS,
        )
    fidelity = tuple(compare(source, after, directions, progress))
    _warn(config.out, fidelity)
    return ConvertSummary(
        source=config.source,
        out=config.out,
        rows=after.rows,
        dtype_before=source.manifest.dtype,
        dtype_after=after.manifest.dtype,
        codec_before=source.manifest.codec,
        codec_after=after.manifest.codec,
        bytes_before=source.summary()["bytes"],
        bytes_after=after.summary()["bytes"],
        shards=shards,
        converted=converted,
        already_complete=not converted,
        seconds=seconds,
        compared_on=", ".join(config.directions) or "random directions and the mean row",
        fidelity=fidelity,
    )


def converted_manifest(manifest: Manifest, place: str, dtype: str | None, codec: str | None) -> Manifest:
    """The manifest of the new store: identity of data and model as before, and what its rows came from.

    Args:
        manifest: of the source.
        place: absolute path or address of the source.
        dtype, codec: of the new store; None keeps that of the source.

    Raises:
        ConfigError: nothing would change.
    """
    new_dtype, new_codec = dtype or manifest.dtype, codec or manifest.codec
    if (new_dtype, new_codec) == (manifest.dtype, manifest.codec):
        raise ConfigError(f"the store is already {new_dtype} with codec {new_codec}: there is nothing to convert")
    origin = manifest.converted_from
    if new_dtype != manifest.dtype:
        # After several conversions the coarsest of them decides what the rows are worth.
        origin = min(filter(None, (manifest.dtype, manifest.converted_from)), key=DIGITS.__getitem__)
        if DIGITS[new_dtype] > DIGITS[manifest.dtype]:
            logger.info("%s rows become %s: digits that were rounded away do not come back", manifest.dtype, new_dtype)
    return replace(
        manifest,
        schema_version=SCHEMA_VERSION,
        dtype=new_dtype,
        codec=new_codec,
        converted_from=origin,
        source_store={"path": place, "dtype": manifest.dtype, "codec": manifest.codec},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _write(config: ConvertConfig, source: ActivationStore, manifest: Manifest, progress: Progress) -> int:
    """Convert the shards that are missing; returns how many."""
    rows = source.row_reader()
    before, after = source.manifest.dtype, manifest.dtype
    if LARGEST[after] < LARGEST[before]:
        for shard in source.finished_shards():
            _check_range(rows, shard, after)
    with StoreWriter.create_or_resume(config.out, manifest, fsync=config.fsync) as writer:
        if writer.manifest.shard_rows != manifest.shard_rows:
            raise StoreMismatchError(
                "shard_rows", manifest.shard_rows, writer.manifest.shard_rows, "choose another DST"
            )
        missing = writer.missing_shards()
        progress.start("convert", len(missing), "shards")
        for shard in missing:
            writer.write_shard(_converted(rows, shard, before, after))
            progress.advance(1)
        progress.finish()
    return len(missing)


def _converted(rows: RowReader, shard: int, before: str, after: str) -> ShardBlock:
    manifest = rows.manifest
    vectors: dict[str, dict[int, np.ndarray | ScaledRows]] = {}
    for array, layer, name in _vector_names(manifest):
        stored = rows.vectors(name, shard)
        if not np.isfinite(row_norms(stored)).all():
            raise StoreDamagedError(
                f"array {name} of the store to convert holds values that are not finite in shard {shard}; "
                "`pairtrace store verify` shows them"
            )
        vectors.setdefault(array, {})[layer] = round_rows(stored, before, after)
    return ShardBlock(
        index=shard,
        **{name: rows.chunk(name, shard) for name in ("pair_id", "tokens", "status")},
        reason=rows.chunk("reason", shard).tolist(),
        source=rows.chunk("source", shard).tolist(),
        norm={layer: rows.chunk(f"norm/{layer}", shard) for layer in manifest.layers},
        diff=vectors["diff"],
        chosen=vectors.get("chosen"),
        rejected=vectors.get("rejected"),
    )


def _check_range(rows: RowReader, shard: int, dtype: str) -> None:
    """Refuse values that are finite in the source and would not be in the new store."""
    for array, layer, name in _vector_names(rows.manifest):
        # No value exceeds the norm of its row, so that most shards need not be read for this.
        if array == "diff" and (rows.chunk(f"norm/{layer}", shard) < 0.9 * LARGEST[dtype]).all():
            continue
        peaks = np.abs(to_float32(rows.vectors(name, shard))).max(axis=1)
        too_large = np.flatnonzero(peaks > LARGEST[dtype])
        if too_large.size:
            row = shard * rows.manifest.shard_rows + int(too_large[0])
            raise ConfigError(
                f"row {row} of {name} holds a value of {peaks[too_large[0]]:.4g}, which does not fit into {dtype} "
                f"(at most {LARGEST[dtype]:.4g}); use --dtype bfloat16 or float32. Nothing was written"
            )


def _vector_names(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Kind, layer and name of the arrays that hold vectors."""
    for array in ROW_ARRAYS if manifest.sides else ("diff",):
        for layer in manifest.layers:
            yield array, layer, f"{array}/{layer}"


def _warn(out: str, fidelity: Sequence[DirectionFidelity]) -> None:
    for one in fidelity:
        if not one.sufficient:
            logger.warning(
                "%s: scores of %r at layer %d differ from those of the source: Spearman %s (expected at least %s), "
                "overlap of the top %d rows %s (at least %s), rows with a score in only one store: %d",
                out, one.behavior, one.layer, _shown(one.spearman), LOWEST_SPEARMAN,
                one.top_rows, _shown(one.top_overlap), LOWEST_OVERLAP, one.without_score,
            )  # fmt: skip


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _same_place(first: str, second: str) -> bool:
    if "://" in first or "://" in second:
        return first.rstrip("/") == second.rstrip("/")
    return Path(first).resolve() == Path(second).resolve()
