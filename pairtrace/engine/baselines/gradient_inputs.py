"""What the gradient baseline reads: the pairs of a store as tokens, and the pairs that show the behaviour.

Legend: N rows of the store.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.baselines.gradient_config import GradientConfig
from pairtrace.engine.baselines.store_pairs import load_store_renderer, open_store_data, require_store_model
from pairtrace.engine.change_vectors import preference_pairs
from pairtrace.engine.judge import load_rules
from pairtrace.engine.pair import Pair
from pairtrace.engine.pairs import PairSource, open_pairs
from pairtrace.engine.rendered import Quarantined, RenderedPair
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.scenarios import filter_scenarios, require_scenarios
from pairtrace.errors import DataError, DataMismatchError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StorePairs:
    """The pairs of a store, rendered again as its extraction rendered them.

    Attributes:
        store: complete.
        source: its data.
        renderer: with its tokenizer, template and truncation.
        base: where M0 is.
        usable: bool [N], rows that are not quarantined.
        identifiers: uint8 [N, 16], content ids of the store.
    """

    store: ActivationStore
    source: PairSource
    renderer: Renderer
    base: str
    usable: np.ndarray
    identifiers: np.ndarray

    @classmethod
    def open(
        cls, path: str, *, data: str | None = None, base: str | None = None, chat_template: str | None = None
    ) -> StorePairs:
        """Open the data and the tokenizer that a store names.

        Args:
            path: of the store.
            data: where the data is; None for the place that the store recorded.
            base: the same for M0.
            chat_template: the same for a file with the template.

        Raises:
            StoreError: the store cannot be read or is incomplete.
            StoreMismatchError: model, tokenizer or template is not that of the store.
            DataError: the data cannot be read, or every row of it is quarantined.
            DataMismatchError: it is not the data of the store.
        """
        store = ActivationStore.open(path)
        checkpoint = store.manifest.model if base is None else base
        source = open_store_data(store, data)
        renderer = load_store_renderer(store, checkpoint, chat_template)
        require_store_model(store, checkpoint)
        usable = store.status() == OK
        if not usable.any():
            raise DataError(f"every row of {path} is quarantined; there is nothing to rank")
        return cls(store, source, renderer, checkpoint, usable, store.pair_ids())

    def shard(self, start: int, stop: int) -> list[RenderedPair]:
        """The usable pairs among the rows [start, stop)."""
        return self._rendered([pair for pair in self.source.read(start, stop) if self.usable[pair.row]])

    def take(self, rows: Sequence[int]) -> list[RenderedPair]:
        """The pairs in these usable rows, in this order."""
        return self._rendered(self.source.take(rows))

    def _rendered(self, pairs: list[Pair]) -> list[RenderedPair]:
        rendered = []
        for pair, result in zip(pairs, self.renderer.render(pairs), strict=True):
            if isinstance(result, Quarantined) or result.pair_id != self.identifiers[pair.row].tobytes():
                raise DataMismatchError(
                    f"row {pair.row} is not rendered to the tokens that {self.store.path} was made from; extract "
                    "again with this version of pairtrace and of the tokenizer's libraries"
                )
            rendered.append(result)
        return rendered


@dataclass(frozen=True, eq=False)
class Target:
    """The pairs whose gradient is the target: chosen shows the behaviour, rejected does not.

    Attributes:
        pairs: rendered.
        unusable: pairs that could not be rendered, by reason.
        fingerprint: of the rendered pairs in their order, hex.
    """

    pairs: list[RenderedPair]
    unusable: dict[str, int]
    fingerprint: str


def read_target(config: GradientConfig, renderer: Renderer) -> Target:
    """The target pairs of a preference file, or those that a behaviour's rollouts make.

    Raises:
        DataError: the file cannot be read, or no pair of it can be used.
    """
    pairs = _rollout_pairs(config) if config.rollouts is not None else list(open_pairs(str(config.target)).read())
    if config.target_limit is not None and config.target_limit < len(pairs):
        chosen = np.random.default_rng([config.seed, 1]).choice(len(pairs), config.target_limit, replace=False)
        pairs = [pairs[position] for position in sorted(chosen.tolist())]
    rendered: list[RenderedPair] = []
    unusable: Counter[str] = Counter()
    for result in renderer.render(pairs):
        if isinstance(result, Quarantined):
            unusable[result.code] += 1
        else:
            rendered.append(result)
    place = config.rollouts or config.target
    if not rendered:
        reasons = ", ".join(f"{count} {reason}" for reason, count in unusable.items())
        raise DataError(f"none of the {len(pairs)} target pairs of {place} could be used ({reasons})")
    if unusable:
        logger.warning("%d of %d target pairs of %s cannot be used", unusable.total(), len(pairs), place)
    digest = hashlib.sha256(b"".join(pair.pair_id for pair in rendered)).hexdigest()
    return Target(rendered, dict(unusable), digest)


def _rollout_pairs(config: GradientConfig) -> list[Pair]:
    table = read_rollouts(str(config.rollouts), label_column=config.label_column)
    if not table.has_verdicts:
        table = table.judged(load_rules())
    filtered = filter_scenarios(table, config.max_base_rate)
    require_scenarios(filtered)
    return preference_pairs(table, filtered.pairs)
