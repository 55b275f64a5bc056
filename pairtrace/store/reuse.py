"""Finding pairs that other stores already hold, by the hash of their token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pairtrace.errors import StoreMismatchError
from pairtrace.store.layout import OK, PAIR_ID_BYTES
from pairtrace.store.manifest import Manifest
from pairtrace.store.reader import ActivationStore

_SAME = ("model_fingerprint", "width", "pooling", "compute_dtype", "backend")
# A store converted from float32 was rounded from what the model gave, as any other store.
_AS_COMPUTED = (None, "float32")
_ADVICE = "its rows cannot be reused: leave it out of --reuse, or repeat the settings that it was made with"


def compatible(store: Manifest, needed: Manifest) -> None:
    """Check that rows of one store are what another run would compute for the same tokens.

    Tokenizer, template, truncation and data may differ: `pair_id` covers what they decide. So may codecs. Rows of
    another dtype would be other numbers, and so would rows that went through another dtype: only a run of int8, which
    rounds every copied row once more in any case, takes them.

    Args:
        store: manifest of the store to copy from.
        needed: manifest of the run.

    Raises:
        StoreMismatchError: naming the first field that differs.
    """
    for name in _SAME:
        actual, wanted = getattr(store, name), getattr(needed, name)
        if actual != wanted:
            raise StoreMismatchError(name, wanted, actual, _ADVICE)
    if needed.dtype != "int8":
        if store.dtype != needed.dtype:
            raise StoreMismatchError("dtype", needed.dtype, store.dtype, _ADVICE)
        if store.converted_from not in _AS_COMPUTED:
            raise StoreMismatchError("converted_from", None, store.converted_from, _ADVICE)
    if not set(needed.layers) <= set(store.layers):
        raise StoreMismatchError("layers", needed.layers, store.layers, _ADVICE)
    if needed.sides and not store.sides:
        raise StoreMismatchError("sides", needed.sides, store.sides, _ADVICE)


class PairIndex:
    """Where each pair of some stores is; a pair in several places is found in the first store, lowest row.

    Only ok rows are indexed. Memory: 28 bytes per row.
    """

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        """Read the pair ids of all stores.

        Args:
            stores: opened stores; `find` answers with positions in this sequence.
        """
        keys, owners, rows = [], [], []
        for number, store in enumerate(stores):
            ok = np.flatnonzero(store.status() == OK)
            keys.append(_halves(store.pair_ids()[ok]))
            owners.append(np.full(ok.size, number, np.int32))
            rows.append(ok.astype(np.int64))
        key = np.concatenate([np.empty((0, 2), np.uint64), *keys])
        # Sorted by id, and stably so: among equal ids the first store and lowest row come first and are kept.
        order = np.lexsort((key[:, 1], key[:, 0]))
        key = key[order]
        keep = np.ones(len(key), bool)
        keep[1:] = (key[1:] != key[:-1]).any(axis=1)
        self._high, self._low = np.ascontiguousarray(key[keep, 0]), np.ascontiguousarray(key[keep, 1])
        self._owner = np.concatenate([np.empty(0, np.int32), *owners])[order][keep]
        self._row = np.concatenate([np.empty(0, np.int64), *rows])[order][keep]

    def __len__(self) -> int:
        """Number of different pairs."""
        return len(self._high)

    def find(self, pair_ids: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Look pairs up.

        Args:
            pair_ids: uint8 [n, 16].

        Returns:
            store index int32 [n] (-1: in no store), and row int64 [n] in that store (-1 likewise).
        """
        wanted = _halves(pair_ids)
        owner, row = np.full(len(wanted), -1, np.int32), np.full(len(wanted), -1, np.int64)
        place = np.searchsorted(self._high, wanted[:, 0], side="left")
        open_ = np.arange(len(wanted))
        # Ids that share their first half are neighbours; as good as always there is only one.
        while open_.size:
            open_ = open_[place[open_] < len(self._high)]
            open_ = open_[self._high[place[open_]] == wanted[open_, 0]]
            hit = self._low[place[open_]] == wanted[open_, 1]
            found = open_[hit]
            owner[found], row[found] = self._owner[place[found]], self._row[place[found]]
            open_ = open_[~hit]
            place[open_] += 1
        return owner, row


def _halves(pair_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    assert pair_ids.dtype == np.uint8 and pair_ids.ndim == 2 and pair_ids.shape[1] == PAIR_ID_BYTES
    return np.ascontiguousarray(pair_ids).view(np.uint64)
