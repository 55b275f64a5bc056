"""Scores of one block of rows with every behaviour, wherever the block is: here or on a worker of a cluster.

Legend: N pairs, n rows of a block, D width, K directions, B behaviours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pairtrace.engine.directions import Direction
from pairtrace.kernels.checksum import crc32c
from pairtrace.kernels.cosine import UnitDirections, cosine_max, cosine_scores, prepare_directions
from pairtrace.kernels.cosine_checked import cosine_scores_and_checksum
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.chunks import UncheckedChunk
from pairtrace.store.reader import ActivationStore

# A disk reads fastest with some 60 MB asked for; a compressed store has as many decoded shards in memory.
_READ_AHEAD = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """All that a block of rows needs to get its scores.

    Attributes:
        vectors: float32 [K, D], the behaviours with one direction, scored together in one pass; None without any.
        vector_columns: their columns in the result.
        banks: float32 [K, D] per behaviour whose score is the maximum over its directions.
        bank_columns: their columns in the result.
        row_dtype: "bfloat16" for a store of that type, else None.
    """

    vectors: np.ndarray | None
    vector_columns: tuple[int, ...]
    banks: tuple[np.ndarray, ...]
    bank_columns: tuple[int, ...]
    row_dtype: Any

    @classmethod
    def of(cls, directions: Sequence[Direction], dtype: str) -> Scorer:
        """For behaviours in the order of their columns, and the `dtype` of a store."""
        single = [column for column, direction in enumerate(directions) if direction.kind == "vector"]
        several = [column for column, direction in enumerate(directions) if direction.kind == "bank"]
        return cls(
            vectors=np.concatenate([directions[column].values for column in single]) if single else None,
            vector_columns=tuple(single),
            banks=tuple(directions[column].values for column in several),
            bank_columns=tuple(several),
            row_dtype="bfloat16" if dtype == "bfloat16" else None,
        )

    def scores(
        self, rows: np.ndarray | ScaledRows, norms: np.ndarray | None = None, chunk: UncheckedChunk | None = None
    ) -> np.ndarray:
        """Cosine, or its maximum over a bank: float32 [n, B], NaN where a row has none.

        The same rows give the same bits wherever and however often they are scored.

        Args:
            rows: n rows of the store.
            norms: float32 [n] norms from before the rounding, for int8 rows: their cosines need no sum of squares then.
            chunk: where the rows come from, if its checksum is still to be compared.

        Raises:
            StoreDamagedError: the chunk has another checksum.
        """
        block = np.empty((len(rows), len(self.vector_columns) + len(self.banks)), np.float32)
        vectors, banks = self._units
        if chunk is not None and vectors is not None and norms is None:
            # Checksum and scores read the rows from memory together.
            scores, checksum = cosine_scores_and_checksum(rows, vectors, chunk.body, row_dtype=self.row_dtype)
            chunk.compare(checksum)
            block[:, self.vector_columns] = scores
        else:
            if chunk is not None:
                chunk.compare(crc32c(chunk.body))
            if vectors is not None:
                block[:, self.vector_columns] = cosine_scores(rows, vectors, norms=norms, row_dtype=self.row_dtype)
        for column, bank in zip(self.bank_columns, banks, strict=True):
            block[:, column] = cosine_max(rows, bank, norms=norms, row_dtype=self.row_dtype)
        return block

    @cached_property
    def _units(self) -> tuple[UnitDirections | None, tuple[UnitDirections, ...]]:
        """Vectors and banks divided by their norms, once for all blocks; made where the blocks are."""
        vectors = None if self.vectors is None else prepare_directions(self.vectors)
        return vectors, tuple(prepare_directions(bank) for bank in self.banks)


def local_scores(
    store: ActivationStore, layer: int, scorer: Scorer, *, checksum: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and scores float32 [n, B] of the finished shards of a store, in order."""
    norms = rounding_norms(store, layer)
    blocks: Iterator[tuple[int, np.ndarray | ScaledRows, UncheckedChunk | None]]
    if checksum:
        blocks = store.blocks_to_check(layer, read_ahead=_READ_AHEAD)
    else:
        unchecked = store.blocks(layer, checksum=False, read_ahead=_READ_AHEAD)
        blocks = ((start, rows, None) for start, rows in unchecked)
    for start, rows, chunk in blocks:
        yield start, scorer.scores(rows, None if norms is None else norms[start : start + len(rows)], chunk)


def rounding_norms(store: ActivationStore, layer: int) -> np.ndarray | None:
    """The norms float32 [N] that an int8 store is scored with; None for other dtypes, whose rows give their own."""
    return store.norms(layer) if store.manifest.dtype == "int8" else None
