"""The rows of the data that training uses, and those that it cannot use, each with its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rendered import Quarantined, RenderedPair
from pairtrace.errors import DataError

if TYPE_CHECKING:
    from pairtrace.engine.pairs import PairSource
    from pairtrace.engine.rendering import Renderer

_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """The rendered data.

    Attributes:
        pairs: the rows to train on, in their order.
        dropped: the others, with their reasons.
    """

    pairs: list[RenderedPair]
    dropped: list[Quarantined]

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason code, most frequent first."""
        return dict(Counter(row.code for row in self.dropped).most_common())

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the chosen and the rejected sequence of every pair, and those with loss: int64 [N, 2] each."""
        tokens = [[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in self.pairs]
        responses = [[pair.chosen_tokens, pair.rejected_tokens] for pair in self.pairs]
        return np.array(tokens, dtype=np.int64), np.array(responses, dtype=np.int64)

    def dropped_records(self) -> list[dict[str, Any]]:
        """Row, source, pair id and reason of every dropped row; the pair id is "", as in a scores file."""
        return [{"row": row.row, "source": row.source, "pair_id": "", "reason": row.reason} for row in self.dropped]


def read_rows(source: PairSource, renderer: Renderer, progress: Progress = NULL_PROGRESS) -> TrainingRows:
    """Render all rows; they stay in memory, at 4 bytes per token.

    Raises:
        DataError: no row can be used.
        ModelError: the tokenizer lacks a chat template or an end-of-sequence token that the data needs.
    """
    pairs: list[RenderedPair] = []
    dropped: list[Quarantined] = []
    progress.start("read pairs", source.rows, "pairs")
    rows = source.read()
    while block := list(islice(rows, _BLOCK)):
        for result in renderer.render(block):
            if isinstance(result, RenderedPair):
                pairs.append(result)
            else:
                dropped.append(result)
        progress.advance(len(block))
    progress.finish()
    found = TrainingRows(pairs=pairs, dropped=dropped)
    if not pairs:
        first = f"; row {dropped[0].row}: {dropped[0].reason}" if dropped else ""
        counted = ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.items())
        raise DataError(f"none of the {source.rows:,} rows can be trained on ({counted}){first}")
    return found
