"""Per-pair gradients against a plain implementation that shares no code with them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from pairtrace.engine.baselines.gradient_compute import PairGradients
from pairtrace.engine.baselines.gradient_loss import PairBatch, batches
from pairtrace.engine.baselines.gradient_model import LoraModel
from pairtrace.engine.baselines.gradient_rows import (
    DpoSettings,
    Parts,
    adam_directions,
    batched_gradients,
    published_gradients,
    reference_log_probabilities,
)
from pairtrace.engine.cost import CostMeter
from tests.engine.baselines.plain_dpo import PlainModel, some_pairs
from tests.models import make_model

RANK, ALPHA, BETA = 3, 12.0, 0.7
PAIRS = some_pairs(5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("m0"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def lora(checkpoint: Path) -> LoraModel:
    """With an adapter that changes the model: a fresh one would have no gradient in its first factor."""
    model = LoraModel.load(checkpoint, rank=RANK, alpha=ALPHA, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(3)
    model.set_adapter({name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in model.parameters.items()})
    return model


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> PlainModel:
    return PlainModel(checkpoint, rank=RANK, alpha=ALPHA)


def together(parts: Parts) -> np.ndarray:
    return torch.cat([values.detach() for _, values in parts], dim=1).numpy()


def batched(lora: LoraModel, settings: DpoSettings) -> np.ndarray:
    batch = PairBatch.of(PAIRS, lora.device)
    return together(batched_gradients(lora, batch, reference_log_probabilities(lora, batch, settings), settings))


def published(lora: LoraModel, settings: DpoSettings) -> np.ndarray:
    rows = [together(published_gradients(lora, PairBatch.of([pair], lora.device), settings)) for pair in PAIRS]
    return np.concatenate(rows)


def differs(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance of a row from its reference, as a share of the reference's length."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.fixture(scope="module")
def expected(lora: LoraModel, plain: PlainModel) -> dict[bool, np.ndarray]:
    factors = lora.adapter()
    return {
        normalized: np.stack([plain.gradient(pair, factors, BETA, normalized) for pair in PAIRS])
        for normalized in (False, True)
    }


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("procedure", [batched, published])
def test_gradients_are_those_of_the_plain_loss(procedure, normalized, lora, expected) -> None:
    found = procedure(lora, DpoSettings(beta=BETA, length_normalized=normalized))
    assert found.shape == (len(PAIRS), lora.size)
    assert differs(found, expected[normalized]) < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "mixtral", "phi3"])
def test_both_procedures_agree_for_families_with_other_layers(family: str, tmp_path: Path) -> None:
    """Soft-capped logits, one matrix for query, key and value, fused experts, gate and up in one matrix."""
    model = LoraModel.load(make_model(family, tmp_path, num_hidden_layers=2), rank=2, alpha=4.0, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(0)
    model.set_adapter({name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in model.parameters.items()})
    settings = DpoSettings(beta=BETA, length_normalized=False)
    assert differs(batched(model, settings), published(model, settings)) < 1e-4


def test_the_plain_loss_catches_a_reference_that_is_the_policy(monkeypatch, lora, expected) -> None:
    monkeypatch.setattr(LoraModel, "reference", lambda self: nullcontext())
    settings = DpoSettings(beta=BETA, length_normalized=False)
    assert differs(batched(lora, settings), expected[False]) > 1e-2


def test_the_plain_loss_catches_a_response_token_without_loss(monkeypatch, lora, expected) -> None:
    right = PairBatch.of

    def one_too_few(pairs, device) -> PairBatch:
        batch = right(pairs, device)
        wanted = batch.wanted.clone()
        wanted[:, :-1] &= batch.wanted[:, 1:]
        return PairBatch(batch.pairs, batch.ids, wanted)

    monkeypatch.setattr(PairBatch, "of", one_too_few)
    settings = DpoSettings(beta=BETA, length_normalized=False)
    assert differs(batched(lora, settings), expected[False]) > 1e-2


def test_the_reference_is_the_model_without_its_adapter(lora: LoraModel, plain: PlainModel) -> None:
    settings = DpoSettings(beta=BETA, length_normalized=False)
    found = reference_log_probabilities(lora, PairBatch.of(PAIRS, lora.device), settings)
    for pair, values in zip(PAIRS, found.tolist(), strict=True):
        sides = ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
        without = [plain.log_probability(*side, None, False).item() for side in sides]
        with_adapter = [plain.log_probability(*side, lora.adapter(), False).item() for side in sides]
        assert values == pytest.approx(without, rel=1e-5)
        assert values != pytest.approx(with_adapter, rel=1e-3)


def test_adam_directions_follow_the_formula_of_less() -> None:
    rng = np.random.default_rng(0)
    gradients, first = rng.normal(size=(3, 50)), rng.normal(size=50) / 5
    second = rng.random(50) ** 4
    expected = (0.9 * first + 0.1 * gradients) / np.sqrt(0.999 * second + 0.001 * gradients**2 + 1e-8)
    found = adam_directions(*(torch.tensor(values, dtype=torch.float32) for values in (gradients, first, second)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5)


def test_batches_keep_to_the_budget_and_hold_every_pair_once() -> None:
    pairs = some_pairs(30, seed=1)
    found = list(batches(pairs, 100))
    assert sorted(member for batch in found for member in batch) == list(range(30))
    assert len(found) < 30
    for members in found:
        longest = max(max(len(pairs[m].chosen_ids), len(pairs[m].rejected_ids)) for m in members)
        assert len(members) == 1 or 2 * longest * len(members) <= 100
    assert len(list(batches(pairs, 1))) == 30


def test_a_batch_that_does_not_fit_is_halved_and_a_single_pair_given_up(lora: LoraModel) -> None:
    meter = CostMeter(method="gradient", stage="gradients", device="cpu")
    settings = DpoSettings(beta=BETA, length_normalized=False)
    tried: list[int] = []

    def reduce(parts: Parts) -> torch.Tensor:
        values = together(parts)
        tried.append(len(values))
        if len(values) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        if len(tried) == 4:
            raise torch.OutOfMemoryError
        return torch.from_numpy(values)

    with meter:
        computer = PairGradients(lora, settings, published=False, token_budget=10_000, meter=meter)
        found = list(computer.reduced(PAIRS, computer.references(PAIRS), reduce))
    assert sorted(member for members, _ in found for member in members) == list(range(5))
    assert [members for members, value in found if value is None] != []
    assert all(len(members) == 1 for members, value in found if value is None)
    whole = batched(lora, settings)
    for members, value in found:
        if value is not None:
            np.testing.assert_allclose(value.numpy(), whole[members], rtol=1e-3, atol=1e-5 * np.abs(whole).max())


def test_other_errors_are_not_taken_for_exhausted_memory(lora: LoraModel) -> None:
    def reduce(parts: Parts) -> torch.Tensor:
        raise RuntimeError("a bug")

    settings = DpoSettings(beta=BETA, length_normalized=False)
    meter = CostMeter(method="gradient", stage="gradients", device="cpu")
    with meter, pytest.raises(RuntimeError, match="a bug"):
        computer = PairGradients(lora, settings, published=False, token_budget=None, meter=meter)
        list(computer.reduced(PAIRS, computer.references(PAIRS), reduce))


def test_loading_gives_no_warning_of_other_libraries(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    LoraModel.load(make_model("llama", tmp_path, num_hidden_layers=2), rank=2, alpha=4.0, seed=0, device="cpu")
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []
