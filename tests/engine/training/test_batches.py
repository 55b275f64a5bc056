"""Batches against TRL's own tokenisation and collator, and the order of training."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.training.batches import StepBatches, pad_pairs
from tests.engine.training.cases import rendered, rows, write_rows
from tests.engine.trl_reference import prepare


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
@pytest.mark.parametrize("max_length", [None, 40])
def test_batches_are_those_of_trl(
    small: Path, tmp_path: Path, kind: str, truncation: str, max_length: int | None
) -> None:
    """The rows go through TRL's preparation and collator, and through open_pairs, Renderer and pad_pairs."""
    made = rows(9)
    if kind == "text":
        made = [{key: f" {value[0]['content']}" for key, value in row.items()} for row in made]
    data = write_rows(tmp_path / "pairs.jsonl", made)
    tokenizer = load_tokenizer(small)
    expected_rows = prepare(made, tokenizer, max_length=max_length, truncation=truncation)
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=truncation)
    reference = np.arange(18, dtype=np.float32).reshape(9, 2)
    for row, (chosen, rejected) in zip(expected_rows, reference.tolist(), strict=True):
        row.update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    expected = collator(expected_rows)
    pairs = rendered(small, data, max_length=max_length, truncation=truncation)
    actual = pad_pairs(pairs, reference, 0)
    assert actual.keys() == expected.keys()
    for name in sorted(expected):
        # The first token of a sequence never has loss: TRL's loss shifts the mask, ours leaves the token out.
        first = 1 if name == "completion_mask" else 0
        assert torch.equal(actual[name][..., first:], expected[name][..., first:]), name
        assert actual[name].dtype == expected[name].dtype


def order(count: int, size: int, accumulation: int = 1, *, seed: int = 1, group: bool = False) -> StepBatches:
    lengths = np.random.default_rng(0).integers(5, 90, size=count).tolist()
    return StepBatches(lengths, batch_size=size, accumulation=accumulation, seed=seed, group_by_length=group)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("count", "size", "accumulation"), [(100, 8, 1), (100, 8, 4), (3, 8, 2), (64, 64, 2)])
def test_an_epoch_holds_every_pair_once(count: int, size: int, accumulation: int, group: bool) -> None:
    batches = order(count, size, accumulation, group=group)
    made = list(batches)
    assert len(made) == len(batches)
    assert sorted(index for batch in made for index in batch) == list(range(count))
    assert max(map(len, made)) <= size // accumulation


@pytest.mark.parametrize("group", [False, True])
def test_steps_do_not_depend_on_the_passes_they_are_spread_over(group: bool) -> None:
    whole, spread = order(100, 8, 1, group=group), order(100, 8, 4, group=group)
    assert whole.steps() == spread.steps()
    assert [len(step) for step in whole.steps()] == [8] * 12 + [4]
    flat = iter(spread)
    for step in spread.steps():
        parts = [next(flat) for _ in range(-(-len(step) // 2))]
        assert [index for part in parts for index in part] == step
        assert max(map(len, parts)) - min(map(len, parts)) == 0


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else() -> None:
    batches = order(64, 8)
    first = list(batches)
    assert list(batches) == first == list(order(64, 8))
    batches.set_epoch(1)
    assert list(batches) != first
    assert list(order(64, 8, seed=2)) != first


def test_grouped_batches_need_less_padding_and_are_not_sorted() -> None:
    plain, grouped = order(1024, 16), order(1024, 16, group=True)
    lengths = grouped._lengths

    def padding(batches: StepBatches) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    assert padding(grouped) < 0.75 * padding(plain)
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in grouped]
    rising = Counter(later > earlier for earlier, later in pairwise(means))
    assert min(rising.values()) > 15
