"""Responses that were read already are not read again, whoever gave them.

Between two steps of training most answers stay as they are, and M0's never change. Legend: N pairs, L layers, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pairtrace.engine.rendered import RenderedPair

if TYPE_CHECKING:
    from pairtrace.engine.backend import Backend, OnPack, Pooled


class SideCache:
    """A back end that remembers the mean activations of every side by its tokens; implements `backend.Backend`.

    Args:
        backend: what reads the sides that are not known yet.

    Attributes:
        layers, width, compute_dtype: of `backend`.
        sides_read: sides that `backend` was asked for.
    """

    def __init__(self, backend: Backend) -> None:
        self.layers = backend.layers
        self.width = backend.width
        self.compute_dtype = backend.compute_dtype
        self.sides_read = 0
        self._backend = backend
        self._known: dict[bytes, np.ndarray] = {}  # float32 [L, D]
        self._used: set[bytes] = set()

    def pool(self, pairs: Sequence[RenderedPair], on_pack: OnPack | None = None) -> Pooled:
        """As the back end's own `pool`, up to rounding."""
        from pairtrace.engine.backend import Pooled

        keys = [
            (_key(pair.chosen_ids, pair.chosen_start), _key(pair.rejected_ids, pair.rejected_start)) for pair in pairs
        ]
        self._used.update(key for both in keys for key in both)
        asked = [number for number, both in enumerate(keys) if not self._known.keys() >= set(both)]
        read = self._backend.pool([self._shortened(pairs[number], keys[number]) for number in asked], on_pack)
        failed = set()
        for place, number in enumerate(asked):
            if place in read.failed:
                failed.add(number)
                continue
            for key, values in zip(keys[number], (read.chosen[place], read.rejected[place]), strict=True):
                if key not in self._known:
                    self._known[key] = values
                    self.sides_read += 1
        shape = (len(pairs), len(self.layers), self.width)
        chosen, rejected = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for number, (first, second) in enumerate(keys):
            if number not in failed:
                chosen[number], rejected[number] = self._known[first], self._known[second]
        return Pooled(chosen=chosen, rejected=rejected, failed=tuple(sorted(failed)))

    def forget(self) -> None:
        """Drop the sides that were not used since this was called last."""
        self._known = {key: values for key, values in self._known.items() if key in self._used}
        self._used.clear()

    def _shortened(self, pair: RenderedPair, keys: tuple[bytes, bytes]) -> RenderedPair:
        """The pair with a side that is known cut to its first pooled token: its mean is not looked at."""
        if keys[0] in self._known:
            return replace(pair, chosen_ids=pair.chosen_ids[: pair.chosen_start + 1])
        if keys[1] in self._known:
            return replace(pair, rejected_ids=pair.rejected_ids[: pair.rejected_start + 1])
        return pair


def _keys(pair: RenderedPair) -> tuple[bytes, bytes]:
    return _key(pair.chosen_ids, pair.chosen_start), _key(pair.rejected_ids, pair.rejected_start)


def _key(ids: np.ndarray, start: int) -> bytes:
    digest = hashlib.blake2b(start.to_bytes(4, "little"), digest_size=16)
    digest.update(ids.astype("<i4", copy=False).tobytes())
    return digest.digest()
