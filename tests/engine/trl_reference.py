"""TRL's own preparation of preference data, as the reference for rendering.

Nothing of pairtrace is used here: the rows go through `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`,
and the positions with loss are read off the collator's completion mask with the shift that the loss applies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

_PAD = 0


@dataclass(frozen=True)
class ReferenceSide:
    """Token ids of one side after truncation, and the positions of the tokens that the loss predicts."""

    ids: list[int]
    loss_positions: list[int]


def prepare(
    rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int | None = None, truncation: str = "keep_start"
) -> list[dict[str, Any]]:
    """TRL's `prompt_ids`, `chosen_ids`, `rejected_ids` with the number of the row that each came from."""
    PartialState(cpu=True)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation)
    dataset = datasets.Dataset.from_list([{**row, "row": number} for number, row in enumerate(rows)])
    prepared = trainer._prepare_dataset(dataset, tokenizer, args, "train")
    return prepared.select_columns(["row", "prompt_ids", "chosen_ids", "rejected_ids"]).to_list()


def collate(
    prepared: list[dict[str, Any]], *, max_length: int | None, truncation: str
) -> Iterator[tuple[ReferenceSide, ReferenceSide]]:
    """Chosen and rejected side of every prepared row, as the trainer's loss sees them."""
    collator = DataCollatorForPreference(pad_token_id=_PAD, max_length=max_length, truncation_mode=truncation)
    for first in range(0, len(prepared), 32):
        rows = prepared[first : first + 32]
        batch = {key: value.numpy() for key, value in collator(rows).items()}
        shifted = batch["completion_mask"][:, 1:]  # as in DPOTrainer._compute_loss
        sides = [
            ReferenceSide(ids[attention == 1].tolist(), (np.flatnonzero(mask) + 1).tolist())
            for ids, attention, mask in zip(batch["input_ids"], batch["attention_mask"], shifted, strict=True)
        ]
        yield from zip(sides[: len(rows)], sides[len(rows) :], strict=True)
