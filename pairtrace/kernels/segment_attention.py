"""Attention over packs of two-leaf trees: a prefix computed once, then chosen and rejected after it.

A pack holds several pairs side by side without padding. Each pair is a contiguous run
`[shared | chosen | rejected]`: the tokens that both responses start with, the rest of the chosen sequence, the
rest of the rejected sequence. A chosen token attends to `shared` and to earlier chosen tokens; a rejected token
to `shared` and to earlier rejected tokens, never to chosen ones; nothing attends across pairs.

Legend: T tokens of the pack, H query heads, G key/value heads (H is a multiple of G), E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

IMPLEMENTATIONS = ("auto", "reference", "segments", "varlen")


@dataclass(frozen=True, slots=True)
class TreeSegment:
    """Where one pair lies in its pack: token counts, and the index of its first token."""

    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def chosen_start(self) -> int:
        """Index of the first token that only chosen has."""
        return self.start + self.shared

    @property
    def rejected_start(self) -> int:
        """Index of the first token that only rejected has."""
        return self.start + self.shared + self.chosen

    @property
    def stop(self) -> int:
        """Index after the pair's last token."""
        return self.rejected_start + self.rejected


class SegmentPlan:
    """The segments of one pack, with the index tensors that an attention call needs, built once per device."""

    def __init__(self, segments: Sequence[TreeSegment], device: torch.device | str = "cpu") -> None:
        cursor = 0
        for segment in segments:
            assert segment.start == cursor, "segments must be contiguous and in order"
            assert segment.chosen > 0 and segment.rejected > 0, "both leaves need a token"
            cursor = segment.stop
        self.segments = tuple(segments)
        self.device = torch.device(device)
        self.tokens = cursor

    @cached_property
    def positions(self) -> torch.Tensor:
        """Position of every token in its own sequence, int64 [T]; rejected restarts after the shared part."""
        parts = []
        for segment in self.segments:
            parts.append(torch.arange(segment.shared + segment.chosen))
            parts.append(torch.arange(segment.shared, segment.shared + segment.rejected))
        positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return positions.to(self.device)

    @cached_property
    def allowed(self) -> torch.Tensor:
        """Which key every query may see, bool [T, T]: the definition, used by the plain reference."""
        allowed = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
        for segment in self.segments:
            shared = slice(segment.start, segment.chosen_start)
            chosen = slice(segment.chosen_start, segment.rejected_start)
            rejected = slice(segment.rejected_start, segment.stop)
            for leaf in (shared, chosen, rejected):
                length = leaf.stop - leaf.start
                allowed[leaf, leaf] = torch.ones(length, length, dtype=torch.bool).tril()
            allowed[chosen, shared] = True
            allowed[rejected, shared] = True
        return allowed.to(self.device)

    @cached_property
    def key_index(self) -> torch.Tensor:
        """Keys of the variable-length form, int64: per pair `[shared, chosen]` and then `[shared, rejected]`."""
        parts = []
        for segment in self.segments:
            parts.append(torch.arange(segment.start, segment.rejected_start))
            parts.append(torch.arange(segment.start, segment.chosen_start))
            parts.append(torch.arange(segment.rejected_start, segment.stop))
        return torch.cat(parts).to(self.device)

    @cached_property
    def query_lengths(self) -> list[int]:
        """Query lengths of the variable-length form: `[S+C, R]` per pair, in pack order (no gather needed)."""
        return [n for s in self.segments for n in (s.shared + s.chosen, s.rejected)]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Key lengths of the variable-length form: `[S+C, S+R]` per pair."""
        return [n for s in self.segments for n in (s.shared + s.chosen, s.shared + s.rejected)]

    @cached_property
    def cumulative_lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cumulative query and key lengths, int32 [2 * pairs + 1] each, on the pack's device."""

        def cumulative(lengths: list[int]) -> torch.Tensor:
            totals = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            totals[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
            return totals.to(self.device)

        return cumulative(self.query_lengths), cumulative(self.key_lengths)


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SegmentPlan,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Dense attention with an explicit mask over the whole pack: quadratic in T, obviously right."""
    positions = plan.positions
    allowed = plan.allowed
    if window is not None:
        allowed = allowed & (positions[None, :] > positions[:, None] - window)
    return _dense(query, key, value, allowed, scaling, softcap)


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention under a bool mask [Tq, Tk], softmax in float32, optional `softcap * tanh(s / softcap)`."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    logits = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~allowed, float("-inf"))
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of the last Tq tokens of one sequence of Tk tokens (bottom-right causal)."""
    queries, keys = query.shape[2], key.shape[2]
    windowed = window is not None and keys > window
    if softcap is None and not windowed and queries == keys:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    rows = torch.arange(keys - queries, keys, device=query.device)[:, None]
    columns = torch.arange(keys, device=query.device)[None, :]
    allowed = columns <= rows
    if windowed:
        assert window is not None
        allowed = allowed & (columns > rows - window)
    if softcap is not None:
        return _dense(query, key, value, allowed, scaling, softcap)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SegmentPlan,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Two attention calls per pair: causal over shared + chosen, then the rejected tokens over shared + rejected."""
    output = torch.empty(
        (1, plan.tokens, query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device
    ).transpose(1, 2)
    for segment in plan.segments:
        first = slice(segment.start, segment.rejected_start)
        output[:, :, first] = _causal(
            query[:, :, first], key[:, :, first], value[:, :, first], scaling, window, softcap
        )
        shared = slice(segment.start, segment.chosen_start)
        leaf = slice(segment.rejected_start, segment.stop)
        keys = torch.cat((key[:, :, shared], key[:, :, leaf]), dim=2)
        values = torch.cat((value[:, :, shared], value[:, :, leaf]), dim=2)
        if segment.shared > segment.rejected:
            output[:, :, leaf] = _causal(query[:, :, leaf], keys, values, scaling, window, softcap)
        else:
            # The masked call cannot skip the upper triangle: with a short prefix it is cheaper to compute the
            # prefix's rows again by the causal kernel and to discard them.
            queries = torch.cat((query[:, :, shared], query[:, :, leaf]), dim=2)
            both = _causal(queries, keys, values, scaling, window, softcap)
            output[:, :, leaf] = both[:, :, segment.shared :]
    return output


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SegmentPlan,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One variable-length flash-attention call for the whole pack (CUDA, 16-bit types)."""
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None
    query_totals, key_totals = plan.cumulative_lengths
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, plan.key_index),
        value[0].transpose(0, 1).index_select(0, plan.key_index),
        query_totals,
        key_totals,
        max(plan.query_lengths),
        max(plan.key_lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output.transpose(0, 1).unsqueeze(0)


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SegmentPlan,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend within the trees of a pack.

    Args:
        query: [1, H, T, E], rotary embedding already applied with `plan.positions`.
        key: [1, G, T, E].
        value: [1, G, T, E].
        plan: the pack's segments; `plan.tokens` is T.
        scaling: factor on the dot products, usually `E ** -0.5`.
        window: a token sees the last `window` positions, itself included (Mistral, OLMo 3, Gemma 2); None for all.
        softcap: logits become `softcap * tanh(logits / softcap)` before the mask (Gemma 2); None for none.
        impl: "reference" (dense mask), "segments" (two calls per pair), "varlen" (one flash-attention call; CUDA,
            16-bit, no softcap), or "auto".

    Returns:
        [1, H, T, E], same dtype and device as `query`.

    Raises:
        ValueError: for an unknown `impl`.
    """
    assert query.shape[0] == 1 and query.shape[2] == plan.tokens == key.shape[2]
    if impl == "auto":
        flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and softcap is None
        impl = "varlen" if flash else "segments"
    implementations = {"reference": _reference, "segments": _segments, "varlen": _varlen}
    if impl not in implementations:
        raise ValueError(f"unknown attention implementation {impl!r}; expected one of {IMPLEMENTATIONS}")
    return implementations[impl](query, key, value, plan, scaling, window, softcap)
