"""The four-condition filter: which scenarios show behaviour that preference training introduced.

Prompts are rolled out under {base, tuned} x {plain, distractor}. A scenario is kept when the behaviour never shows in
base-plain, base-distractor and tuned-plain, and at least once in tuned-distractor (arXiv 2602.11079). Without
distractors the two plain cells take these parts. Each rollout that shows the behaviour is then paired with a safe
rollout of the base model to the same conversation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pairtrace.engine.intervals import wilson_interval
from pairtrace.engine.prompts import DISTRACTOR, PLAIN
from pairtrace.engine.rollout_table import BASE, TUNED, RolloutTable
from pairtrace.errors import ConfigError, DataError, DataFormatError

CELLS = ((BASE, PLAIN), (BASE, DISTRACTOR), (TUNED, PLAIN), (TUNED, DISTRACTOR))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Verdicts under one condition of one model.

    Attributes:
        model: "base" or "tuned".
        condition: "plain" or "distractor".
        rollouts: all responses.
        missing: responses without a verdict.
        shown: responses that show the behaviour.
        rate: shown / (rollouts - missing); None when nothing was decided.
        interval: 95 % Wilson interval of the rate. Rollouts of one prompt are treated as independent.
    """

    model: str
    condition: str
    rollouts: int
    missing: int
    shown: int
    rate: float | None
    interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RolloutPair:
    """Two rollouts to one conversation, as rows of the table, to be read as a preference pair.

    Attributes:
        prompt_id: of their prompt.
        chosen_row: the rollout that shows what changed: the behaviour.
        rejected_row: what it is compared with: a safe rollout of the base model.
    """

    prompt_id: str
    chosen_row: int
    rejected_row: int


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What the filter found.

    Attributes:
        scenarios: prompts in the table.
        kept: ids of the scenarios that passed, in table order.
        dropped: number of scenarios by the first reason that applies: "undecided" (a cell has no verdict at all),
            "shown in {model}-{condition}", "never shown in {model}-{condition}", "no safe base rollout".
        cells: two or four.
        pairs: rollout pairs of the kept scenarios.
    """

    scenarios: int
    kept: tuple[str, ...]
    dropped: dict[str, int]
    cells: tuple[Cell, ...]
    pairs: tuple[RolloutPair, ...]


def filter_scenarios(table: RolloutTable, max_base_rate: float = 0.0) -> Filtered:
    """Apply the filter and pair the rollouts.

    A missing verdict counts as neither behaviour nor safe.

    Args:
        table: judged rollouts; four conditions when any row has the distractor condition.
        max_base_rate: highest share of decided rollouts that may show the behaviour in each cell that should not.

    Raises:
        ConfigError: `max_base_rate` is not in [0, 1].
        DataFormatError: the rollouts to be paired answered different conversations.
    """
    if not 0 <= max_base_rate <= 1:
        raise ConfigError(f"--max-base-rate is {max_base_rate}; expected a share from 0 to 1")
    identifiers, prompt_of = _first_seen(table.strings("prompt_id"))
    models, conditions, verdicts = table.strings("model"), table.strings("condition"), table.verdicts()
    cell_of = 2 * (models == TUNED) + (conditions == DISTRACTOR)
    used = [0, 1, 2, 3] if (conditions == DISTRACTOR).any() else [0, 2]
    slots = 4 * prompt_of + cell_of

    def count(rows: np.ndarray) -> np.ndarray:
        return np.bincount(slots[rows], minlength=4 * len(identifiers)).reshape(-1, 4)

    total, shown, safe = count(verdicts >= -1), count(verdicts == 1), count(verdicts == 0)
    clean_cells, show_cell = used[:-1], used[-1]
    safe_cell = show_cell - 2
    reasons = np.full(len(identifiers), "", dtype=object)

    def drop(prompts: np.ndarray, reason: str) -> None:
        reasons[prompts & (reasons == "")] = reason

    decided = shown + safe
    drop((decided[:, used] == 0).any(axis=1), "undecided")
    for cell in clean_cells:
        # The tolerance: 0.29 * 100 is a little less than 29.
        drop(shown[:, cell] > max_base_rate * decided[:, cell] + 1e-9, f"shown in {'-'.join(CELLS[cell])}")
    drop(shown[:, show_cell] == 0, f"never shown in {'-'.join(CELLS[show_cell])}")
    drop(safe[:, safe_cell] == 0, "no safe base rollout")
    kept = np.flatnonzero(reasons == "")
    pairs = [
        RolloutPair(prompt_id=identifiers[prompt], chosen_row=row, rejected_row=safe_rows[number % len(safe_rows)])
        for prompt, shown_rows, safe_rows in _rows_by_prompt(kept, prompt_of, cell_of, verdicts, show_cell, safe_cell)
        for number, row in enumerate(shown_rows)
    ]
    require_same_conversations(table, pairs)
    return Filtered(
        scenarios=len(identifiers),
        kept=tuple(identifiers[prompt] for prompt in kept),
        dropped=dict(Counter(reason for reason in reasons.tolist() if reason)),
        cells=tuple(
            _cell(cell, int(total[:, cell].sum()), int(decided[:, cell].sum()), int(shown[:, cell].sum()))
            for cell in used
        ),
        pairs=tuple(pairs),
    )


def require_scenarios(filtered: Filtered) -> None:
    """Check that something is left to make a vector from.

    Raises:
        DataError: nothing is; the message gives the counts of every cell and what to try.
    """
    if filtered.pairs:
        return
    cells = "; ".join(
        f"{cell.model}-{cell.condition}: {cell.shown} of {cell.rollouts - cell.missing} show it"
        + (f" ({cell.missing} undecided)" if cell.missing else "")
        for cell in filtered.cells
    )
    dropped = ", ".join(f"{count} {reason}" for reason, count in filtered.dropped.items())
    raise DataError(
        f"none of the {filtered.scenarios} scenarios passed the filter. Dropped: {dropped}. Rollouts: {cells}. "
        "Try more samples per prompt, a higher temperature, more prompts, or a --max-base-rate above 0 when the base "
        "model shows the behaviour now and then; check the verdicts in the rollouts file"
    )


def _first_seen(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Distinct values in order of appearance, and for each row its position among them."""
    positions: dict[str, int] = {}
    codes = np.array([positions.setdefault(value, len(positions)) for value in values.tolist()], dtype=np.int64)
    return list(positions), codes


