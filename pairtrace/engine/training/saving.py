"""Writing the trained checkpoint: M0 with other weights, and nothing else changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pairtrace.errors import TrainingError

# Tokenizer, chat template and the like are M0's, byte for byte.
_DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja")
_WRITTEN_WITH_THE_WEIGHTS = frozenset(("config.json", "generation_config.json", "model.safetensors.index.json"))


def save_checkpoint(
    model: Any, directory: Path, *, base: Path, configs: tuple[Any, Any], dtype: torch.dtype, merge: bool
) -> None:
    """Write a model, or an adapter and the model with it merged in.

    Args:
        model: the trained transformers or peft model; an adapter is merged into it.
        directory: where to; it exists.
        base: directory of M0, whose tokenizer is copied.
        configs: M0's configuration and generation configuration, which training may have changed in the model.
        dtype: of the written weights.
        merge: write the merged model, and the adapter into `adapter/`; else the adapter alone.

    Raises:
        TrainingError: a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(f"the weight {name} is not finite at the end of training; earlier checkpoints are kept")
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(directory / "adapter" if merge else directory)
        if not merge:
            return
        model = model.merge_and_unload()
    model.config, model.generation_config = configs
    model.to(dtype)
    model.config.dtype = dtype
    # TRL replaced it by a version for training.
    model.__dict__.pop("forward", None)
    model.save_pretrained(directory)
    for pattern in _DESCRIPTIONS:
        for file in base.glob(pattern):
            if file.name not in _WRITTEN_WITH_THE_WEIGHTS:
                shutil.copyfile(file, directory / file.name)
