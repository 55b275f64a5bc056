"""Batches of training: which pairs form a step, and the tensors of a forward pass.

Legend: B pairs of a batch, S sequences, T tokens of the longest one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pairtrace.engine.rendered import RenderedPair

# Rows are sorted by length inside pools of so many steps, so that the order of training stays random.
_STEPS_PER_POOL = 16

Side = tuple[np.ndarray, int]
"""Token ids of one sequence, int32 [T], and the position of its first token with loss."""


def sides(pair: RenderedPair) -> tuple[Side, Side]:
    """The chosen and the rejected sequence of a pair."""
    return (pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)


def pad_sides(rows: Sequence[Side], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Sequences side by side, padded on the right: what TRL's collator makes of them.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask`: int64 [S, T].
    """
    width = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    attention, completion = np.zeros_like(input_ids), np.zeros_like(input_ids)
    for number, (ids, start) in enumerate(rows):
        input_ids[number, : len(ids)] = ids
        attention[number, : len(ids)] = 1
        completion[number, start : len(ids)] = 1
    arrays = {"input_ids": input_ids, "attention_mask": attention, "completion_mask": completion}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pad_pairs(pairs: Sequence[RenderedPair], reference: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
    """The batch of some pairs: all chosen sequences, then all rejected ones.

    Args:
        pairs: B pairs.
        reference: float32 [B, 2], log-probabilities of chosen and rejected under the reference.
        pad_token_id: fills up shorter sequences.

    Returns:
        What `pad_sides` returns with S = 2 B, and `ref_chosen_logps`, `ref_rejected_logps`: float32 [B].
    """
    both = [sides(pair) for pair in pairs]
    batch = pad_sides([chosen for chosen, _ in both] + [rejected for _, rejected in both], pad_token_id)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = torch.from_numpy(reference.T.copy())
    return batch


class StepBatches:
    """The order of training: lists of pair indices, one per forward pass.

    An epoch's order depends on the seed and the epoch only, so that a resumed run goes on with the same one. The
    pairs of a step do not depend on how many forward passes they are spread over.

    Args:
        lengths: [N], tokens of each pair, by which similar ones are grouped.
        batch_size: pairs per step; the last step of an epoch may have fewer.
        accumulation: forward passes per step.
        seed: of the order.
        group_by_length: put pairs of similar length into a step.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, accumulation: int, seed: int, group_by_length: bool
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._micro_batch = batch_size // accumulation
        self._seed = seed
        self._group = group_by_length
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Forward passes of an epoch."""
        full, rest = divmod(len(self._lengths), self._batch_size)
        return full * (self._batch_size // self._micro_batch) + -(-rest // self._micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        """Pair indices of one forward pass after another."""
        for step in self.steps():
            passes = -(-len(step) // self._micro_batch)
            # Evenly: passes count alike in a step, so a short one would give its pairs more weight.
            yield from ([int(index) for index in part] for part in np.array_split(step, passes))

    def steps(self) -> list[list[int]]:
        """Pair indices of the epoch's steps; a step that is not full comes last."""
        rng = random.Random(f"{self._seed}:{self._epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        size = self._batch_size
        cut = len(order) - len(order) % size
        order, rest = order[:cut], order[cut:]
        if not self._group:
            steps = [order[first : first + size] for first in range(0, cut, size)]
        else:
            steps = []
            for first in range(0, cut, size * _STEPS_PER_POOL):
                pool = sorted(order[first : first + size * _STEPS_PER_POOL], key=self._lengths.__getitem__)
                pooled = [pool[place : place + size] for place in range(0, len(pool), size)]
                rng.shuffle(pooled)
                steps += pooled
        return [*steps, rest] if rest else steps
