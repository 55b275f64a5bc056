"""Log-probabilities of the responses under the reference (M0), computed once and kept by content.

The unit is one side of a pair, known by its token ids and the place where its loss begins. A data set with pairs
removed or swapped therefore needs no new pass, and runs that share M0 share the values. They are plain sums over the
response's tokens: losses that divide by the length do so later.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pairtrace.engine.atomic import replacing
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.training.batches import Side, pad_sides, sides
from pairtrace.errors import TrainingError

logger = logging.getLogger(__name__)

_RECORD = np.dtype([("side", "u1", (16,)), ("log_probability", "<f4")])
# A pass over a large data set is saved this often, in sides.
_FLUSH = 4096


def side_id(side: Side) -> bytes:
    """16-byte BLAKE2b of a sequence's length, first position with loss and token ids (little-endian int32)."""
    ids, start = side
    digest = hashlib.blake2b(np.array([len(ids), start], dtype="<i4").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    return digest.digest()


class ReferenceCache:
    """A directory of files, each named by the digest of its bytes, so that runs can add to it at the same time.

    Args:
        root: directory of all references.
        model_fingerprint: of M0.
        precision: how the values are computed, for example "float32": others are kept apart.
    """

    def __init__(self, root: str | Path, model_fingerprint: str, precision: str) -> None:
        self.directory = Path(root) / f"{model_fingerprint[:32]}-{precision}"
        self._known: dict[bytes, float] = {}
        self._new: dict[bytes, float] = {}
        for file in sorted(self.directory.glob("*.npy")):
            self._read(file)

    def _read(self, file: Path) -> None:
        content = file.read_bytes()
        if _name(content) != file.name:
            logger.warning("%s is damaged and is left out; its values are computed again", file)
            return
        records = np.load(io.BytesIO(content), allow_pickle=False)
        self._known.update(zip(map(bytes, records["side"]), records["log_probability"].tolist(), strict=True))

    def __contains__(self, side: bytes) -> bool:
        return side in self._known or side in self._new

    def __getitem__(self, side: bytes) -> float:
        return self._known[side] if side in self._known else self._new[side]

    def add(self, side: bytes, log_probability: float) -> None:
        """Keep a value; it is on disk after `flush`, or when many have come together."""
        self._new[side] = log_probability
        if len(self._new) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write what is new.

        Raises:
            ConfigError: the directory cannot be written.
        """
        if not self._new:
            return
        records = np.empty(len(self._new), dtype=_RECORD)
        records["side"] = np.frombuffer(b"".join(self._new), dtype=np.uint8).reshape(-1, 16)
        records["log_probability"] = list(self._new.values())
        stream = io.BytesIO()
        np.save(stream, records, allow_pickle=False)
        with replacing(self.directory / _name(stream.getvalue())) as temporary:
            temporary.write_bytes(stream.getvalue())
        self._known.update(self._new)
        self._new.clear()


def _name(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest() + ".npy"


def reference_log_probabilities(
    pairs: Sequence[RenderedPair],
    cache: ReferenceCache,
    compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    *,
    pad_token_id: int,
    token_budget: int,
    progress: Progress = NULL_PROGRESS,
    on_batch: Callable[[list[tuple[int, int]]], None] = lambda sides: None,
) -> tuple[np.ndarray, int]:
    """Look up both sides of every pair, and compute what the cache does not hold.

    Args:
        pairs: N pairs.
        cache: gets the new values.
        compute: from a batch of `pad_sides` to the log-probabilities of its sequences, [S].
        pad_token_id: fills up shorter sequences.
        token_budget: padded tokens per forward pass; halved whenever memory does not suffice.
        progress: is told of every batch.
        on_batch: is told what was computed, as (pair, 0 for chosen or 1 for rejected).

    Returns:
        Log-probabilities of chosen and rejected, float32 [N, 2], and how many sequences were computed.

    Raises:
        TrainingError: a log-probability is not finite.
    """
    keys = [[side_id(side) for side in sides(pair)] for pair in pairs]
    places: dict[bytes, tuple[int, int]] = {}
    for number, both in enumerate(keys):
        for column, key in enumerate(both):
            if key not in cache:
                places.setdefault(key, (number, column))
    missing = [(sides(pairs[number])[column], key, (number, column)) for key, (number, column) in places.items()]
    # The longest first: if memory does not suffice, that shows at once.
    missing.sort(key=lambda item: -len(item[0][0]))
    if missing:
        progress.start("reference log-probabilities", len(missing), "sequences")
    first = 0
    try:
        while first < len(missing):
            block = missing[first : first + max(1, token_budget // len(missing[first][0][0]))]
            try:
                values = compute(pad_sides([side for side, _, _ in block], pad_token_id)).float().cpu().tolist()
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(block) == 1:
                    raise
                token_budget //= 2
                logger.warning("out of memory: the reference goes on with %s tokens per pass", f"{token_budget:,}")
                continue
            for (_, key, (number, _)), value in zip(block, values, strict=True):
                if not np.isfinite(value):
                    raise TrainingError(
                        f"the log-probability of a response in row {pairs[number].row} is {value} under the "
                        "checkpoint that is to be trained; check its weights, or use --compute-dtype float32"
                    )
                cache.add(key, value)
            on_batch([place for _, _, place in block])
            progress.advance(len(block))
            first += len(block)
    finally:
        cache.flush()
    if missing:
        progress.finish()
    return np.array([[cache[key] for key in both] for both in keys], dtype=np.float32), len(missing)
