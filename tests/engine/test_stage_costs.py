"""What extraction, behaviour and scoring say about their own cost, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.backend import HFBackend, Pooled
from pairtrace.engine.behavior import BehaviorConfig, build_behavior
from pairtrace.engine.checkpoint import load_config
from pairtrace.engine.cost import CostMeter, CostRecord, costs_path, read_costs
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.flops import ModelShape, causal, extraction_flops
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.errors import StoreMismatchError
from pairtrace.store.reader import ActivationStore
from tests.engine.behavior_cases import two_models, write_rollouts
from tests.engine.extraction import pair, write_rows

# The responses of a pair share no beginning, so that a pack holds its prompt once and both responses.
ROWS = [pair(f"Question {row}?", "Yes, of course. " * (row + 1), f"No: {row}.") for row in range(6)]
# Twice the same pair: it is computed once.
DATA = [*ROWS, ROWS[0]]
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return two_models(tmp_path_factory.mktemp("models"))


def extraction(model: str, tmp_path: Path, **changes: Any) -> ExtractConfig:
    data = str(write_rows(tmp_path / "pairs.jsonl", DATA))
    usual = {"store": str(tmp_path / "acts.zarr"), "layers": LAYERS, "shard_rows": 2, "device": "cpu", "fsync": False}
    return ExtractConfig(**{"data": data, "model": model, **usual, **changes})


def costs(product: str | Path) -> list[CostRecord]:
    return read_costs(costs_path(product))


def test_an_extraction_counts_its_tokens_and_operations(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = extraction(models[0], tmp_path)
    summary = extract(config)
    (cost,) = costs(config.store)
    assert (cost.method, cost.stage, cost.device) == ("activation", "extract", "cpu")
    shape = ModelShape.from_config(load_config(models[0]))
    counts = ActivationStore.open(config.store).tokens()[:6].astype(float)
    assert cost.model_tokens == summary.tokens == counts.sum()
    assert cost.flops == pytest.approx(sum(extraction_flops(shape, 3, *row) for row in counts.tolist()))
    # An interrupted extraction and its rest cost as much; what fails before any work leaves the records as they are.
    again = extraction(models[0], tmp_path, store=str(tmp_path / "again.zarr"))
    original = HFBackend.pool
    calls = iter(range(9))

    def interrupted(self: HFBackend, *args: Any) -> Pooled:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(HFBackend, "pool", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(again)
    monkeypatch.setattr(HFBackend, "pool", original)
    extract(again)
    parts = costs(again.store)
    assert [part.model_tokens > 0 for part in parts] == [True, True]
    assert sum(part.model_tokens for part in parts) == cost.model_tokens
    assert sum(part.flops for part in parts) == pytest.approx(cost.flops)
    with pytest.raises(StoreMismatchError):
        extract(extraction(models[0], tmp_path, store=again.store, max_length=99))
    assert costs(again.store) == parts


def test_sampling_counts_prompts_and_responses(models: tuple[str, str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    entries = [{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": "How do I clean a car in winter?"}]
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    out = str(tmp_path / "r.parquet")
    config = RolloutConfig(
        prompts=str(prompts), base=models[0], tuned=models[1], out=out, samples=2, max_new_tokens=5, device="cpu"
    )
    with CostMeter(method="m", stage="s", device="cpu") as meter:
        table = sample_rollouts(config, meter=meter)
        read_again = meter.record.model_tokens
        sample_rollouts(config, meter=meter)
    assert meter.record.model_tokens == read_again, "finished rollouts cost nothing"
    encoder, shape = PromptEncoder.load(models[0]), ModelShape.from_config(load_config(models[0]))
    tokens, flops = 0, 0.0
    for row in table.table.to_pylist():
        prompt = len(encoder.encode("x", json.loads(row["messages"]), 5))
        total = prompt + row["tokens"]
        tokens += total
        flops += shape.forward_flops(total, causal(total), shape.blocks) + shape.head_flops_per_token * row["tokens"]
    assert (meter.record.model_tokens, meter.record.flops) == (tokens, pytest.approx(flops))


def test_behaviour_and_scores_have_records_beside_them(models: tuple[str, str], tmp_path: Path) -> None:
    config = extraction(models[0], tmp_path)
    extract(config)
    direction, scores = str(tmp_path / "b.safetensors"), str(tmp_path / "scores.parquet")
    rollouts = write_rollouts(tmp_path / "mine.jsonl")
    for _ in range(2):
        build_behavior(
            BehaviorConfig(
                out=direction,
                base=models[0],
                rollouts=rollouts,
                label_column="harmful",
                store=config.store,
                device="cpu",
                kinds="mean",
            )
        )
        score(ScoreConfig(store=config.store, directions=(direction,), out=scores))
    (read,), (scored,) = costs(direction), costs(scores)
    assert (read.method, read.stage, read.model_tokens > 0, read.flops > 0) == ("activation", "behavior", True, True)
    assert (scored.method, scored.stage) == ("activation", "score")
    assert scored.flops == 2 * len(DATA) * 32 * (1 + 1)
