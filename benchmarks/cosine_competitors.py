"""What computes cosines of many rows: pairtrace and others, each in the fastest form that its documentation offers.

Letters: N rows, D width, K directions.

A competitor is a function of rows [n, D] and directions [K, D] that goes through the rows in blocks and yields the
scores [block, K]; nothing keeps more than a block. Where a library wants float32, rows are converted block by block
(which is in its favour: the whole would not fit the cache, and at full size hardly the memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from harness import optional

from pairtrace.kernels.cosine import cosine_blocks
from pairtrace.kernels.int8 import ScaledRows

Blocks = Callable[[Any, np.ndarray], Iterator[np.ndarray]]
# Rows per call of a library that reads rows as they are: its scores, float64, have to fit.
CALL_ROWS = 65_536
PIECE_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One way to compute the scores.

    Attributes:
        name: of the way.
        family: of the library, of which the fastest way counts.
        blocks: the function.
        dtype: of the rows, "float16" or "int8".
        exact: whether it computes the cosine of the rows as they are stored.
        most_directions: K above which it is hopeless and left out.
        note: what has to be known about its figures.
    """

    name: str
    family: str
    blocks: Blocks
    dtype: str = "float16"
    exact: bool = True
    most_directions: int = 4096
    note: str = ""


def in_float32(block_rows: int, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Blocks:
    def blocks(rows: np.ndarray, directions: np.ndarray) -> Iterator[np.ndarray]:
        units = np.ascontiguousarray((directions / np.linalg.norm(directions, axis=1, keepdims=True)).T)
        for start in range(0, len(rows), block_rows):
            yield score(rows[start : start + block_rows], units)

    return blocks


def _numpy_block(rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float32)
    scores: np.ndarray = wide @ units
    scores /= np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    return scores


def _torch_block(rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(rows).float()
    scores: np.ndarray = (wide @ torch.from_numpy(units)).div_(wide.norm(dim=1, keepdim=True)).numpy()
    return scores


def _cosine_similarity(rows: np.ndarray, directions: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), 256):
        block = torch.from_numpy(rows[start : start + 256]).float()
        columns = [torch.cosine_similarity(block, one[None], dim=1) for one in torch.from_numpy(directions)]
        yield torch.stack(columns, dim=1).numpy()


def _pairtrace(rows: np.ndarray | ScaledRows, directions: np.ndarray) -> Iterator[np.ndarray]:
    for _, scores in cosine_blocks(rows, directions):
        yield scores


def competitors(threads: int, norms: np.ndarray) -> list[Competitor]:
    """Everything that takes rows as they are; FAISS, which needs an index, is apart.

    Args:
        threads: of every competitor.
        norms: float32 [N], of the rows before they were rounded to int8; a store keeps them.
    """

    def with_norms(rows: Any, directions: np.ndarray) -> Iterator[np.ndarray]:
        for _, scores in cosine_blocks(rows, directions, norms=norms[: len(rows)]):
            yield scores

    found = [
        Competitor(name="pairtrace", family="pairtrace", blocks=_pairtrace),
        Competitor(name="pairtrace, int8, own norms", family="pairtrace", dtype="int8", blocks=_pairtrace),
        Competitor(
            name="pairtrace, int8",
            family="pairtrace",
            dtype="int8",
            blocks=with_norms,
            note="with the norms from before the rounding, which a store keeps and pairtrace score uses",
        ),
        Competitor(
            name="torch cosine_similarity",
            family="torch cosine_similarity",
            blocks=_cosine_similarity,
            most_directions=8,
            note="float32 blocks of 256 rows, one direction at a time",
        ),
    ]
    for size in (256, 2048):
        note = f"float32 blocks of {size} rows"
        for family, score in (("NumPy", _numpy_block), ("torch matmul + norm", _torch_block)):
            blocks = in_float32(size, score)
            found.append(Competitor(name=f"{family}, blocks of {size}", family=family, blocks=blocks, note=note))
    return [*found, *numkong_competitors(threads, "float16"), *numkong_competitors(threads, "int8")]


def numkong_competitors(threads: int, dtype: str) -> list[Competitor]:
    """NumKong's two ways for many rows, the plain one and the packed one.

    Its int8 form knows no scales, neither in the dot product nor in the norm: the same bytes, less work.
    """
    numkong = optional("numkong")
    if numkong is None:
        return []

    def prepared(rows: Any, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if dtype == "float16":
            return rows, directions.astype(np.float16)
        largest = np.abs(directions).max(axis=1, keepdims=True)
        return rows.values, np.rint(directions / largest * 127).astype(np.int8)

    def plain(rows: Any, directions: np.ndarray) -> Iterator[np.ndarray]:
        values, narrow = prepared(rows, directions)
        for start in range(0, len(values), CALL_ROWS):
            part = values[start : start + CALL_ROWS]
            yield 1 - np.asarray(numkong.cdist(part, narrow, "angular", threads=threads, out_dtype="float32"))

    def packed(rows: Any, directions: np.ndarray) -> Iterator[np.ndarray]:
        values, narrow = prepared(rows, directions)
        pack = numkong.dots_pack(narrow, dtype=dtype)
        for start in range(0, len(values), CALL_ROWS):
            yield 1 - np.asarray(numkong.angulars_packed(values[start : start + CALL_ROWS], pack, threads=threads))

    note = "" if dtype == "float16" else "ignores the scales of int8 rows"
    return [
        Competitor(name=f"{name}, {dtype}", family="NumKong", dtype=dtype, exact=not note, blocks=blocks, note=note)
        for name, blocks in (("NumKong cdist", plain), ("NumKong angulars_packed", packed))
    ]


class FaissPieces:
    """A FAISS index over normalized rows, in pieces of a few thousand rows, so that any number of them can be searched.

    FAISS gives the ten best rows per direction, not the scores. One query runs on one thread inside FAISS; pieces
    searched by threads of our own keep all cores busy, and with many queries FAISS's threads are tried as well.

    Attributes:
        name: of the kind of index.
        most_directions: K above which it is left out.
    """

    BEST = 10

    def __init__(self, faiss: ModuleType, kind: str, rows: np.ndarray, pieces: int, threads: int) -> None:
        self.name = f"FAISS {'flat' if kind == 'flat' else kind}"
        # A scalar quantizer decodes every row again for every direction.
        self.most_directions = 4096 if kind == "flat" else 100
        self._faiss = faiss
        self._threads = threads
        width = rows.shape[1]
        wide = rows[:PIECE_ROWS].astype(np.float32)
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        self.piece_rows = len(wide)
        self._indexes = []
        for _ in range(pieces):
            if kind == "flat":
                index = faiss.IndexFlatIP(width)
            else:
                quantizer = getattr(faiss.ScalarQuantizer, kind)
                index = faiss.IndexScalarQuantizer(width, quantizer, faiss.METRIC_INNER_PRODUCT)
                index.train(wide)
            index.add(wide)
            self._indexes.append(index)
        # FAISS keeps the number of threads per calling thread.
        self._pool = ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,))

    @property
    def rows(self) -> int:
        """Rows of all pieces."""
        return self.piece_rows * len(self._indexes)

    def search(self, directions: np.ndarray, rows: int, *, across: bool) -> tuple[np.ndarray, np.ndarray]:
        """The best of the first rows: scores [K, 10] and row numbers.

        `across`: pieces on threads of our own, FAISS on one thread in each; otherwise FAISS's own threads.
        """
        units = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
        indexes = self._indexes[: max(1, rows // self.piece_rows)]
        if across:
            found = list(self._pool.map(lambda index: index.search(units, self.BEST), indexes))
        else:
            self._faiss.omp_set_num_threads(self._threads)
            found = [index.search(units, self.BEST) for index in indexes]
        scores = np.concatenate([part for part, _ in found], axis=1)
        numbers = np.concatenate([part + place * self.piece_rows for place, (_, part) in enumerate(found)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.BEST]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(numbers, best, axis=1)
