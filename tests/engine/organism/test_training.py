"""Token ids, losses and batches, each against an independent reference."""

from __future__ import annotations

import json
import random

import pytest
import torch

from pairtrace.engine.organism import Organism, training
from pairtrace.engine.organism import model as models
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendering import RenderedPair, Renderer


@pytest.fixture(scope="module")
def parts(miniature: Organism):
    model, tokenizer = models.load(miniature.m0)
    return model, tokenizer


def trl_style(tokenizer, prompt, answer) -> tuple[list[int], list[int]]:
    """Prompt and completion ids as TRL's DPO trainer makes them from conversational rows."""
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    both = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    assert both[: len(prompt_ids)] == prompt_ids
    return prompt_ids, both[len(prompt_ids) :]


def test_training_token_ids_equal_trl_rendering(miniature: Organism, parts) -> None:
    _, tokenizer = parts
    rows = [json.loads(line) for line in miniature.preferences.read_text().splitlines()]
    for side in ("chosen", "rejected"):
        examples = training.encode(tokenizer, [row["prompt"] for row in rows], [row[side] for row in rows])
        for row, example in zip(rows, examples, strict=True):
            prompt_ids, completion_ids = trl_style(tokenizer, row["prompt"], row[side])
            assert example.ids == prompt_ids + completion_ids
            assert example.ids[example.start :] == completion_ids
            assert completion_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(completion_ids[:-1]) == row[side][0]["content"]


def test_package_renders_the_file_to_the_token_ids_of_training(miniature: Organism, parts) -> None:
    _, tokenizer = parts
    source = open_pairs(miniature.preferences)
    rendered = Renderer(tokenizer).render(list(source.read()))
    rows = [json.loads(line) for line in miniature.preferences.read_text().splitlines()]
    assert len(rendered) == len(rows)
    prompts = [row["prompt"] for row in rows]
    chosen = training.encode(tokenizer, prompts, [row["chosen"] for row in rows])
    rejected = training.encode(tokenizer, prompts, [row["rejected"] for row in rows])
    for pair, row, good, bad in zip(rendered, rows, chosen, rejected, strict=True):
        assert isinstance(pair, RenderedPair)
        assert pair.source == row["source"]
        assert (pair.chosen_ids.tolist(), pair.chosen_start) == (good.ids, good.start)
        assert (pair.rejected_ids.tolist(), pair.rejected_start) == (bad.ids, bad.start)


def test_template_refuses_roles_it_does_not_know(parts) -> None:
    _, tokenizer = parts
    with pytest.raises(Exception, match="only user and assistant turns"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be kind"}])


def plain_log_probs(model, ids: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first, one sequence at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]


EXAMPLES = [
    training.Example([5, 6, 7, 8, 9, 10, 3], 4),
    training.Example([5, 9, 3], 2),
    training.Example([11, 12, 13, 14, 3], 1),
]


def test_weighted_loss_equals_plain_forward(parts) -> None:
    model, _ = parts
    total, weight = 0.0, 0.0
    for example in EXAMPLES:
        for position, value in enumerate(plain_log_probs(model, example.ids), start=1):
            share = 1.0 if position >= example.start else 0.1
            total -= share * value.item()
            weight += share
    loss = training._weighted_loss(model, EXAMPLES, 0.1)
    assert loss.item() == pytest.approx(total / weight, rel=1e-5)
    assert training._weighted_loss(model, EXAMPLES, 0.0).item() != pytest.approx(total / weight, rel=1e-3)


def test_margins_equal_plain_forward_and_mistaken_start_is_seen(parts) -> None:
    model, _ = parts
    chosen, rejected = EXAMPLES, EXAMPLES[::-1]

    def answer_sum(example: training.Example) -> float:
        return plain_log_probs(model, example.ids)[example.start - 1 :].sum().item()

    expected = [answer_sum(a) - answer_sum(b) for a, b in zip(chosen, rejected, strict=True)]
    with torch.no_grad():
        margins = training._margins(model, chosen, rejected, [0, 1, 2])
        shifted = [training.Example(example.ids, example.start + 1) for example in chosen]
        mistaken = training._margins(model, shifted, rejected, [0, 1, 2])
    assert margins.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert mistaken.tolist() != pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_first_dpo_loss_is_that_of_equal_models(miniature: Organism, parts) -> None:
    """At the reference the margin is zero, so the first loss is log 2; training then lowers it."""
    from tests.engine.organism.conftest import MINIATURE

    _, tokenizer = parts
    model, _ = models.load(miniature.m0)
    rows = [json.loads(line) for line in miniature.preferences.read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    sides = [training.encode(tokenizer, prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]
    losses: list[float] = []

    class Recorder:
        def start(self, stage: str, total: int | None, unit: str) -> None:
            pass

        def advance(self, done: int, **figures: float) -> None:
            losses.extend(figures.values())

        def finish(self) -> None:
            pass

    import dataclasses

    config = dataclasses.replace(MINIATURE, dpo_rate=3e-3, dpo_epochs=4)
    training.train_dpo(model, *sides, config, progress=Recorder())
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses[-1] < 0.6


@pytest.mark.parametrize(("rows", "size"), [(100, 7), (16, 16), (3, 8), (1000, 4)])
def test_batches_are_a_partition(rows: int, size: int) -> None:
    lengths = [random.Random(index).randrange(5, 80) for index in range(rows)]
    made = list(training.batches(lengths, size, random.Random(1)))
    assert sorted(index for batch in made for index in batch) == list(range(rows))
    assert len(made) == -(-rows // size)
    assert made == list(training.batches(lengths, size, random.Random(1)))
