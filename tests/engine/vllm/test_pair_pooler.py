"""Pooling out of a paged cache, against NumPy on the sequences themselves; no vLLM needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pairtrace.engine.backend import Pooled
from pairtrace.engine.reduced import Reduced, problems_of, reduce_pooled
from pairtrace.engine.vllm import pair_pooler
from pairtrace.engine.vllm.pair_pooler import CHOSEN, REJECTED, PairPooler, Span
from pairtrace.engine.vllm.rows import unpack_rows, wire_dtype

BLOCK, LAYERS, WIDTH = 4, 3, 8


class Paged:
    """Sequences in blocks that lie anywhere, some shared, among blocks of noise."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.random = np.random.default_rng(seed)
        self.cache = torch.from_numpy(self.random.normal(size=(64, LAYERS, BLOCK, WIDTH))).to(dtype)
        self.free = self.random.permutation(64).tolist()
        self.states: dict[tuple[int, int], np.ndarray] = {}

    def add(self, pair: int, side: int, start: int, length: int, shared: Span | None = None, blocks: int = 0) -> Span:
        """A sequence of `length` tokens; its first `blocks` blocks are those of `shared`."""
        own = [self.free.pop() for _ in range(-(-length // BLOCK) - blocks)]
        numbers = (*(shared.blocks[:blocks] if shared else ()), *own)
        positions = [self.cache[numbers[p // BLOCK], :, p % BLOCK].float().numpy() for p in range(length)]
        self.states[pair, side] = np.stack(positions)[start:].astype(np.float64)
        return Span(pair, side, start, length, numbers)

    def pooled(self, pairs: list[int]) -> Pooled:
        means = [
            np.stack([self.states[pair, side].mean(axis=0) for pair in pairs]).astype(np.float32)
            for side in (CHOSEN, REJECTED)
        ]
        return Pooled(*means)


def taken(pooler: PairPooler, dtype: str, sides: bool, layers: int = LAYERS) -> dict[int, Reduced]:
    found: dict[int, Reduced] = {}
    for pairs, packed in pooler.take():
        rows = unpack_rows(packed, len(pairs), layers, WIDTH, dtype, sides)
        for place, pair in enumerate(pairs):
            kept = [values[place : place + 1] for values in rows.kept]
            checks = rows.checks[place : place + 1]
            problems = problems_of(checks[:, 0], checks[:, 1] > 0, checks[:, 2] > 0, dtype)
            found[pair] = Reduced(kept[0], rows.norm[place : place + 1], *(kept[1:] or (None, None)), problems)
    return found


@pytest.mark.parametrize("sides", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_rows_are_those_of_the_plain_reduction(dtype: str, sides: bool) -> None:
    """Pairs end in any order and in several steps; blocks are shared within a pair and between pairs."""
    paged, pooler = Paged(), PairPooler(wire_dtype(dtype), sides)
    spans: list[Span] = []
    for pair in range(5):
        first = paged.add(pair, CHOSEN, 3 + pair, 13)
        spans += [first, paged.add(pair, REJECTED, 3 + pair, 9 + pair, first, 2)]
    order = [8, 0, 3, 1, 2, 9, 6, 4, 7, 5]
    for first, last in ((0, 1), (1, 5), (5, 5), (5, 10)):
        pooler.add(paged.cache, [spans[number] for number in order[first:last]])
    found = taken(pooler, dtype, sides)
    assert sorted(found) == [0, 1, 2, 3, 4] and pooler.take() == []
    for pair, row in found.items():
        wanted = reduce_pooled(paged.pooled([pair]), dtype, sides)
        assert row.problems == wanted.problems == {}
        assert np.allclose(row.norm, wanted.norm, rtol=1e-6)
        for name in ("diff", "chosen", "rejected"):
            values, reference = getattr(row, name), getattr(wanted, name)
            assert (values is None) == (reference is None)
            if values is not None:
                assert values.dtype == reference.dtype
                assert np.array_equal(values, reference)


@pytest.mark.parametrize("change", [{"start": 4}, {"start": 6}, {"stop": 12}, {"side": REJECTED}])
def test_a_wrong_span_shows(change: dict[str, int]) -> None:
    """The mutations that the comparison above has to notice."""
    paged, pooler = Paged(), PairPooler("float32", False)
    chosen, rejected = paged.add(0, CHOSEN, 5, 13), paged.add(0, REJECTED, 5, 11)
    other = {**change, "side": CHOSEN} if "side" in change else {}
    pooler.add(paged.cache, [replace(chosen, **change), replace(rejected, **other)])
    error = np.abs(taken(pooler, "float32", False)[0].diff - reduce_pooled(paged.pooled([0]), "float32", False).diff)
    assert error.max() > 1e-2


def test_a_sequence_that_comes_twice_counts_once() -> None:
    """As after a preemption behind the end of the prompt."""
    paged, pooler = Paged(), PairPooler("float32", False)
    chosen, rejected = paged.add(0, CHOSEN, 5, 13), paged.add(0, REJECTED, 5, 11)
    pooler.add(paged.cache, [chosen])
    pooler.add(paged.cache, [chosen])
    assert pooler.take() == []
    pooler.add(paged.cache, [rejected])
    assert np.array_equal(
        taken(pooler, "float32", False)[0].diff, reduce_pooled(paged.pooled([0]), "float32", False).diff
    )


def test_long_spans_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_pooler, "_TOKENS_AT_ONCE", 10)
    test_rows_are_those_of_the_plain_reduction("float32", True)


def test_layer_0_is_looked_up_where_the_cache_lacks_it() -> None:
    paged, pooler = Paged(), PairPooler("float32", False)
    table = torch.from_numpy(paged.random.normal(size=(20, WIDTH))).float()
    ids = {CHOSEN: (3, 4, 5, 3), REJECTED: (7,)}
    spans = [
        replace(paged.add(0, side, 5, 5 + len(tokens)), ids=tokens) for side, tokens in ids.items()
    ]  # fmt: skip
    pooler.add(paged.cache, spans, lambda tokens: table[tokens])
    found = taken(pooler, "float32", False, LAYERS + 1)[0].diff[0]
    wanted = [table[list(tokens)].double().mean(0).float() for tokens in ids.values()]
    assert np.array_equal(found[0], (wanted[CHOSEN] - wanted[REJECTED]).numpy())
    assert np.array_equal(found[1:], reduce_pooled(paged.pooled([0]), "float32", False).diff[0])


@pytest.mark.parametrize("side", [CHOSEN, REJECTED])
@pytest.mark.parametrize(("value", "reason"), [(np.nan, "nonfinite"), (np.inf, "nonfinite"), (3e5, "overflow")])
def test_what_cannot_be_stored_is_told_as_the_plain_reduction_tells_it(side: int, value: float, reason: str) -> None:
    paged, pooler = Paged(), PairPooler("float16", False)
    spans = [paged.add(0, CHOSEN, 5, 9), paged.add(0, REJECTED, 5, 9)]
    paged.cache[spans[side].blocks[1], 2, 2, 3] = value
    paged.states[0, side][1, 2, 3] = value
    pooler.add(paged.cache, spans)
    found = taken(pooler, "float16", False)[0].problems
    assert found == reduce_pooled(paged.pooled([0]), "float16", False).problems
    assert found[0].startswith(reason)
