"""Packs: pairs side by side without padding, each computed as a tree whose common start is run once.

Legend: T tokens of a pack, P pairs of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pairtrace.engine.flops import ModelShape, causal
from pairtrace.engine.rendering import RenderedPair
from pairtrace.kernels.segment_attention import SegmentPlan, TreeSegment

# Segments per pair in the pooling of a pack: response tokens inside the shared start, then the two leaves.
SHARED, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass.

    Attributes:
        pairs: positions of the pack's pairs in the sequence that was packed.
        input_ids: int64 [T].
        plan: segments and positions for the attention.
        segment_of_token: int64 [T], `3 * pair + {SHARED, CHOSEN, REJECTED}` for pooled tokens, -1 for the others.
        shared_weight: float32 [P, 2], the share of (chosen, rejected) pooled tokens that lie in the shared start.
    """

    pairs: range
    input_ids: torch.Tensor
    plan: SegmentPlan
    segment_of_token: torch.Tensor
    shared_weight: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens that the forward pass computes."""
        return self.plan.tokens


def shared_length(pair: RenderedPair) -> int:
    """How many leading tokens of both sequences are computed once.

    That is their longest common prefix, cut so that each leaf keeps a token; where the two responses begin at
    different indices (truncation that keeps the end), it stops before the first pooled token, because a shared
    token must be pooled for both sides or for none.
    """
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    limit = min(len(chosen), len(rejected)) - 1
    differs = np.flatnonzero(chosen[:limit] != rejected[:limit])
    shared = int(differs[0]) if len(differs) else limit
    if pair.chosen_start != pair.rejected_start:
        shared = min(shared, pair.chosen_start, pair.rejected_start)
    return shared


def packed_tokens(pair: RenderedPair) -> int:
    """Tokens that a pair costs in a pack: its shared start once, and both leaves."""
    return len(pair.chosen_ids) + len(pair.rejected_ids) - shared_length(pair)


def packed_flops(pair: RenderedPair, shape: ModelShape, blocks: int) -> float:
    """Operations of a pair in a pack, through the first `blocks` blocks, without the LM head."""
    shared = shared_length(pair)
    chosen, leaf = float(len(pair.chosen_ids)), float(len(pair.rejected_ids) - shared)
    return shape.forward_flops(chosen + leaf, causal(chosen) + leaf * shared + causal(leaf), blocks)


def next_members(costs: Sequence[int], start: int, token_budget: int) -> range:
    """The pairs of the pack that begins at `start`: as many as fit the budget in order, and at least one.

    Args:
        costs: `packed_tokens` of every pair.
        start: index of the first pair.
        token_budget: tokens that the pack may hold.
    """
    tokens = costs[start]
    stop = start + 1
    while stop < len(costs) and tokens + costs[stop] <= token_budget:
        tokens += costs[stop]
        stop += 1
    return range(start, stop)


def build_pack(pairs: Sequence[RenderedPair], members: range, device: torch.device) -> Pack:
    """Lay out the pairs `members` of `pairs` as one pack on `device`."""
    ids: list[np.ndarray] = []
    segments: list[TreeSegment] = []
    pooled: list[np.ndarray] = []
    weights = np.zeros((len(members), 2), dtype=np.float32)
    cursor = 0
    for number, index in enumerate(members):
        pair = pairs[index]
        shared = shared_length(pair)
        segment = TreeSegment(cursor, shared, len(pair.chosen_ids) - shared, len(pair.rejected_ids) - shared)
        segments.append(segment)
        ids += [pair.chosen_ids, pair.rejected_ids[shared:]]
        pooled.append(_segment_numbers(pair, segment, 3 * number))
        for side, (length, first) in enumerate(
            ((len(pair.chosen_ids), pair.chosen_start), (len(pair.rejected_ids), pair.rejected_start))
        ):
            weights[number, side] = max(0, shared - first) / (length - first)
        cursor = segment.stop
    return Pack(
        pairs=members,
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
        plan=SegmentPlan(segments, device),
        segment_of_token=torch.from_numpy(np.concatenate(pooled)).to(device),
        shared_weight=torch.from_numpy(weights).to(device),
    )


def _segment_numbers(pair: RenderedPair, segment: TreeSegment, base: int) -> np.ndarray:
    numbers = np.full(segment.stop - segment.start, -1, dtype=np.int64)
    chosen_leaf, rejected_leaf = segment.shared, segment.shared + segment.chosen
    if pair.chosen_start == pair.rejected_start:
        numbers[pair.chosen_start : segment.shared] = base + SHARED
    numbers[max(pair.chosen_start, chosen_leaf) : rejected_leaf] = base + CHOSEN
    rejected_first = rejected_leaf + max(0, pair.rejected_start - segment.shared)
    numbers[rejected_first:] = base + REJECTED
    return numbers
