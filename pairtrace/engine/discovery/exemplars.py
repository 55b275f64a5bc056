"""Members that stand for a cluster, the rows of the store closest to it, and their texts.

Letters: n items, C clusters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pairtrace.engine.pairs import PairSource

# Characters of a text that a product keeps.
TEXT_CHARACTERS = 2_000


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """A member that stands for its cluster.

    Attributes:
        item: row of the store (pairs) or id of the prompt (prompts).
        probability: how firmly it belongs to the cluster.
        cosine: with the cluster's mean direction; None where there is none.
        texts: pairs: "prompt", "chosen", "rejected"; prompts: "prompt", "base", "tuned"; empty where the texts could
            not be read.
    """

    item: int | str
    probability: float
    cosine: float | None
    texts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Datapoint:
    """A row of the store with one of the highest cosines with a cluster's mean direction.

    Attributes:
        row: its number.
        cosine: with the mean direction.
        source: of the pair; "" when unknown.
        texts: "prompt", "chosen", "rejected"; empty where the texts could not be read.
    """

    row: int
    cosine: float
    source: str
    texts: dict[str, str]


def typical_members(
    labels: np.ndarray, probabilities: np.ndarray, cosines: np.ndarray, clusters: int, k: int
) -> list[np.ndarray]:
    """The most typical members of every cluster.

    Args:
        labels: int32 [n], number of the cluster, -1 for noise.
        probabilities: float32 [n], how firmly an item belongs to its cluster.
        cosines: float32 [n], with the mean direction of its cluster; NaN without one.
        clusters: C.
        k: members per cluster.

    Returns:
        Per cluster positions int64 [at most k]: highest probability first, then highest cosine, then lowest position.
    """
    order = np.lexsort((-cosines, -probabilities, labels))  # stable, and NaN comes last
    starts = np.searchsorted(labels[order], np.arange(clusters + 1))
    return [order[start : min(start + k, stop)] for start, stop in pairwise(starts)]


def pair_texts(source: PairSource, rows: Iterable[int]) -> dict[int, dict[str, str]]:
    """Prompt, chosen and rejected of some rows of preference data, each shortened to `TEXT_CHARACTERS`.

    Raises:
        DataFormatError: the data is damaged.
    """
    wanted = sorted(set(rows))
    return {
        row: {
            "prompt": plain_text(pair.prompt),
            "chosen": plain_text(pair.chosen),
            "rejected": plain_text(pair.rejected),
        }
        for row, pair in zip(wanted, source.take(wanted), strict=True)
    }


def plain_text(value: Any) -> str:
    """A text, or a list of messages with their roles in front, shortened to `TEXT_CHARACTERS`."""
    if isinstance(value, list):
        value = "\n".join(f"[{message.get('role')}] {message.get('content')}" for message in value)
    text = "" if value is None else str(value)
    return text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 1] + "…"
