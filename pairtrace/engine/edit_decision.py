"""What an edit does to every row of the data, decided from a ranking before a single row is written.

Legend: N rows of the data.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pairtrace.engine.edit_config import EditConfig, SourceChange
from pairtrace.engine.guilty_sources import guilty_sources, score_mass
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import Progress
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.engine.selection import Selection, require_symmetric, select
from pairtrace.errors import ConfigError, DataMismatchError

logger = logging.getLogger(__name__)

KEEP, REMOVE, SWAP = 0, 1, 2
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedRows:
    """What a scores file says of every row of the data.

    Attributes:
        scores: float32 [N]; NaN without a score.
        ranks: int64 [N]; 0 without a rank.
        pair_ids: object [N] of strings; "" for rows that were not scored.
        sources: object [N] of strings.
    """

    scores: np.ndarray
    ranks: np.ndarray
    pair_ids: np.ndarray
    sources: np.ndarray

    @classmethod
    def read(cls, table: ScoresTable, behavior: str, count: int) -> RankedRows:
        """Read one behaviour.

        Args:
            table: the scores file.
            behavior: its name there.
            count: N.

        Raises:
            DataFormatError: the file is damaged.
            DataMismatchError: it ranks rows that the data does not have.
        """
        columns = table.read(["row", "pair_id", "source", f"score:{behavior}", f"rank:{behavior}"])
        rows = columns.column(0).to_numpy()
        if len(rows) and int(rows.max()) >= count:
            raise DataMismatchError(f"{table.path} ranks row {rows.max()}, but the data has {count} rows")
        filled = cls(
            scores=np.full(count, np.nan, np.float32),
            ranks=np.zeros(count, np.int64),
            pair_ids=np.full(count, "", object),
            sources=np.full(count, "", object),
        )
        filled.scores[rows] = columns.column(3).fill_null(pa.scalar(np.nan, pa.float32())).to_numpy()
        filled.ranks[rows] = columns.column(4).fill_null(pa.scalar(0, pa.int64())).to_numpy()
        filled.pair_ids[rows] = columns.column(1).to_pylist()
        filled.sources[rows] = [source or "" for source in columns.column(2).to_pylist()]
        return filled


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What happens to every row of the data.

    Attributes:
        action: what the change record calls the edit: "filter", "swap" or "drop-source".
        change: uint8 [N]: `KEEP`, `REMOVE` or `SWAP`.
        groups: object [N]: source of each row, or value of the column `by`.
        reason: why, in words.
        dropped: sources that go as a whole.
        selection: the pairs that a rule selected, or None where sources were named.
    """

    action: str
    change: np.ndarray
    groups: np.ndarray
    reason: str
    dropped: tuple[str, ...]
    selection: Selection | None


def decide(
    config: EditConfig,
    table: ScoresTable,
    behavior: str,
    source: PairSource,
    schema: pa.Schema,
    ranked: RankedRows,
    progress: Progress,
) -> Decision:
    """Decide what happens to every row.

    Args:
        config: the edit.
        table: the scores file.
        behavior: its name there.
        source: the data.
        schema: of the data.
        ranked: what the scores file says of the rows.
        progress: receives the work on random directions.

    Raises:
        ConfigError: the rule takes no pair or more than there are, its null does not fit the scores, a named source or
            column is not there, or the edit would leave nothing.
        StoreError: the store is needed (random null) and cannot be read.
    """
    count = len(ranked.ranks)
    groups = ranked.sources if config.by is None else _column(source, schema, config.by, count)
    selection = None
    if config.rule is not None:
        tail, otherwise = None, ""
        if config.rule.fdr is not None:
            from pairtrace.engine.null_scores import names_directions, random_tail

            otherwise = "select with -k, --fraction or --threshold"
            if config.rule.null == "random":
                tail = random_tail(table, behavior, config.store, config.seed, progress)
            else:
                if names_directions(table, behavior):
                    otherwise = f"take --null random, or {otherwise}"
                require_symmetric(ranked.scores[ranked.ranks > 0], otherwise=otherwise)
        selection = select(config.rule, ranked.scores, ranked.ranks, tail, otherwise=otherwise)
    change = np.full(count, KEEP, np.uint8)
    dropped: tuple[str, ...] = ()
    if config.action == "drop-sources":
        reason, dropped = _sources_to_drop(config, groups, ranked, selection)
        change[np.isin(groups.astype(str), np.array(dropped, dtype=str))] = REMOVE
    else:
        assert config.rule is not None and selection is not None
        reason = config.rule.describe()
        change[selection.rows] = SWAP if config.action == "swap" else REMOVE
    if (change == REMOVE).all():
        raise ConfigError(f"the edit ({reason}) would remove all {count} pairs; select fewer")
    decision = Decision(
        action=config.action.removesuffix("s"),
        change=change,
        groups=groups,
        reason=reason,
        dropped=dropped,
        selection=selection,
    )
    if config.action != "swap" and (change[ranked.ranks > 0] == REMOVE).all():
        logger.warning(
            "the edit removes every pair that has a rank: what stays are the %d rows without a score, quarantined ones "
            "among them",
            np.count_nonzero(change != REMOVE),
        )
    elif 2 * np.count_nonzero(change != KEEP) > count:
        logger.warning(
            "the edit %s %d of %d pairs, more than half of the data (%s)",
            "swaps" if config.action == "swap" else "removes",
            np.count_nonzero(change != KEEP),
            count,
            reason,
        )
    emptied = [one.source for one in source_changes(decision) if one.rows_after == 0 and one.source not in dropped]
    if emptied:
        logger.warning("the edit leaves no pair of the sources: %s", ", ".join(map(repr, sorted(emptied))))
    return decision


