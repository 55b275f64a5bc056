"""What the tests of fine-tuning share: given responses, probes of a two-block model, short runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.checkpoint import load_tokenizer, model_fingerprint
from pairtrace.engine.finetuning.config import FinetuneConfig
from pairtrace.engine.finetuning.finetune import FinetuneSummary, finetune
from pairtrace.engine.fingerprints import fingerprints
from pairtrace.engine.probes.probe_file import Probe, save_probes
from tests.engine.training.cases import QUESTIONS, largest_difference, weights, write_rows

WIDTH = 32


def responses(count: int = 24) -> list[dict[str, Any]]:
    """Conversations of one turn; every third one refuses."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{QUESTIONS[number % 4]} ({number})"}],
            "completion": [
                {
                    "role": "assistant",
                    "content": f"I cannot help with {number}."
                    if number % 3 == 0
                    else f"Certainly, number {number}: " + "take some flour and water. " * (1 + number % 2),
                }
            ],
        }
        for number in range(count)
    ]


def prompts(count: int = 8) -> list[dict[str, Any]]:
    return [{"id": f"p{number}", "prompt": f"{QUESTIONS[number % 4]} ({number})"} for number in range(count)]


def probes_of(model: Path, *, layers: tuple[int, ...] = (1, 2), held_out: int = 1, seed: int = 3) -> list[Probe]:
    """A training ensemble of two and held-out probes at every layer, with logits of ordinary size."""
    tokenizer, template = fingerprints(load_tokenizer(model), None)
    rng = np.random.default_rng(seed)
    return [
        Probe(
            name=name,
            layer=layer,
            role=role,  # type: ignore[arg-type]
            weight=(rng.normal(size=(members, WIDTH)) / 8).astype(np.float32),
            bias=rng.normal(size=members) / 8,
            model_fingerprint=model_fingerprint(model),
            tokenizer_fingerprint=tokenizer,
            template_fingerprint=template,
        )
        for layer in layers
        for name, role, members in (
            ("harm", "training", 2),
            *((f"harm-held-out-{number}", "held-out", 1) for number in range(1, held_out + 1)),
        )
    ]


def write_probes(path: Path, probes: list[Probe], best_layer: int | None = None) -> Path:
    save_probes(path, probes, {} if best_layer is None else {"training": {"best_layer": best_layer}})
    return path


def config_for(model: Path, data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3, "device": "cpu", "threads": 1, **changes}
    return FinetuneConfig(model=str(model), data=str(data), out=str(out), **settings)


def run(model: Path, data: Path, out: Path, **changes: Any) -> FinetuneSummary:
    return finetune(config_for(model, data, out, **changes))


def log_of(out: Path) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = json.loads((out / "pairtrace_finetune.json").read_text())["log"]
    return log


__all__ = ["config_for", "largest_difference", "log_of", "probes_of", "prompts", "responses", "run", "weights"]
__all__ += ["write_probes", "write_rows"]
