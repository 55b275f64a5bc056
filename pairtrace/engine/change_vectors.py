"""Behaviour-change vectors: what changes in the base model's activations when a response shows the behaviour.

`v_b = mean(p, r1; M0) - mean(p, r0; M0)` for a prompt p, a response r1 that shows the behaviour and a safe response r0
(arXiv 2602.11079). Legend: L layers, D width, S scenarios.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pairtrace.engine.pair import Pair
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rendered import Quarantined, RenderedPair
from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.engine.scenarios import RolloutPair
from pairtrace.errors import DataError

if TYPE_CHECKING:
    from pairtrace.engine.backend import Backend
    from pairtrace.engine.rendering import Renderer

_CHUNK = 256


@dataclass(frozen=True)
class ChangeVectors:
    """Behaviour-change vectors, averaged.

    Attributes:
        mean: float32 [L, D], mean over all rollout pairs.
        bank: float32 [S, L, D], mean within each scenario.
        scenarios: S ids.
        pairs: rollout pairs that took part.
        unusable: pairs that did not, by reason (codes of rendering, "out_of_memory", "not_finite").
    """

    mean: np.ndarray
    bank: np.ndarray
    scenarios: tuple[str, ...]
    pairs: int
    unusable: dict[str, int]


def change_vectors(
    table: RolloutTable,
    pairs: Sequence[RolloutPair],
    renderer: Renderer,
    backend: Backend,
    progress: Progress = NULL_PROGRESS,
) -> ChangeVectors:
    """Read rollout pairs through the base model and average their differences.

    Args:
        table: the rollouts that `pairs` point into.
        pairs: at least one.
        renderer: of the base model's tokenizer.
        backend: of the base model.
        progress: counts rollout pairs.

    Raises:
        DataError: no pair could be rendered and run.
    """
    names = list(dict.fromkeys(pair.prompt_id for pair in pairs))
    number = {name: position for position, name in enumerate(names)}
    # float64 sums: the mean does not depend on how many pairs came before.
    sums = np.zeros((len(names), len(backend.layers), backend.width))
    counts = np.zeros(len(names), np.int64)
    unusable: Counter[str] = Counter()
    for position, difference in read_differences(table, pairs, renderer, backend, progress):
        if isinstance(difference, str):
            unusable[difference] += 1
        else:
            scenario = number[pairs[position].prompt_id]
            sums[scenario] += difference
            counts[scenario] += 1
    kept = np.flatnonzero(counts)
    if not kept.size:
        reasons = ", ".join(f"{count} {reason}" for reason, count in unusable.items())
        raise DataError(
            f"none of the {len(pairs)} rollout pairs could be used ({reasons}); see the responses in the rollouts file"
        )
    return ChangeVectors(
        mean=(sums.sum(axis=0) / counts.sum()).astype(np.float32),
        bank=(sums[kept] / counts[kept, None, None]).astype(np.float32),
        scenarios=tuple(names[scenario] for scenario in kept),
        pairs=int(counts.sum()),
        unusable=dict(unusable),
    )


def read_differences(
    table: RolloutTable,
    pairs: Sequence[RolloutPair],
    renderer: Renderer,
    backend: Backend,
    progress: Progress = NULL_PROGRESS,
) -> Iterator[tuple[int, np.ndarray | str]]:
    """Read rollout pairs through the base model, whatever paired them.

    Args:
        table: the rollouts that `pairs` point into.
        pairs: any number.
        renderer: of the base model's tokenizer.
        backend: of the base model.
        progress: counts rollout pairs.

    Yields:
        The position of every pair, and the difference of the mean activations of its two responses, float64 [L, D], or
        the reason why there is none (a code of rendering, "out_of_memory", "not_finite").
    """
    progress.start("behaviour vectors", len(pairs), "rollout pairs")
    records = _records(table, pairs)
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        usable: list[RenderedPair] = []
        for result in renderer.render(_as_pairs(records, chunk)):
            if isinstance(result, Quarantined):
                yield start + result.row, result.code
            else:
                usable.append(result)
        pooled = backend.pool(usable)
        differences = pooled.chosen.astype(np.float64) - pooled.rejected
        finite = np.isfinite(differences).all(axis=(1, 2))
        for position, rendered in enumerate(usable):
            if position in pooled.failed:
                yield start + rendered.row, "out_of_memory"
            else:
                yield start + rendered.row, differences[position] if finite[position] else "not_finite"
        progress.advance(len(chunk))
    progress.finish()


def preference_pairs(table: RolloutTable, pairs: Sequence[RolloutPair]) -> list[Pair]:
    """Rollout pairs as preference pairs: the response with the behaviour is chosen, the safe one rejected.

    Args:
        table: the rollouts that `pairs` point into.
        pairs: at least one; `Pair.row` is the position among them.
    """
    return _as_pairs(_records(table, pairs), pairs)


def _records(table: RolloutTable, pairs: Sequence[RolloutPair]) -> dict[int, dict[str, Any]]:
    """Messages and response of every row that `pairs` point to; one take, for each may copy whole columns."""
    rows = sorted({row for pair in pairs for row in (pair.chosen_row, pair.rejected_row)})
    taken = table.table.select(["messages", "response"]).take(pa.array(rows, pa.int64())).to_pylist()
    return dict(zip(rows, taken, strict=True))


def _as_pairs(records: dict[int, dict[str, Any]], chunk: Sequence[RolloutPair]) -> list[Pair]:
    """Rollout pairs as preference pairs: the response with the behaviour is chosen. `row` counts within the chunk."""
    return [
        Pair(
            row=row,
            prompt=json.loads(records[pair.chosen_row]["messages"]),
            chosen=[{"role": "assistant", "content": records[pair.chosen_row]["response"]}],
            rejected=[{"role": "assistant", "content": records[pair.rejected_row]["response"]}],
            source=pair.prompt_id,
        )
        for row, pair in enumerate(chunk)
    ]
