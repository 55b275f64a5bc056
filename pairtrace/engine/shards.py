"""One shard of an extraction: which rows to compute, which to copy, and the block of arrays that results.

Legend: n rows of the shard, L layers, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.backend import Backend, OnPack
from pairtrace.engine.reduced import ReducingBackend, reduce_pooled
from pairtrace.engine.rendering import Quarantined, RenderedPair
from pairtrace.errors import StoreDamagedError
from pairtrace.store.layout import OK, QUARANTINED, to_float32
from pairtrace.store.reuse import PairIndex
from pairtrace.store.rows import RowReader
from pairtrace.store.writer import ShardBlock

OWN_STORE = -1


@dataclass(frozen=True, slots=True)
class Copy:
    """A row whose identical pair is already known.

    Attributes:
        position: row within the shard.
        store: index of the store that has it, or `OWN_STORE`.
        row: row there (in the data set, for the own store; it always comes before the copy).
    """

    position: int
    store: int
    row: int


@dataclass(frozen=True, slots=True)
class ShardWork:
    """A rendered shard, divided into rows to compute and rows to copy.

    Attributes:
        index: number of the shard.
        start: row of the data set that the shard begins with.
        rendered: one result per row.
        compute: positions of the rows that the model has to run.
        copies: rows that are known already.
    """

    index: int
    start: int
    rendered: list[RenderedPair | Quarantined]
    compute: list[int]
    copies: list[Copy]


class SeenPairs:
    """The pairs of all earlier shards, found by content: sorted 8-byte keys, 32 bytes a row."""

    def __init__(self) -> None:
        self._keys = np.empty(0, dtype=np.uint64)
        self._rows = np.empty(0, dtype=np.int64)
        self._ids = np.empty((0, 16), dtype=np.uint8)

    def add(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Add pairs.

        Args:
            ids: uint8 [n, 16].
            rows: int64 [n], their rows in the data set.
        """
        keys = _keys(ids)
        order = np.argsort(keys, kind="stable")
        # After equal keys: the first occurrence of a pair stays the one that is found.
        places = np.searchsorted(self._keys, keys[order], side="right")
        self._keys = np.insert(self._keys, places, keys[order])
        self._rows = np.insert(self._rows, places, rows[order])
        self._ids = np.insert(self._ids, places, ids[order], axis=0)

    def add_present(self, ids: np.ndarray, start: int) -> None:
        """Add the rows of a stored shard, uint8 [n, 16], that begins at row `start`; zeros are rows without an id."""
        places = np.flatnonzero(ids.any(axis=1))
        self.add(ids[places], start + places)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Row of the first identical pair, int64 [n]; -1 where there is none."""
        if not len(self._keys):
            return np.full(len(ids), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, _keys(ids)), len(self._keys) - 1)
        found = (self._ids[places] == ids).all(axis=1)
        return np.where(found, self._rows[places], -1)


def _keys(ids: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(ids[:, :8]).view("<u8").ravel()


def divide(
    index: int,
    start: int,
    rendered: list[RenderedPair | Quarantined],
    seen: SeenPairs,
    known: PairIndex | None,
) -> ShardWork:
    """Decide for every row of a shard whether it is computed or copied, and remember its pairs in `seen`.

    Only earlier rows and the stores in `known` are looked at, never what happens to be written already, so that a
    resumed run makes the same decisions, and therefore the same packs and the same bits, as an uninterrupted one.
    """
    positions = [i for i, result in enumerate(rendered) if isinstance(result, RenderedPair)]
    ids = pair_ids(rendered)[positions]
    earlier = seen.find(ids)
    store_of, row_of = known.find(ids) if known is not None else (np.full(len(ids), -1), np.full(len(ids), -1))
    compute: list[int] = []
    copies: list[Copy] = []
    first_here: dict[bytes, int] = {}
    for place, position in enumerate(positions):
        content = ids[place].tobytes()
        if store_of[place] >= 0:
            copies.append(Copy(position, int(store_of[place]), int(row_of[place])))
        elif earlier[place] >= 0:
            copies.append(Copy(position, OWN_STORE, int(earlier[place])))
        elif content in first_here:
            copies.append(Copy(position, OWN_STORE, start + first_here[content]))
        else:
            first_here[content] = position
            compute.append(position)
    seen.add(ids, start + np.asarray(positions, dtype=np.int64))
    return ShardWork(index, start, rendered, compute, copies)


def pair_ids(rendered: Sequence[RenderedPair | Quarantined]) -> np.ndarray:
    """Content ids of rendered rows, uint8 [n, 16]; zeros for quarantined ones."""
    ids = np.zeros((len(rendered), 16), dtype=np.uint8)
    for position, result in enumerate(rendered):
        if isinstance(result, RenderedPair):
            ids[position] = np.frombuffer(result.pair_id, dtype=np.uint8)
    return ids


def rendered_digest(rendered: Sequence[RenderedPair | Quarantined]) -> str:
    """BLAKE2b (hex) of what a shard was rendered to: tokens and sources of every row, reasons of quarantined ones."""
    digest = hashlib.blake2b(pair_ids(rendered).tobytes(), digest_size=16)
    for result in rendered:
        reason = result.reason if isinstance(result, Quarantined) else ""
        digest.update(f"{result.source}\0{reason}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def compute_block(
    work: ShardWork, backend: Backend | ReducingBackend, *, dtype: str, sides: bool, on_pack: OnPack | None = None
) -> ShardBlock:
    """Run the model over the rows to compute; rows to copy stay empty until `fill_copies`.

    For an int8 store the rows are float32: the writer rounds them once the copies are there too, because the scales
    belong to the whole shard.
    """
    count = len(work.rendered)
    layers, width = backend.layers, backend.width
    stored = np.uint16 if dtype == "bfloat16" else np.dtype(np.float32 if dtype == "int8" else dtype)
    names = ("diff", "chosen", "rejected") if sides else ("diff",)
    arrays = {name: {layer: np.zeros((count, width), dtype=stored) for layer in layers} for name in names}
    norm = {layer: np.zeros(count, dtype=np.float32) for layer in layers}
    status = np.full(count, OK, dtype=np.uint8)
    tokens = np.zeros((count, 3), dtype=np.int32)
    reason = [""] * count
    for position, result in enumerate(work.rendered):
        if isinstance(result, Quarantined):
            status[position] = QUARANTINED
            reason[position] = result.reason
        else:
            tokens[position] = result.prompt_tokens, result.chosen_tokens, result.rejected_tokens
    computed = [work.rendered[position] for position in work.compute]
    pairs = [result for result in computed if isinstance(result, RenderedPair)]
    assert len(pairs) == len(work.compute)
    if isinstance(backend, ReducingBackend):
        reduced = backend.reduce(pairs, dtype=dtype, sides=sides, on_pack=on_pack)
    else:
        reduced = reduce_pooled(backend.pool(pairs, on_pack), dtype, sides)
    for number, problem in reduced.problems.items():
        status[work.compute[number]] = QUARANTINED
        reason[work.compute[number]] = problem
    good = [number for number in range(len(pairs)) if number not in reduced.problems]
    rows = [work.compute[number] for number in good]
    for depth, layer in enumerate(layers):
        norm[layer][rows] = reduced.norm[good, depth]
        for name, values in (("diff", reduced.diff), ("chosen", reduced.chosen), ("rejected", reduced.rejected)):
            if name in arrays:
                assert values is not None
                arrays[name][layer][rows] = values[good, depth]
    return ShardBlock(
        index=work.index,
        pair_id=pair_ids(work.rendered),
        tokens=tokens,
        status=status,
        reason=reason,
        source=[result.source for result in work.rendered],
        diff=arrays["diff"],
        norm=norm,
        chosen=arrays.get("chosen"),
        rejected=arrays.get("rejected"),
    )


def fill_copies(block: ShardBlock, work: ShardWork, sources: Sequence[RowReader], own: RowReader) -> None:
    """Fill the rows of `block` that are copies; earlier shards of the own store must have been written.

    Only chunks that hold copied rows are read, and each chunk's checksum is compared before its first row is
    copied: the copy gets a checksum of its own, so damage would never be noticed again. In an int8 store a copied row
    is decoded, and rounded a second time with the scales of its new shard.

    Args:
        block: what `compute_block` gave; its rows to copy are filled in place.
        work: the same shard.
        sources: the stores that `Copy.store` counts, in the same order.
        own: the store that is being written; one reader for the whole run.

    Raises:
        StoreDamagedError: a chunk to copy from is damaged; the message names store, array, shard and rows.
    """
    outside: dict[int, list[Copy]] = {}
    for copy in work.copies:
        if copy.store == OWN_STORE and copy.row >= work.start:
            _copy_within(block, copy.position, copy.row - work.start)
        else:
            outside.setdefault(copy.store, []).append(copy)
    for store, copies in outside.items():
        if store == OWN_STORE:
            _copy_from(own, block, copies)
            continue
        try:
            _copy_from(sources[store], block, copies)
        except StoreDamagedError as error:
            raise StoreDamagedError(f"rows cannot be copied from a store of --reuse: {error}") from error


def _copy_from(reader: RowReader, block: ShardBlock, copies: Sequence[Copy]) -> None:
    positions = np.asarray([copy.position for copy in copies], dtype=np.int64)
    rows = np.asarray([copy.row for copy in copies], dtype=np.int64)
    status = reader.status(rows)
    block.status[positions] = status
    # An ok row has no reason, and text is slow to decode.
    quarantined = status == QUARANTINED
    reasons = reader.take("reason", rows[quarantined])
    for position, reason in zip(positions[quarantined].tolist(), reasons.tolist(), strict=True):
        block.reason[position] = reason
    for layer in block.diff:
        block.norm[layer][positions] = reader.take(f"norm/{layer}", rows)
        for name, arrays in (("diff", block.diff), ("chosen", block.chosen), ("rejected", block.rejected)):
            if arrays is not None:
                held, values = arrays[layer], reader.take(f"{name}/{layer}", rows)
                assert isinstance(held, np.ndarray)
                # Only an int8 run copies from stores of another dtype.
                held[positions] = values if held.dtype == values.dtype else to_float32(values)


def _copy_within(block: ShardBlock, position: int, original: int) -> None:
    block.status[position] = block.status[original]
    block.reason[position] = block.reason[original]
    for layer in block.diff:
        block.norm[layer][position] = block.norm[layer][original]
        for arrays in (block.diff, block.chosen, block.rejected):
            if arrays is not None:
                held = arrays[layer]
                assert isinstance(held, np.ndarray)
                held[position] = held[original]
