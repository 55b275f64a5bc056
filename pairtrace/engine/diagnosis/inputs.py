"""What a diagnosis works on: the scores, and the store and the directions behind them where they can be found.

Legend: N pairs, n ranked pairs, K directions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pairtrace.engine.diagnosis.config import DiagnoseConfig, NotMeasured
from pairtrace.engine.directions import Direction, load_directions
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import DataMismatchError, DirectionError, LayerError, StoreError
from pairtrace.store.reader import ActivationStore

_SAME = ("data_fingerprint", "rows", "model_fingerprint", "tokenizer_fingerprint", "template_fingerprint")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPairs:
    """The ranked pairs of one behaviour; n of them.

    Attributes:
        rows: int64 [n], row numbers in the data, ascending.
        scores: float32 [n], finite.
        sources: object [n] of strings.
    """

    rows: np.ndarray
    scores: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Behavior:
    """The directions behind the scores.

    Attributes:
        file: the direction file.
        layer: that was scored.
        by_layer: the behaviour at every layer of the store that the file has.
        bank: one vector per scenario at the scored layer, float32 [K, D]; or why there is none.
    """

    file: str
    layer: int
    by_layer: dict[int, Direction]
    bank: np.ndarray | NotMeasured

    @property
    def scored(self) -> Direction:
        """The behaviour at the scored layer."""
        return self.by_layer[self.layer]


def read_scores(table: ScoresTable, behavior: str) -> ScoredPairs:
    """The ranked rows of a scores file.

    Raises:
        DataFormatError: the file is damaged.
    """
    columns = table.read(["row", "source", f"score:{behavior}", f"rank:{behavior}"])
    ranked = columns.column(3).fill_null(pa.scalar(0, pa.int64())).to_numpy() > 0
    rows = columns.column(0).to_numpy()[ranked]
    scores = columns.column(2).fill_null(pa.scalar(np.nan, pa.float32())).to_numpy()[ranked]
    sources = np.array([name or "" for name in columns.column(1).to_pylist()], dtype=object)[ranked]
    return ScoredPairs(rows=rows.astype(np.int64), scores=scores.astype(np.float32), sources=sources)


def open_store(table: ScoresTable, config: DiagnoseConfig) -> ActivationStore | NotMeasured:
    """The store that was scored.

    Returns:
        The store, or why there is none: the recorded one is not there.

    Raises:
        StoreError: the store that was given cannot be read.
        DataMismatchError: it is another store than the one that was scored.
    """
    recorded = table.manifest.get("store")
    place = config.store or recorded
    if not isinstance(place, str):
        return NotMeasured(not_measured=f"{table.path} does not name its store; say where it is with --store")
    try:
        store = ActivationStore.open(place, allow_incomplete=True)
    except StoreError as error:
        if config.store is not None:
            raise
        return NotMeasured(
            not_measured=f"the store cannot be read where the scores recorded it, {place!r} ({error}); say where it is "
            "with --store"
        )
    made_from = table.manifest.get("store_manifest")
    expected = made_from if isinstance(made_from, dict) else {}
    actual = store.manifest.to_json()
    for field in _SAME:
        if field in expected and expected[field] != actual.get(field):
            raise DataMismatchError(
                f"{place} is not the store that {table.path} was scored on: its {field} is {actual.get(field)}, "
                f"expected {expected[field]}; give the right one with --store"
            )
    _require_same_pairs(table, store)
    return store


def _require_same_pairs(table: ScoresTable, store: ActivationStore) -> None:
    """Compare the content hashes of all pairs: the same data may have been extracted otherwise since."""
    columns = table.read(["row", "pair_id"])
    rows = columns.column(0).to_numpy()
    digits = "".join(identifier or "" for identifier in columns.column(1).to_pylist())
    scored = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(-1, 16)
    held = store.pair_ids()
    if len(rows) and int(rows.max()) >= len(held):
        raise DataMismatchError(f"{table.path} ranks row {rows.max()}, but {store.path} has {len(held)} rows")
    # A row that the store lacked when it was scored has zeros in the file.
    different = np.flatnonzero((scored != held[rows]).any(axis=1) & scored.any(axis=1))
    if different.size:
        row = int(rows[different[0]])
        raise DataMismatchError(
            f"{store.path} is not the store that {table.path} was scored on: {different.size} pairs differ, the first "
            f"is row {row}, whose pair_id is {held[row].tobytes().hex()}, expected "
            f"{scored[different[0]].tobytes().hex()}"
        )


def find_behavior(
    table: ScoresTable, name: str, store: ActivationStore | NotMeasured, config: DiagnoseConfig
) -> Behavior | NotMeasured:
    """The directions that were scored.

    Returns:
        The directions, or why there are none: a baseline, no store, or no direction file where it was recorded.

    Raises:
        DirectionError: the direction file that was given cannot be read.
        DataMismatchError: it holds another direction than the one that was scored.
    """
    entry = _entry(table, name)
    layer = table.manifest.get("layer")
    if entry is None or not isinstance(layer, int):
        method = table.manifest.get("method")
        made = f"the scores were made by the method {method!r}" if method else f"{table.path} names no directions"
        return NotMeasured(not_measured=f"{made}: there is no direction to draw others beside")
    if isinstance(store, NotMeasured):
        return store
    path = config.directions or _recorded_file(table, entry)
    if path is None:
        return NotMeasured(
            not_measured=f"the direction file is not where the scores recorded it, {entry.get('file')!r}; say where it "
            "is with --directions"
        )
    try:
        loaded = load_directions(path, width=store.width)
    except (DirectionError, LayerError) as error:
        if config.directions is not None:
            raise
        return NotMeasured(not_measured=f"{error}; say where the direction file is with --directions")
    by_layer = {
        place: replace(direction, layer=place)
        for direction in loaded
        if direction.name == name and (place := layer if direction.layer is None else direction.layer) in store.layers
    }
    found = by_layer.get(layer)
    if found is None or found.fingerprint != entry.get("fingerprint"):
        problem = f"the direction {name!r} at layer {layer} in {path} is not the one that was scored"
        expected = f"its fingerprint is {found.fingerprint if found else None}, expected {entry.get('fingerprint')}"
        if config.directions is not None:
            raise DataMismatchError(f"{problem}: {expected}; give the file that {table.path} was scored with")
        return NotMeasured(not_measured=f"{problem}: {expected}; say where the right file is with --directions")
    return Behavior(file=path, layer=layer, by_layer=by_layer, bank=_bank(path, loaded, found, layer))


def scored_kind(table: ScoresTable, name: str) -> str | None:
    """ "vector" or "bank"; None for scores that were not made by directions."""
    entry = _entry(table, name)
    return None if entry is None else str(entry.get("kind"))


def _entry(table: ScoresTable, name: str) -> dict[str, Any] | None:
    """What the scores file says of the behaviour's direction."""
    entries = [entry for entry in table.manifest.get("directions", []) if isinstance(entry, dict)]
    return next((entry for entry in entries if entry.get("name") == name), None)


def _recorded_file(table: ScoresTable, entry: dict[str, Any]) -> str | None:
    """The recorded direction file, as it was named or beside the scores."""
    recorded = Path(str(entry.get("file", "")))
    for place in (recorded, Path(table.path).parent / recorded.name):
        if place.is_file():
            return str(place)
    return None


def _bank(path: str, loaded: list[Direction], scored: Direction, layer: int) -> np.ndarray | NotMeasured:
    """The vectors of the scenarios: those of a bank, or of the bank beside a mean vector."""
    name = scored.name if scored.kind == "bank" else f"{scored.name}-bank"
    banks = [one for one in loaded if one.name == name and one.kind == "bank" and one.layer in (None, layer)]
    if not banks:
        return NotMeasured(
            not_measured=f"{path} holds no bank {name!r} (one vector per prompt); build the behaviour with --kind both"
        )
    if len(banks[0].values) < 8:
        return NotMeasured(
            not_measured=f"the bank of {path} holds {len(banks[0].values)} prompts; at least 8 are needed"
        )
    return banks[0].values
