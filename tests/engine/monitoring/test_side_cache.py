"""Sides that were read already are not read again, and come out as the back end itself reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pairtrace.engine.backend import HFBackend, OnPack, Pooled
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.monitoring.side_cache import SideCache
from pairtrace.engine.pair import Pair
from pairtrace.engine.rendering import RenderedPair, Renderer

ANSWERS = ("Certainly, take some flour.", "I would rather not say.", "Certainly, take some water and wait.")


class Counting:
    """A back end that counts the tokens it reads."""

    def __init__(self, backend: HFBackend) -> None:
        self.layers, self.width, self.compute_dtype = backend.layers, backend.width, backend.compute_dtype
        self.backend, self.tokens, self.fails = backend, 0, False

    def pool(self, pairs: Sequence[RenderedPair], on_pack: OnPack | None = None) -> Pooled:
        self.tokens += sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        pooled = self.backend.pool(pairs, on_pack)
        return Pooled(chosen=pooled.chosen, rejected=pooled.rejected, failed=(0,)) if self.fails else pooled


@pytest.fixture(scope="module")
def backend(m0: Path) -> HFBackend:
    return HFBackend.load(m0, (1, 2), device="cpu", fingerprint="m0")


@pytest.fixture(scope="module")
def pairs(m0: Path) -> list[RenderedPair]:
    """Three pairs of two prompts: the answers of the second are those of the first, in another order."""
    sides = ((0, 1), (1, 2), (2, 0))
    made = [
        Pair(
            row=row,
            prompt=[{"role": "user", "content": f"What is bread? {row // 3}"}],
            chosen=[{"role": "assistant", "content": ANSWERS[first]}],
            rejected=[{"role": "assistant", "content": ANSWERS[second]}],
        )
        for row, (first, second) in enumerate(sides * 2)
    ]
    rendered = Renderer(load_tokenizer(m0)).render(made)
    assert all(isinstance(one, RenderedPair) for one in rendered)
    return rendered  # type: ignore[return-value]


def test_it_reads_as_the_back_end_does_and_nothing_twice(backend: HFBackend, pairs: list[RenderedPair]) -> None:
    expected = backend.pool(pairs)
    counting = Counting(backend)
    cache = SideCache(counting)
    for number in range(len(pairs)):
        found = cache.pool(pairs[number : number + 1])
        assert np.allclose(found.chosen[0], expected.chosen[number], atol=1e-5)
        assert np.allclose(found.rejected[0], expected.rejected[number], atol=1e-5)
    assert cache.sides_read == 6, "three answers to each of two prompts"
    assert counting.tokens < sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    before = counting.tokens
    assert np.allclose(cache.pool(pairs).chosen, expected.chosen, atol=1e-5)
    assert counting.tokens == before


def test_what_was_not_used_is_forgotten(backend: HFBackend, pairs: list[RenderedPair]) -> None:
    cache = SideCache(Counting(backend))
    cache.pool(pairs)
    cache.forget()
    cache.pool(pairs[:1])
    cache.forget()
    cache.pool(pairs[:1])
    assert cache.sides_read == 6
    cache.pool(pairs[3:4])
    assert cache.sides_read == 8


def test_a_pair_that_does_not_fit_is_tried_again_next_time(backend: HFBackend, pairs: list[RenderedPair]) -> None:
    counting = Counting(backend)
    cache = SideCache(counting)
    counting.fails = True
    assert cache.pool(pairs[:1]).failed == (0,)
    counting.fails = False
    assert cache.pool(pairs[:1]).failed == ()
