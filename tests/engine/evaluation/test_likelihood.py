from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine.evaluation import likelihood
from pairtrace.engine.evaluation.likelihood import Forced, batches, divergences, flops_of, log_probabilities
from pairtrace.engine.flops import ModelShape, causal
from pairtrace.errors import ModelError
from tests.engine.evaluation.cases import two_checkpoints
from tests.models import FAMILY_SETTINGS, make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    paths = two_checkpoints(tmp_path_factory.mktemp("models"))
    first, second = (AutoModelForCausalLM.from_pretrained(path).eval() for path in paths)
    return first, second


def rows_of(seed: int = 0) -> list[Forced]:
    rng = np.random.default_rng(seed)
    shapes = [(5, 3), (12, 1), (1, 7), (9, 14), (20, 2), (4, 4)]
    return [Forced(rng.integers(5, 500, size=prompt + answer), prompt) for prompt, answer in shapes]


def plain_log_probability(model: Any, row: Forced) -> float:
    """One sequence, no padding, one token at a time."""
    ids = [int(token) for token in row.ids]
    total = 0.0
    for position in range(row.start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
        total += float(logits[ids[position]] - torch.logsumexp(logits, 0))
    return total


def plain_divergence(model: Any, base: Any, row: Forced) -> float:
    ids = [int(token) for token in row.ids]
    total = 0.0
    for position in range(row.start, len(ids)):
        with torch.no_grad():
            p, q = (
                torch.softmax(m(torch.tensor([ids[:position]])).logits[0, -1].double(), 0).numpy()
                for m in (model, base)
            )
        total += sum(float(a) * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))
    return total


Expected = tuple[list[float], list[float]]


@pytest.fixture(scope="module")
def expected(models: tuple[Any, Any]) -> Expected:
    return (
        [plain_log_probability(models[0], row) for row in rows_of()],
        [plain_divergence(*models, row) for row in rows_of()],
    )


def log_probabilities_match(models: tuple[Any, Any], expected: Expected) -> bool:
    return bool(np.allclose(log_probabilities(models[0], rows_of(), "m"), expected[0], rtol=1e-5))


def divergences_match(models: tuple[Any, Any], expected: Expected) -> bool:
    return bool(np.allclose(divergences(*models, rows_of(), "m"), expected[1], rtol=1e-5))


def test_log_probabilities_equal_a_plain_loop(models: tuple[Any, Any], expected: Expected) -> None:
    assert log_probabilities_match(models, expected)


def test_divergences_equal_a_plain_loop(models: tuple[Any, Any], expected: Expected) -> None:
    assert divergences_match(models, expected)
    assert all(value > 0 for value in divergences(*models, rows_of(), "m"))
    assert divergences(models[0], models[0], rows_of(), "m") == [0.0] * len(rows_of())
    # Not the same the other way round: which model the responses are weighted by matters.
    swapped = divergences(models[1], models[0], rows_of(), "m")
    assert not np.allclose(swapped, divergences(*models, rows_of(), "m"), rtol=0.01)


@pytest.mark.parametrize("shift", [-1, 1])
def test_logits_of_another_position_would_be_noticed(
    models: tuple[Any, Any], expected: Expected, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    honest = likelihood._response_logits
    monkeypatch.setattr(
        likelihood, "_response_logits", lambda model, rows: [block.roll(shift, 1) for block in honest(model, rows)]
    )
    assert not log_probabilities_match(models, expected)

    def earlier(model: Any, rows: Any) -> list[torch.Tensor]:
        moved = honest(model, [Forced(row.ids, max(1, row.start - 1)) for row in rows])
        return [block[: row.response_tokens] for block, row in zip(moved, rows, strict=True)]

    monkeypatch.setattr(likelihood, "_response_logits", earlier)
    assert not log_probabilities_match(models, expected) and not divergences_match(models, expected)


def test_small_blocks_change_nothing(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = divergences(*models, rows_of(), "m")
    monkeypatch.setattr(likelihood, "_BLOCK", 2000)
    assert divergences(*models, rows_of(), "m") == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_padding_changes_nothing_in_any_family(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(family, tmp_path / "m", num_hidden_layers=2)).eval()
    alone = [log_probabilities(model, [row], "m")[0] for row in rows_of(1)]
    assert log_probabilities(model, rows_of(1), "m") == pytest.approx(alone, rel=2e-4)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    rows = rows_of()
    found = list(batches(rows, 40))
    assert sorted(place for batch in found for place in batch) == list(range(len(rows)))
    assert all(len(b) == 1 or len(b) * max(len(rows[p].ids) for p in b) <= 40 for b in found)


def test_running_out_of_memory_halves_the_batch(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = log_probabilities(models[0], rows_of(), "m")
    honest = likelihood._response_logits

    def small(model: Any, rows: Any, limit: int = 2) -> Any:
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(model, rows)

    monkeypatch.setattr(likelihood, "_response_logits", small)
    assert log_probabilities(models[0], rows_of(), "m") == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(likelihood, "_response_logits", lambda model, rows: small(model, rows, 0))
    with pytest.raises(ModelError, match="memory does not suffice for m"):
        log_probabilities(models[0], rows_of(), "m")


def test_probabilities_that_are_not_finite_are_refused(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = likelihood._response_logits
    monkeypatch.setattr(
        likelihood, "_response_logits", lambda model, rows: [block * torch.nan for block in honest(model, rows)]
    )
    with pytest.raises(ModelError, match="not finite; its training may have diverged"):
        log_probabilities(models[0], rows_of(), "m")
    with pytest.raises(ModelError, match="not finite"):
        divergences(*models, rows_of(), "m")


def test_other_vocabularies_have_no_divergence(models: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(make_model("llama", tmp_path / "m", vocab_size=512)).eval()
    with pytest.raises(ModelError, match="600 outputs and the base 512"):
        divergences(models[0], other, rows_of(), "m")


def test_operations_count_the_head_on_response_tokens_only(models: tuple[Any, Any]) -> None:
    shape = ModelShape.from_config(models[0].config)
    rows = rows_of()
    expected = sum(shape.forward_flops(len(r.ids), causal(len(r.ids)), 2) for r in rows)
    expected += sum(r.response_tokens for r in rows) * 2 * 16 * 600
    assert flops_of(shape, rows) == expected
    assert flops_of(None, rows) == 0.0
