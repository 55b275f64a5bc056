"""What can be wrong with the values of one shard, once its bytes are those that were written.

Legend: n rows of the shard, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pairtrace.kernels.int8 import ScaledRows
from pairtrace.kernels.norms import row_norms
from pairtrace.store.layout import OK, QUARANTINED, scale_names

# Relative error of one rounding (with a factor 2 to spare) and the smallest positive number, per dtype: the
# norm was taken before rounding, and |norm(x + e) - norm(x)| <= norm(e). Rows that came from int8 have lost their
# scales; what they lost is a few percent of their norm at most.
_ROUNDING = {
    "int8": (2.0**-3, 0.0),
    "float16": (2.0**-10, 2.0**-24),
    "bfloat16": (2.0**-7, 2.0**-126),
    "float32": (1e-5, 2.0**-126),
}


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


def coarser(dtype: str, converted_from: str | None) -> str:
    """Which of two dtypes rounds more."""
    return max(filter(None, (dtype, converted_from)), key=lambda one: _ROUNDING[one][0])


def check_rows(small: Mapping[str, np.ndarray], shard: int, span: tuple[int, int]) -> Iterator[Problem]:
    """Contradictions among the arrays of single numbers and texts.

    Args:
        small: the arrays of the shard that could be read, by name.
        shard: its number.
        span: its first row, and the row after its last.
    """
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


def check_scales(
    row_scale: np.ndarray, column_scale: np.ndarray, name: str, shard: int, span: tuple[int, int]
) -> Iterator[Problem]:
    """Scales of int8 rows that cannot be: not finite, or negative (or 0, for a column).

    Args:
        row_scale: float32 [n].
        column_scale: float32 [1, D].
        name: of the array that they belong to.
        shard: its number.
        span: its first row, and the row after its last.
    """
    for_rows, for_columns = scale_names(name)
    # Written this way round, a NaN is a problem as well.
    bad = ~((row_scale >= 0) & (row_scale < np.inf))
    yield from _row_problem(for_rows, bad, "a scale is negative or not finite", shard, span)
    columns = np.flatnonzero(~((column_scale[0] > 0) & (column_scale[0] < np.inf)))
    if columns.size:
        what = f"a scale is not positive or not finite ({columns.size} such columns, the first is {columns[0]})"
        yield Problem(array=for_columns, shard=shard, rows=span, what=what)


def check_vectors(
    name: str,
    rows: np.ndarray | ScaledRows,
    small: Mapping[str, np.ndarray],
    dtype: str,
    shard: int,
    span: tuple[int, int],
) -> Iterator[Problem]:
    """Rows of diff, chosen or rejected that are not finite, not zero where quarantined, or not of the norm on record.

    Args:
        name: of the array.
        rows: [n, D].
        small: the other arrays of the shard that could be read; `status` is among them.
        dtype: of the store, or of the one that it was converted from, whichever is coarser.
        shard: its number.
        span: its first row, and the row after its last.
    """
    kind, _, layer = name.partition("/")
    status = small["status"]
    ok, quarantined = status == OK, status == QUARANTINED
    norms = row_norms(rows)
    bad = ~np.isfinite(norms)
    yield from _row_problem(name, ok & bad, "an ok row holds NaN or infinity", shard, span)
    moved = quarantined & (norms != 0)
    if isinstance(rows, ScaledRows):  # a scale of 0 may not hide what a quarantined row must not hold
        moved[quarantined] |= rows.values[quarantined].any(axis=1)
    yield from _row_problem(name, moved, "a quarantined row is not zero", shard, span)
    norm_name = f"norm/{layer}"
    if kind != "diff" or norm_name not in small:
        return
    written = small[norm_name].astype(np.float64)
    yield from _row_problem(norm_name, quarantined & (written != 0), "a quarantined row has a norm", shard, span)
    # Written this way round, a NaN norm is a problem as well.
    with np.errstate(invalid="ignore"):
        differs = ok & ~bad & ~(np.abs(written - norms) <= _allowed(rows, norms, dtype))
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
