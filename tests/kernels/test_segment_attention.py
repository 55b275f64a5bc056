"""Segment attention against plain attention of every sequence on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pairtrace.kernels import segment_attention as module
from pairtrace.kernels.segment_attention import SegmentPlan, TreeSegment, segment_attention

SIZES = [(5, 3, 2), (0, 4, 1), (1, 1, 7), (12, 2, 9), (3, 8, 8)]


def make_plan(sizes: list[tuple[int, int, int]]) -> SegmentPlan:
    segments, cursor = [], 0
    for shared, chosen, rejected in sizes:
        segments.append(TreeSegment(cursor, shared, chosen, rejected))
        cursor = segments[-1].stop
    return SegmentPlan(segments)


def inputs(tokens: int, heads: int = 4, groups: int = 2, width: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(1, heads, tokens, width, generator=generator),
        torch.randn(1, groups, tokens, width, generator=generator),
        torch.randn(1, groups, tokens, width, generator=generator),
    )


def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SegmentPlan,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Each sequence alone, by explicit loops over its queries: no code shared with the module."""
    output = torch.full((query.shape[1], query.shape[2], query.shape[3]), float("nan"))
    groups = query.shape[1] // key.shape[1]
    for segment in plan.segments:
        shared = list(range(segment.start, segment.start + segment.shared))
        chosen = list(range(segment.chosen_start, segment.chosen_start + segment.chosen))
        rejected = list(range(segment.rejected_start, segment.rejected_start + segment.rejected))
        for sequence in (shared + chosen, shared + rejected):
            for place, token in enumerate(sequence):
                visible = sequence[max(0, place + 1 - (window or place + 1)) : place + 1]
                for head in range(query.shape[1]):
                    logits = key[0, head // groups, visible] @ query[0, head, token] * 0.3
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    output[head, token] = torch.softmax(logits, 0) @ value[0, head // groups, visible]
    return output[None]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("impl", ["reference", "segments"])
def test_equals_each_sequence_alone(impl: str, window: int | None, softcap: float | None) -> None:
    plan = make_plan(SIZES)
    query, key, value = inputs(plan.tokens)
    found = segment_attention(query, key, value, plan, scaling=0.3, window=window, softcap=softcap, impl=impl)
    torch.testing.assert_close(found, one_by_one(query, key, value, plan, window, softcap), rtol=1e-5, atol=1e-6)


def emulated_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What the documentation of `varlen_attn` promises: bottom-right aligned windows per sequence."""
    left, right = window_size
    assert right == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    parts = []
    for number in range(len(cu_seq_q) - 1):
        rows = slice(int(cu_seq_q[number]), int(cu_seq_q[number + 1]))
        columns = slice(int(cu_seq_k[number]), int(cu_seq_k[number + 1]))
        queries, keys = rows.stop - rows.start, columns.stop - columns.start
        assert 0 < queries <= max_q and 0 < keys <= max_k
        place = torch.arange(keys - queries, keys)[:, None]
        other = torch.arange(keys)[None, :]
        allowed = (other <= place) & ((left < 0) | (other >= place - left))
        groups = query.shape[1] // key.shape[1]
        logits = torch.einsum("qhe,khe->hqk", query[rows], key[columns].repeat_interleave(groups, 1)) * scale
        weights = torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1)
        parts.append(torch.einsum("hqk,khe->qhe", weights, value[columns].repeat_interleave(groups, 1)))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_varlen_form_hands_over_the_right_segments(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", emulated_varlen)
    plan = make_plan(SIZES)
    query, key, value = inputs(plan.tokens)
    found = segment_attention(query, key, value, plan, scaling=0.3, window=window, impl="varlen")
    torch.testing.assert_close(found, one_by_one(query, key, value, plan, window, None), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_on_a_gpu(window: int | None) -> None:
    plan = make_plan(SIZES)
    query, key, value = (tensor.to("cuda", torch.bfloat16) for tensor in inputs(plan.tokens, width=64))
    plan = SegmentPlan(plan.segments, "cuda")
    found = segment_attention(query, key, value, plan, scaling=0.3, window=window, impl="varlen")
    wanted = segment_attention(
        query.float(), key.float(), value.float(), plan, scaling=0.3, window=window, impl="reference"
    )
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def test_positions_restart_after_the_shared_part() -> None:
    assert make_plan([(2, 2, 3), (0, 1, 2)]).positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 0, 1]


def test_rejected_attending_to_chosen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(SIZES)
    query, key, value = inputs(plan.tokens)
    wanted = one_by_one(query, key, value, plan, None, None)

    def leaky(*arguments: Any) -> torch.Tensor:
        query, key, value = arguments[:3]
        allowed = torch.ones(plan.tokens, plan.tokens, dtype=torch.bool).tril()
        return module._dense(query, key, value, allowed, 0.3, None)

    monkeypatch.setattr(module, "_segments", leaky)
    found = segment_attention(query, key, value, plan, scaling=0.3, impl="segments")
    assert not torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_pack_changes_nothing_in_a_pair() -> None:
    plan = make_plan(SIZES)
    query, key, value = inputs(plan.tokens)
    together = segment_attention(query, key, value, plan, scaling=0.3, impl="segments")
    for size, segment in zip(SIZES, plan.segments, strict=True):
        rows = slice(segment.start, segment.stop)
        alone = segment_attention(
            query[:, :, rows], key[:, :, rows], value[:, :, rows], make_plan([size]), scaling=0.3, impl="segments"
        )
        torch.testing.assert_close(together[:, :, rows], alone, rtol=1e-6, atol=1e-6)


def test_unknown_implementation() -> None:
    plan = make_plan([(1, 1, 1)])
    with pytest.raises(ValueError, match="fused"):
        segment_attention(*inputs(3), plan, scaling=1.0, impl="fused")
