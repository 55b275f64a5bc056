"""From hidden states in a paged cache to the rows of a store: what runs inside vLLM's worker, without vLLM.

Both sides of a pair are sequences of their own and may end in different steps. The mean of the side that ends first
waits on the device, as float32 [L, D]; when the other one has come, the pair becomes a row: difference, norm and cast.
Only rows leave the device, all those of a step in one copy.

Legend: n pairs of a step, S sequences, T tokens, L layers, D width, B blocks of a cache, b tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pairtrace.kernels.pooling import segment_mean

CHOSEN, REJECTED = 0, 1
# Tokens gathered at once: bounds the copy of the hidden states that pooling needs.
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Span:
    """The pooled tokens of one sequence.

    Attributes:
        pair: number of the pair, the same on both sides.
        side: `CHOSEN` or `REJECTED`.
        start, stop: first pooled position and the one after the last.
        blocks: block of the cache for each b positions of the sequence, in order.
        ids: token ids of the span, where layer 0 is looked up; else empty.
    """

    pair: int
    side: int
    start: int
    stop: int
    blocks: tuple[int, ...]
    ids: tuple[int, ...] = ()


class PairPooler:
    """Pools the spans of finished sequences and keeps the rows until they are taken.

    Args:
        dtype: of the rows: "float16", "bfloat16" or "float32".
        sides: rows also hold the means of chosen and rejected.
    """

    def __init__(self, dtype: str, sides: bool) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._sides = sides
        self._waiting: dict[int, tuple[int, torch.Tensor]] = {}
        self._rows: list[tuple[list[int], torch.Tensor, Any]] = []

    def add(self, cache: torch.Tensor, spans: Sequence[Span], embed: Any = None) -> None:
        """Pool the spans of one step.

        Args:
            cache: hidden states [B, L', b, D], any float dtype; L' leaves layer 0 out where `embed` is given.
            spans: of sequences whose states are all in the cache; a sequence that comes a second time counts once.
            embed: makes the states of layer 0, [T, D], of token ids, int64 [T]; None where the cache holds them.
        """
        chosen: list[torch.Tensor] = []
        rejected: list[torch.Tensor] = []
        pairs: list[int] = []
        for span, mean in zip(spans, self._means(cache, spans, embed), strict=True):
            waiting = self._waiting.get(span.pair)
            if waiting is None or waiting[0] == span.side:
                self._waiting[span.pair] = (span.side, mean)
                continue
            del self._waiting[span.pair]
            both = {span.side: mean, waiting[0]: waiting[1]}
            pairs.append(span.pair)
            chosen.append(both[CHOSEN])
            rejected.append(both[REJECTED])
        if pairs:
            self._leave(pairs, self._packed(torch.stack(chosen), torch.stack(rejected)))

    def take(self) -> list[tuple[list[int], bytes]]:
        """The rows that are ready, as (pairs, bytes) per step; see `rows.unpack_rows`. They are not kept any longer."""
        taken = []
        for pairs, packed, event in self._rows:
            if event is not None:
                event.synchronize()
            taken.append((pairs, packed.numpy().tobytes()))
        self._rows.clear()
        return taken

    def _means(self, cache: torch.Tensor, spans: Sequence[Span], embed: Any) -> list[torch.Tensor]:
        """float32 [L, D] of each span."""
        means: list[torch.Tensor] = []
        first = 0
        while first < len(spans):
            last, tokens = first, 0
            while last < len(spans) and (last == first or tokens + _length(spans[last]) <= _TOKENS_AT_ONCE):
                tokens += _length(spans[last])
                last += 1
            means += self._pooled(cache, spans[first:last], embed)
            first = last
        return means

    def _pooled(self, cache: torch.Tensor, spans: Sequence[Span], embed: Any) -> list[torch.Tensor]:
        size = cache.shape[2]
        blocks, offsets, segments = [], [], []
        for number, span in enumerate(spans):
            positions = torch.arange(span.start, span.stop)
            blocks.append(torch.tensor(span.blocks)[positions // size])
            offsets.append(positions % size)
            segments.append(torch.full((len(positions),), number))
        block, offset, segment = (torch.cat(parts).to(cache.device) for parts in (blocks, offsets, segments))
        layers = [segment_mean(cache[block, layer, offset], segment, len(spans)) for layer in range(cache.shape[1])]
        if embed is not None:
            ids = torch.tensor([token for span in spans for token in span.ids], device=cache.device)
            layers.insert(0, segment_mean(embed(ids), segment, len(spans)))
        return list(torch.stack(layers, dim=1))

    def _packed(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Everything that is kept of n pairs, float32 [n, L, D] per side, as uint8 [bytes]."""
        difference = chosen - rejected
        norm = torch.linalg.vector_norm(difference.double(), dim=2).float()
        kept = [difference, chosen, rejected] if self._sides else [difference]
        peak = torch.stack([values.abs().amax(dim=(1, 2)) for values in kept]).amax(dim=0)
        finite = [torch.isfinite(side).all(dim=2).all(dim=1).float() for side in (chosen, rejected)]
        parts = [norm, torch.stack([peak, *finite], dim=1), *(values.to(self._dtype) for values in kept)]
        return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])

    def _leave(self, pairs: list[int], packed: torch.Tensor) -> None:
        if packed.device.type == "cpu":
            self._rows.append((pairs, packed, None))
            return
        host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        event = torch.Event(packed.device)
        event.record()
        self._rows.append((pairs, host, event))


def _length(span: Span) -> int:
    return span.stop - span.start
