"""Tokens and floating-point operations of training passes, by formula."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pairtrace.engine.flops import ModelShape, causal
from pairtrace.engine.training.rows import TrainingRows
from pairtrace.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Passes over the model in units of a forward pass; a backward pass counts as two (engine.flops). With an adapter the
# gradients of the frozen weights, half of a backward pass, are not computed; checkpointing adds a forward pass.
_FORWARD_AND_BACKWARD, _WITH_ADAPTER, _CHECKPOINTING = 3.0, 2.0, 1.0


class Operations:
    """Costs of the passes of one run.

    Args:
        model_config: of transformers.
        rows: the pairs to train on.
        adapter: whether only an adapter is trained.
        checkpointing: whether activations are computed twice.

    Attributes:
        tokens: int64 [N, 2], tokens of the chosen and the rejected sequence of every pair.
    """

    def __init__(self, model_config: Any, rows: TrainingRows, *, adapter: bool, checkpointing: bool) -> None:
        self.tokens = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in rows.pairs], dtype=np.int64)
        responses = np.array([[pair.chosen_tokens, pair.rejected_tokens] for pair in rows.pairs], dtype=np.int64)
        self._forward = np.zeros(self.tokens.shape)
        try:
            shape = ModelShape.from_config(model_config)
        except UnsupportedModelError as error:
            logger.warning("the operations of training are not counted: %s", error)
        else:
            # The LM head runs on response tokens only.
            counted = shape.forward_flops(self.tokens.astype(float), causal(self.tokens.astype(float)), shape.blocks)
            self._forward = counted + shape.head_flops_per_token * responses
        self._passes = (_WITH_ADAPTER if adapter else _FORWARD_AND_BACKWARD) + _CHECKPOINTING * checkpointing

    def training(self, indices: list[int]) -> tuple[int, float]:
        """Tokens and operations of a forward and backward pass over both sides of some pairs."""
        return int(self.tokens[indices].sum()), float(self._passes * self._forward[indices].sum())

    def reference(self, sides: list[tuple[int, int]]) -> tuple[int, float]:
        """Tokens and operations of a forward pass over some sequences, given as (pair, 0 chosen or 1 rejected)."""
        pairs, columns = zip(*sides, strict=True)
        chosen = (list(pairs), list(columns))
        return int(self.tokens[chosen].sum()), float(self._forward[chosen].sum())
