"""Reading a ranking: the pairs at its ends, and the sources that fill its top."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pairtrace.engine.intervals import wilson_interval
from pairtrace.engine.pair import Message
from pairtrace.engine.scored_data import open_scored_data
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import ConfigError, DataMismatchError

logger = logging.getLogger(__name__)

Ends = Literal["both", "top", "bottom"]


@dataclass(frozen=True, kw_only=True)
class RankedPair:
    """One pair of a ranking, with its text.

    Attributes:
        end: "top" or "bottom", the end of the ranking it stands at.
        rank: 1 is the highest score.
        row: row number in the data.
        score: cosine with the behaviour (bank: the largest).
        percentile: share of ranked pairs with this rank or a worse one, in percent.
        source, pair_id: as in the scores file.
        prompt, chosen, rejected: text, or lists of messages.
    """

    end: str
    rank: int
    row: int
    score: float
    percentile: float
    source: str
    pair_id: str
    prompt: str | list[Message] | None
    chosen: str | list[Message]
    rejected: str | list[Message]

    def to_dict(self) -> dict[str, Any]:
        """The pair as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """How one source takes part in the top of a ranking. Intervals are Wilson intervals, (low, high).

    Attributes:
        source: its name; "" stands for the pairs without one.
        rows: its ranked pairs.
        share_of_data: of all ranked pairs.
        top_rows: its pairs in the top.
        share_of_top: of the pairs in the top.
        share_of_top_interval: for that share.
        lift: share_of_top / share_of_data; 1 means no more than expected.
        lift_interval: from the interval of share_of_top.
        rate: share of the source's own pairs that are in the top.
        rate_interval: for that rate; sources are ordered by its low end.
    """

    source: str
    rows: int
    share_of_data: float
    top_rows: int
    share_of_top: float
    share_of_top_interval: tuple[float, float]
    lift: float
    lift_interval: tuple[float, float]
    rate: float
    rate_interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The share as plain JSON values."""
        return asdict(self)


def top(
    scores: str | Path,
    data: str | Path | None = None,
    behavior: str | None = None,
    k: int = 10,
    ends: Ends = "both",
    split: str | None = None,
) -> list[RankedPair]:
    """The pairs at the ends of a ranking, with their texts.

    Args:
        scores: scores file.
        data: the data that the store was made from; None takes the path that the store recorded.
        behavior: name; may be left out when the file has one behaviour.
        k: pairs per end; no pair is shown twice.
        ends: "top", "bottom", or "both" (the top first). A file with the best rows only has no bottom: "both" is
            its top.
        split: of a data set that has several.

    Returns:
        The top from rank 1 on, then the bottom from the last rank on.

    Raises:
        ConfigError: `k`, `ends` or `behavior` cannot be used.
        DataFormatError: not a scores file, or the data cannot be read.
        DataError: there is no data where the store recorded it.
        DataMismatchError: the data is not what the store was made from.
    """
    if k < 1:
        raise ConfigError(f"-k is {k}; expected at least 1")
    if ends not in ("both", "top", "bottom"):
        raise ConfigError(f"--end is {ends!r}; expected both, top or bottom")
    table = ScoresTable.open(scores, allow_top=True)
    name = table.choose(behavior)
    if table.keep_top is not None:
        ends = _only_top(table, k, ends)
    source = open_scored_data(table, data, split)
    ranks = table.ranks(name)
    count = int(ranks.max(initial=0))
    wanted: dict[int, str] = {}
    if ends != "bottom":
        wanted |= dict.fromkeys(range(1, min(k, count) + 1), "top")
    if ends != "top":
        wanted |= {rank: "bottom" for rank in range(count, max(count - k, 0), -1) if rank not in wanted}
    positions = np.flatnonzero(np.isin(ranks, list(wanted)))
    columns = ["row", "pair_id", "source", f"score:{name}", f"rank:{name}", f"percentile:{name}"]
    by_rank = {record[f"rank:{name}"]: record for record in table.read(columns).take(positions).to_pylist()}
    records = [by_rank[rank] for rank in wanted]
    pairs = source.take([record["row"] for record in records])
    result = []
    for record, pair, end in zip(records, pairs, wanted.values(), strict=True):
        if pair.row != record["row"] or pair.source != (record["source"] or "") or pair.problem:
            raise DataMismatchError(
                f"row {record['row']} comes from source {record['source']!r} in {table.path}, but the data has row "
                f"{pair.row} from {pair.source!r}{' (' + pair.problem + ')' if pair.problem else ''}; give the data "
                "that the store was made from"
            )
        result.append(
            RankedPair(
                end=end,
                rank=record[f"rank:{name}"],
                row=record["row"],
                score=record[f"score:{name}"],
                percentile=record[f"percentile:{name}"],
                source=record["source"] or "",
                pair_id=record["pair_id"],
                prompt=pair.prompt,
                chosen=pair.chosen,
                rejected=pair.rejected,
            )
        )
    return result


def _only_top(table: ScoresTable, k: int, ends: Ends) -> Ends:
    """The end that a file with the best rows only can show; ConfigError where it is not the one asked for."""
    if ends == "bottom":
        raise ConfigError(
            f"{table.path} holds only the top {table.keep_top} rows of each behaviour; score without --keep-top for "
            "--end bottom"
        )
    if table.keep_top is not None and k > table.keep_top:
        raise ConfigError(
            f"-k is {k}, but {table.path} holds only the top {table.keep_top} rows of each behaviour; score again with "
            f"--keep-top {k}"
        )
    return "top"


def sources(
    scores: str | Path,
    behavior: str | None = None,
    k: int | None = None,
    confidence: float = 0.95,
) -> list[SourceShare]:
    """How much of the top k comes from each source, against its share of the data.

    Sources are ordered by the low end of the interval of their rate, so that a source with two pairs does not win by
    having both of them in the top.

    Args:
        scores: scores file.
        behavior: name; may be left out when the file has one behaviour.
        k: size of the top; None takes 1 % of the ranked pairs, at least 1.
        confidence: of the intervals.

    Raises:
        ConfigError: `k`, `confidence` or `behavior` cannot be used, no pair has a rank, or the file holds only the
            best rows.
        DataFormatError: not a scores file.
    """
    table = ScoresTable.open(scores)
    ranks = table.ranks(table.choose(behavior))
    ranked = ranks > 0
    count = int(ranked.sum())
    if count == 0:
        raise ConfigError(f"no pair of {table.path} has a rank; there is nothing to share out")
    if k is None:
        k = max(1, count // 100)
    if count < len(ranks):
        logger.info("%d of %d pairs have no score and are in no figure below", len(ranks) - count, len(ranks))
    if not 1 <= k <= count:
        raise ConfigError(f"-k is {k}; expected 1 to {count}, the number of ranked pairs")
    names = np.array([name or "" for name in table.read(["source"]).column(0).to_pylist()], dtype=str)
    distinct, source_of = np.unique(names[ranked], return_inverse=True)
    row_counts = np.bincount(source_of)
    top_counts = np.bincount(source_of[ranks[ranked] <= k], minlength=len(distinct))
    shares = []
    for name, rows, top_rows in zip(distinct.tolist(), row_counts.tolist(), top_counts.tolist(), strict=True):
        share_of_data = rows / count
        low, high = wilson_interval(top_rows, k, confidence)
        shares.append(
            SourceShare(
                source=name,
                rows=rows,
                share_of_data=share_of_data,
                top_rows=top_rows,
                share_of_top=top_rows / k,
                share_of_top_interval=(low, high),
                lift=top_rows / k / share_of_data,
                lift_interval=(low / share_of_data, high / share_of_data),
                rate=top_rows / rows,
                rate_interval=wilson_interval(top_rows, rows, confidence),
            )
        )
    return sorted(shares, key=lambda share: (-share.rate_interval[0], -share.rate, share.source))
