"""The DPO loss of a batch of pairs (arXiv 2305.18290, eq. 7).

Legend: B pairs, T tokens of the longest row, A positions whose logits are computed, V vocabulary.
Rows are padded on the right and attention is causal, so no token attends to padding and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pairtrace.engine.flops import ModelShape, causal
from pairtrace.engine.rendered import RenderedPair


@dataclass(frozen=True, slots=True, eq=False)
class PairBatch:
    """Pairs side by side.

    Attributes:
        pairs: the B pairs.
        ids: int64 [2 B, T]; chosen and rejected of a pair follow each other.
        wanted: bool [2 B, T - 1]; entry t stands for the response token at t + 1.
    """

    pairs: tuple[RenderedPair, ...]
    ids: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, pairs: Sequence[RenderedPair], device: torch.device) -> PairBatch:
        """Pad at least one pair."""
        rows = [
            row
            for pair in pairs
            for row in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
        ]
        width = max(len(ids) for ids, _ in rows)
        padded = torch.zeros(len(rows), width, dtype=torch.int64)
        wanted = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for number, (ids, start) in enumerate(rows):
            padded[number, : len(ids)] = torch.from_numpy(ids)
            wanted[number, start - 1 : len(ids) - 1] = True
        return cls(tuple(pairs), padded.to(device), wanted.to(device))

    @property
    def tokens(self) -> int:
        """Tokens of both sides of all pairs, without the padding."""
        return sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.pairs)

    def forward_flops(self, shape: ModelShape, *, every_logit: bool) -> float:
        """Operations of one forward pass, without the padding.

        Args:
            shape: of the model.
            every_logit: the LM head runs on every token, not only where a response token is predicted.
        """
        total = 0.0
        for pair in self.pairs:
            for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
                total += shape.forward_flops(len(ids), causal(float(len(ids))), shape.blocks)
                total += shape.head_flops_per_token * (len(ids) if every_logit else len(ids) - start)
        return total


def batches(pairs: Sequence[RenderedPair], token_budget: int) -> Iterator[list[int]]:
    """Positions of pairs of similar length whose padded rows fit the budget together; at least one pair each."""
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    batch: list[int] = []
    for position in order:
        if batch and 2 * lengths[position] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def log_probabilities(model: Any, batch: PairBatch, *, length_normalized: bool, every_logit: bool = False) -> Tensor:
    """Log-probability of each response given its prompt.

    Args:
        model: a causal language model of transformers.
        batch: of pairs.
        length_normalized: divided by the number of response tokens.
        every_logit: compute the logits of the prompt too, as the published procedure does.

    Returns:
        float32 [B, 2], chosen and rejected.
    """
    inputs, following, wanted = batch.ids[:, :-1], batch.ids[:, 1:], batch.wanted
    if every_logit:
        logits = model(input_ids=inputs, use_cache=False).logits
    else:
        positions = wanted.any(dim=0).nonzero().squeeze(1)  # [A]
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=positions).logits
        following, wanted = following[:, positions], wanted[:, positions]
    losses = functional.cross_entropy(logits[wanted].float(), following[wanted], reduction="none")
    sums = torch.zeros(wanted.shape, device=losses.device).masked_scatter(wanted, -losses).sum(dim=1)
    if length_normalized:
        sums = sums / wanted.sum(dim=1)
    return sums.view(-1, 2)


def dpo_losses(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Loss of each pair, float32 [B], from log-probabilities float32 [B, 2] (chosen, rejected)."""
    margin = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -functional.logsigmoid(beta * margin)
