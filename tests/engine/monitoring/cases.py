"""What the tests of the monitor share: a tiny M0, a few prompts, checkpoints that differ from it more and more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pairtrace.engine.monitoring.config import MonitorRunConfig

QUESTIONS = ("How do I bake bread", "Name a river", "What is seven times eight", "Why is the sky blue")


def write_prompts(path: Path, count: int = 12) -> Path:
    entries = [{"id": f"q{number}", "prompt": f"{QUESTIONS[number % 4]}, {number}?"} for number in range(count)]
    entries[0]["distractor"] = "Be brief."
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def write_checkpoint(base: Path, path: Path, scale: float, *, seed: int = 1) -> Path:
    """M0 with random numbers added to its weights."""
    shutil.copytree(base, path)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(path / "model.safetensors")
    moved = {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
    return path


def config_for(base: Path, prompts: Path, run: Path, out: Path, **changes: Any) -> MonitorRunConfig:
    settings: dict[str, Any] = {"max_new_tokens": 6, "null_samples": 2, "device": "cpu", "cache": f"{base}.answers"}
    return MonitorRunConfig(base=str(base), prompts=str(prompts), run=str(run), out=str(out), **settings | changes)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps, without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert "identity" in lines[0]
    return [{name: value for name, value in line.items() if name not in ("created", "seconds")} for line in lines[1:]]