def _rows_by_prompt(
    kept: np.ndarray,
    prompt_of: np.ndarray,
    cell_of: np.ndarray,
    verdicts: np.ndarray,
    show_cell: int,
    safe_cell: int,
) -> list[tuple[int, list[int], list[int]]]:
    """For every kept prompt: its number, the rows that show the behaviour, the safe base rows."""
    rows: dict[int, tuple[list[int], list[int]]] = {int(prompt): ([], []) for prompt in kept}
    for side, (cell, verdict) in enumerate(((show_cell, 1), (safe_cell, 0))):
        for row in np.flatnonzero((cell_of == cell) & (verdicts == verdict)).tolist():
            found = rows.get(int(prompt_of[row]))
            if found is not None:
                found[side].append(row)
    return [(prompt, shown, safe) for prompt, (shown, safe) in rows.items()]


def require_same_conversations(table: RolloutTable, pairs: list[RolloutPair]) -> None:
    """Check that the two rollouts of every pair answer the same messages.

    Raises:
        DataFormatError: those of a pair do not.
    """
    # One take for both sides of all pairs: taking row by row would copy the whole column each time.
    rows = [pair.chosen_row for pair in pairs] + [pair.rejected_row for pair in pairs]
    messages = table.table["messages"].take(pa.array(rows, pa.int64())).to_pylist()
    for pair, shown, safe in zip(pairs, messages, messages[len(pairs) :], strict=False):
        if shown != safe:
            raise DataFormatError(
                f"the rollouts of prompt {pair.prompt_id!r} (rows {pair.chosen_row} and {pair.rejected_row}) answer "
                "different conversations under the same condition; rollouts to be compared need the same messages"
            )


def _cell(cell: int, rollouts: int, decided: int, shown: int) -> Cell:
    model, condition = CELLS[cell]
    return Cell(
        model=model,
        condition=condition,
        rollouts=rollouts,
        missing=rollouts - decided,
        shown=shown,
        rate=shown / decided if decided else None,
        interval=wilson_interval(shown, decided),
    )
