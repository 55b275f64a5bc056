"""Baselines that look at no model: chance, and the lengths of the responses. Legend: N pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pairtrace.engine.baselines.scores_file import BaselineScores, require_parquet, write_baseline
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.errors import ConfigError
from pairtrace.store.reader import ActivationStore


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """What `score_random` does.

    Attributes:
        store: path of the activation store.
        out: parquet file to write.
        seed: of the order, 0 or more.
        name: of the score column.
    """

    store: str
    out: str
    seed: int = 0
    name: str = "random"

    def __post_init__(self) -> None:
        require_parquet(self.out)
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """What `score_length` does.

    Attributes:
        store: path of the activation store.
        out: parquet file to write.
        name: of the score column.
    """

    store: str
    out: str
    name: str = "length"

    def __post_init__(self) -> None:
        require_parquet(self.out)


def score_random(config: RandomConfig) -> BaselineScores:
    """Rank the pairs at random: a permutation of N evenly spaced scores between -1 and 1, symmetric about 0.

    Raises:
        StoreError: the store cannot be read or is incomplete.
        ConfigError: the scores file cannot be written.
    """
    with CostMeter(method="random", stage="score", device="cpu", path=costs_path(config.out)):
        store = ActivationStore.open(config.store)
        order = np.random.default_rng(config.seed).permutation(store.rows)
        scores = ((2.0 * order + 1.0) / store.rows - 1.0).astype(np.float32)
        return write_baseline(store, config.out, {config.name: scores}, method="random", details={"seed": config.seed})


def score_length(config: LengthConfig) -> BaselineScores:
    """Score a pair by the response tokens of chosen minus those of rejected, after truncation.

    A positive score says that the longer response was chosen.

    Raises:
        StoreError: the store cannot be read or is incomplete.
        ConfigError: the scores file cannot be written.
    """
    with CostMeter(method="length", stage="score", device="cpu", path=costs_path(config.out)):
        store = ActivationStore.open(config.store)
        tokens = store.tokens()
        scores = (tokens[:, 1] - tokens[:, 2]).astype(np.float32)
        return write_baseline(
            store,
            config.out,
            {config.name: scores},
            method="length",
            details={"score": "response tokens of chosen minus response tokens of rejected"},
        )