def source_changes(decision: Decision) -> tuple[SourceChange, ...]:
    """Rows of every source before and after, the most changed first."""
    names, place = np.unique(decision.groups.astype(str), return_inverse=True)
    before = np.bincount(place, minlength=len(names))
    removed = np.bincount(place[decision.change == REMOVE], minlength=len(names))
    swapped = np.bincount(place[decision.change == SWAP], minlength=len(names))
    changes = [
        SourceChange(source=str(name), rows_before=int(b), rows_after=int(b - r), swapped=int(s))
        for name, b, r, s in zip(names, before, removed, swapped, strict=True)
    ]
    return tuple(sorted(changes, key=lambda one: (one.rows_after - one.rows_before - one.swapped, one.source)))


def _sources_to_drop(
    config: EditConfig, groups: np.ndarray, ranked: RankedRows, selection: Selection | None
) -> tuple[str, tuple[str, ...]]:
    """The reason in words, and the sources."""
    what = "source" if config.by is None else config.by
    names, place = np.unique(groups.astype(str), return_inverse=True)
    if config.drop:
        unknown = sorted(set(config.drop) - set(names.tolist()))
        if unknown:
            shown = ", ".join(map(repr, names[:20].tolist())) + (", ..." if len(names) > 20 else "")
            raise ConfigError(
                f"--drop names {', '.join(map(repr, unknown))}, which no pair has as {what}; there is: {shown}"
            )
        return f"{what} named", tuple(sorted(set(config.drop)))
    assert selection is not None and config.rule is not None
    chosen = guilty_sources(
        place,
        score_mass(ranked.scores, selection.rows, ranked.ranks > 0),
        ranked.ranks > 0,
        min_lift=config.min_lift,
        coverage=config.coverage,
        confidence=CONFIDENCE,
    )
    if not chosen:
        raise ConfigError(
            f"no {what} has a lift above {config.min_lift:g} in {config.rule.describe()} (low end of its "
            f"{CONFIDENCE:.0%} interval): nothing to drop; name some with --drop, or see pairtrace sources"
        )
    reason = (
        f"{what} with a lift above {config.min_lift:g} in {config.rule.describe()}, until {config.coverage:.0%} of it "
        "is covered"
    )
    return reason, tuple(names[chosen].tolist())


def _column(source: PairSource, schema: pa.Schema, name: str, count: int) -> np.ndarray:
    """Values of a column of the data as strings, object [N]; null is "".

    Raises:
        ConfigError: there is no such column, or it holds no plain values.
    """
    if name not in schema.names:
        raise ConfigError(f"--by is {name!r}, which is no column of the data; there is: {', '.join(schema.names)}")
    if pa.types.is_nested(schema.field(name).type):
        raise ConfigError(f"--by is {name!r}, which holds {schema.field(name).type}; expected a column of plain values")
    values: list[str] = []
    for batch in source.batches(schema):
        column = batch.column(schema.get_field_index(name)).to_pylist()
        values += ["" if value is None else str(value) for value in column]
    if len(values) != count:
        raise DataMismatchError(f"the data has {len(values)} rows, but had {count} when it was opened")
    return np.array(values, dtype=object)
