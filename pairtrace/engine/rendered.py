"""What rendering makes of a pair: token ids with the place where pooling begins, or the reason why not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedPair:
    """The token ids of both sides of a pair and where their pooled tokens begin.

    The tokens before `chosen_start` and `rejected_start` are the same on both sides, with two exceptions: after
    a "keep_end" truncation the two windows may begin at different places, and without any prompt token (start
    is 1 by force) the first tokens may differ.

    Attributes:
        row: row number in the data.
        source: name of the data set that the row came from.
        chosen_ids: int32 [C], prompt and chosen response after truncation.
        rejected_ids: int32 [R], prompt and rejected response after truncation.
        chosen_start: first pooled position of `chosen_ids`, at least 1.
        rejected_start: first pooled position of `rejected_ids`, at least 1.
        pair_id: 16 bytes that identify the content, whatever row it stands in.
    """

    row: int
    source: str
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int
    pair_id: bytes

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens before the pooled ones (the longer side, should they differ)."""
        return max(self.chosen_start, self.rejected_start)

    @property
    def chosen_tokens(self) -> int:
        """Number of pooled tokens of the chosen side."""
        return len(self.chosen_ids) - self.chosen_start

    @property
    def rejected_tokens(self) -> int:
        """Number of pooled tokens of the rejected side."""
        return len(self.rejected_ids) - self.rejected_start


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A row that cannot be used, kept with the reason so that it is counted and never lost.

    Attributes:
        row: row number in the data.
        source: name of the data set that the row came from.
        reason: a short code, a colon, and the detail in words. Codes: `empty_response`, `identical`,
            `prompt_too_long`, `malformed_row`, `template_error`, `no_loss_tokens`.
    """

    row: int
    source: str
    reason: str

    @property
    def code(self) -> str:
        """The short code in front of the colon."""
        return self.reason.partition(":")[0]


def content_id(chosen: np.ndarray, chosen_start: int, rejected: np.ndarray, rejected_start: int) -> bytes:
    """16-byte BLAKE2b of lengths, starts and token ids, as little-endian int32: equal content, equal id."""
    header = np.array([len(chosen), chosen_start, len(rejected), rejected_start], dtype="<i4")
    digest = hashlib.blake2b(header.tobytes(), digest_size=16)
    digest.update(chosen.astype("<i4", copy=False).tobytes())
    digest.update(rejected.astype("<i4", copy=False).tobytes())
    return digest.digest()
