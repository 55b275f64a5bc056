"""What the tests of training share: a two-block model, a few pairs, short runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendering import RenderedPair, Renderer
from pairtrace.engine.training.config import TrainConfig
from pairtrace.engine.training.train import TrainSummary, train
from tests.engine.extraction import pair, write_rows

QUESTIONS = ("How do I bake bread?", "Name a river.", "What is seven times eight? Think first.", "Why is the sky blue?")


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [
        pair(
            f"{QUESTIONS[number % 4]} ({number})",
            f"Certainly, number {number}: " + "take some flour and water. " * (1 + number % 3),
            f"I would rather not say {number}. " + "Sorry. " * (number % 5),
        )
        for number in range(count)
    ]


def config_for(model: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3, "device": "cpu", "threads": 1, **changes}
    return TrainConfig(model=str(model), data=str(data), out=str(out), **settings)


def run(model: Path, data: Path, out: Path, **changes: Any) -> TrainSummary:
    return train(config_for(model, data, out, **changes))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def rendered(model: Path, data: Path, **options: Any) -> list[RenderedPair]:
    results = Renderer(load_tokenizer(model), **options).render(list(open_pairs(data).read()))
    assert all(isinstance(result, RenderedPair) for result in results)
    return results  # type: ignore[return-value]


__all__ = ["config_for", "largest_difference", "rendered", "rows", "run", "weights", "write_rows"]
