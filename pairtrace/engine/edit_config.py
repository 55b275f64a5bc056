"""Settings and summary of an edit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError

Action = Literal["filter", "swap", "drop-sources"]
ACTIONS = ("filter", "swap", "drop-sources")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What `edit` does.

    Attributes:
        scores: scores file.
        out: parquet file to write; the change record goes beside it, `NAME.changes.parquet`.
        action: "filter" removes the selected pairs, "swap" exchanges their chosen and rejected, "drop-sources" removes
            every pair of some sources.
        rule: which pairs are selected; for "drop-sources" the top in which sources are over-represented. May be None
            when `drop` names the sources.
        data: the preference data; None takes the path that the store recorded.
        behavior: name; may be left out when the scores have one behaviour.
        drop: for "drop-sources": these sources instead of the over-represented ones.
        by: for "drop-sources": column of the data that takes the place of the source.
        min_lift: for "drop-sources": a source goes when the low end of the interval of its lift (share of the top, by
            score above the cut, over share of the data) is above this; see `guilty_sources`.
        coverage: for "drop-sources": no more sources go once those that do hold this share of the top.
        store: the activation store, for the random null; None takes the path that the scores recorded.
        seed: of the random directions.
        split: of a data set that has several.
    """

    scores: str
    out: str
    action: Action
    rule: SelectionRule | None = None
    data: str | None = None
    behavior: str | None = None
    drop: tuple[str, ...] = ()
    by: str | None = None
    min_lift: float = 1.0
    coverage: float = 0.9
    store: str | None = None
    seed: int = 0
    split: str | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"the action is {self.action!r}; expected one of {', '.join(ACTIONS)}")
        if not self.out.endswith(".parquet"):
            raise ConfigError(f"--out is {self.out!r}; edited data is parquet and ends in .parquet")
        if self.action != "drop-sources" and (self.drop or self.by):
            raise ConfigError(f"--drop and --by belong to --drop-sources, not to --{self.action}")
        if self.drop and self.rule is not None:
            raise ConfigError(
                "--drop names the sources; -k, --fraction, --threshold and --fdr would find them: give one"
            )
        if not self.drop and self.rule is None:
            raise ConfigError("expected one of -k, --fraction, --threshold and --fdr, got none")
        if self.min_lift < 0:
            raise ConfigError(f"--min-lift is {self.min_lift}; expected at least 0")
        if not 0 < self.coverage <= 1:
            raise ConfigError(f"--coverage is {self.coverage}; expected above 0 and at most 1")

    @property
    def changes(self) -> str:
        """Path of the change record."""
        return self.out.removesuffix(".parquet") + ".changes.parquet"


@dataclass(frozen=True, kw_only=True)
class SourceChange:
    """Rows of one source (or of one value of `by`) before and after an edit."""

    source: str
    rows_before: int
    rows_after: int
    swapped: int


@dataclass(frozen=True, kw_only=True)
class EditSummary:
    """What an edit did; `rows_before = rows_after + removed`.

    Attributes:
        out, changes: the files written.
        action: as in the settings.
        behavior: whose scores decided.
        rows_before, rows_after: rows of the data.
        removed, swapped: rows concerned.
        selected_by: the rule in words.
        lowest_score: the lowest score among the selected pairs; None where sources were named.
        estimated_fdr: estimated share of false discoveries among them, where the rule asks for one.
        swapped_columns: pairs of columns that were exchanged.
        dropped: sources that were removed.
        sources: per source, most changed first.
        seconds: wall time.
    """

    out: str
    changes: str
    action: str
    behavior: str
    rows_before: int
    rows_after: int
    removed: int
    swapped: int
    selected_by: str
    lowest_score: float | None
    estimated_fdr: float | None
    swapped_columns: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    sources: tuple[SourceChange, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)
