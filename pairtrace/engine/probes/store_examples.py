"""Examples out of a store with sides. Legend: N rows of the store, n examples, m some of them, D width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pairtrace.engine.baselines.store_pairs import open_store_data
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.probes.examples import (
    Block,
    Origin,
    content_digest,
    label_of,
    numbered,
    require_finite,
)
from pairtrace.errors import ConfigError, ExamplesError, LayerError
from pairtrace.store.layout import MISSING, OK, QUARANTINED, to_float32
from pairtrace.store.reader import ActivationStore

# Rows that are made float32 at a time.
_BLOCK_ROWS = 4096


class StoreExamples:
    """Responses of the pairs of a store; implements `examples.Examples`.

    Args:
        store: opened, with sides.
        source: its data, for the prompts.
        labels: [N], the class of one response of each row, or None where it has none; None takes both responses, the
            chosen one as class 1 and the rejected one as class 0.
        side: "chosen" or "rejected": the response that `labels` speak of.
        layers: of the store; None for all.

    Raises:
        ExamplesError: the store has no sides, or there is not one label per row.
        LayerError: a layer is not in the store.
    """

    def __init__(
        self,
        store: ActivationStore,
        source: PairSource,
        *,
        labels: Sequence[int | None] | None = None,
        side: str = "chosen",
        layers: Sequence[int] | None = None,
    ) -> None:
        if not store.manifest.sides:
            raise ExamplesError(
                f"{store.path} gives no examples for probes; extract again with --sides",
                "activations of both responses of each pair",
                "their differences alone",
            )
        if labels is not None and len(labels) != store.rows:
            raise ExamplesError(f"{store.path}: the labels do not fit the rows", f"{store.rows} labels", len(labels))
        absent = sorted(set(layers or ()) - set(store.layers))
        if absent:
            raise LayerError(f"layer {absent[0]} is not in {store.path}, which holds layers {list(store.layers)}")
        self._store = store
        status = store.status()
        usable = np.flatnonzero(status == OK)
        self.left_out = {"quarantined": int((status == QUARANTINED).sum()), "missing": int((status == MISSING).sum())}
        if labels is None:
            self._rows = {"chosen": usable, "rejected": usable}
            classes = [np.ones(len(usable), np.int8), np.zeros(len(usable), np.int8)]
        else:
            known = np.array([row for row in usable.tolist() if labels[row] is not None], np.int64)
            self.left_out["without_label"] = len(usable) - len(known)
            self._rows = {side: known}
            classes = [np.array([labels[row] for row in known.tolist()], np.int8)]
        self.labels = np.concatenate(classes)
        rows = np.concatenate(list(self._rows.values()))
        digests = _prompt_digests(source)
        self.contents = digests[rows]
        self.prompts = numbered(self.contents.tolist())
        self.layers = store.layers if layers is None else tuple(sorted(set(layers)))
        self.width = store.width
        manifest = store.manifest
        self.origin = Origin(
            name=store.path,
            model_fingerprint=manifest.model_fingerprint,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
            template_fingerprint=manifest.template_fingerprint,
            description={"store": store.address, "store_manifest": manifest.to_json()},
        )

    @classmethod
    def open(
        cls,
        path: str,
        *,
        data: str | None = None,
        label_column: str | None = None,
        side: str = "chosen",
        layers: Sequence[int] | None = None,
        allow_incomplete: bool = False,
    ) -> StoreExamples:
        """Open a store and its data.

        Args:
            path: of the store.
            data: where its data is; None for the path that it recorded.
            label_column: of the data; None for the sides as classes.
            side, layers: as for the class.
            allow_incomplete: use the finished rows.

        Raises:
            StoreError, DataError: the store or its data cannot be used, or the data is not what it was made from.
            ConfigError: there is no such column.
            ExamplesError, LayerError: as for the class, or a label is something else than 0 and 1.
        """
        store = ActivationStore.open(path, allow_incomplete=allow_incomplete)
        source = open_store_data(store, data)
        labels = None if label_column is None else _labels(source, label_column)
        return cls(store, source, labels=labels, side=side, layers=layers)

    def blocks(self, layer: int) -> Iterator[Block]:
        """As `examples.Examples.blocks`: the sides one after the other, by rows."""
        first = 0
        for side, wanted in self._rows.items():
            for start, block in self._store.blocks(layer, side, _BLOCK_ROWS):
                low, high = np.searchsorted(wanted, (start, start + len(block)))
                inside = wanted[low:high]
                if not inside.size:
                    continue
                rows = to_float32(block[inside - start])
                require_finite(rows, _namer(inside, side), layer, self._store.path)
                yield np.arange(first + low, first + high), rows
            first += len(wanted)


def _namer(rows: np.ndarray, side: str) -> Callable[[int], str]:
    return lambda place: f"row {rows[place]} ({side})"


def _prompt_digests(source: PairSource) -> np.ndarray:
    """uint64 [N]."""
    return np.array([content_digest(pair.prompt) for pair in source.read()], np.uint64)


def _labels(source: PairSource, column: str) -> list[int | None]:
    schema = source.schema()
    if column not in schema.names:
        raise ConfigError(f"there is no column {column!r} in the data; there is: {', '.join(schema.names)}")
    values: list[Any] = []
    for batch in source.batches(pa.schema([schema.field(column)])):
        values += batch.column(0).to_pylist()
        if len(values) >= source.rows:
            break
    return [label_of(value, f"row {row}: {column}") for row, value in enumerate(values[: source.rows])]
