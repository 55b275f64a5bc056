"""Asking a model while it is being trained, so that training does not notice.

The weights are shared, nothing else is: answers come from a second set of modules over the same tensors, in evaluation
mode and without the hooks, wrappers and replaced methods that training has put on the model.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pairtrace.errors import UnsupportedModelError


def shared_view(model: Any) -> Any:
    """A causal language model over the tensors of a model in training.

    Args:
        model: a transformers model, or a peft model around one: its adapter takes part.

    Returns:
        A model of the same class whose parameters and buffers are those of `model`.

    Raises:
        UnsupportedModelError: the weights are not all in this process.
    """
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    elsewhere = next((name for name, value in inner.named_parameters() if value.is_meta or not value.numel()), None)
    if elsewhere is not None or _is_sharded(inner):
        raise UnsupportedModelError(
            "the weights of the model in training are spread over processes or devices, so it cannot be asked while it "
            "is trained; save checkpoints and run `pairtrace monitor --follow` on their directory"
        )
    return _copied(inner, {})


def _is_sharded(model: torch.nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(value, DTensor) for value in model.parameters())


def _copied(module: torch.nn.Module, made: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """The module with containers of its own: what is set on the copy does not reach the original."""
    if id(module) not in made:
        copy = module.__class__.__new__(module.__class__)
        made[id(module)] = copy
        own = dict(module.__dict__)
        own.pop("forward", None)  # replaced on the instance: TRL's loss head, accelerate's casts
        for name, value in own.items():
            if name in ("_parameters", "_buffers"):
                own[name] = value.copy()
            elif "_hooks" in name:
                own[name] = OrderedDict() if isinstance(value, dict) else value
        own["_modules"] = {
            name: None if child is None else _copied(child, made) for name, child in module._modules.items()
        }
        own["training"] = False
        copy.__dict__.update(own)
    return made[id(module)]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the process's generators stand afterwards where they stood before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
