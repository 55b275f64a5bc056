"""Length differences of the responses of ranked pairs: in tokens from the store, else in characters from the data."""

from __future__ import annotations

import numpy as np

from pairtrace.engine.diagnosis.config import DiagnoseConfig, NotMeasured
from pairtrace.engine.diagnosis.confounding import LengthConfounding, length_confounding
from pairtrace.engine.diagnosis.inputs import ScoredPairs
from pairtrace.engine.pair import Message
from pairtrace.engine.scored_data import open_scored_data
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.store.reader import ActivationStore


def measured_lengths(
    config: DiagnoseConfig, table: ScoresTable, store: ActivationStore | NotMeasured, pairs: ScoredPairs, k: int
) -> LengthConfounding | NotMeasured:
    """Confounding with length, from the store if it is there, else from the data if that was given.

    Raises:
        DataError: the data that was given is not what was scored, or cannot be read.
    """
    if isinstance(store, ActivationStore):
        tokens = store.tokens()[pairs.rows].astype(np.int64)
        return length_confounding(pairs.scores, tokens[:, 1] - tokens[:, 2], k, "tokens")
    if config.data is None:
        return NotMeasured(not_measured=f"{store.not_measured}, or give the data with --data")
    source = open_scored_data(table, config.data, config.split)
    differences = np.zeros(source.rows, np.int64)
    for pair in source.read():
        differences[pair.row] = _characters(pair.chosen) - _characters(pair.rejected)
    return length_confounding(pairs.scores, differences[pairs.rows], k, "characters")


def _characters(response: str | list[Message]) -> int:
    if isinstance(response, str):
        return len(response)
    return sum(len(str(message.get("content") or "")) for message in response)
