"""Tokens and floating-point operations of training passes, by formula."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pairtrace.engine.flops import ModelShape, causal
from pairtrace.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Passes over the model in units of a forward pass; a backward pass counts as two (engine.flops). With an adapter the
# gradients of the frozen weights, half of a backward pass, are not computed; checkpointing adds a forward pass.
_FORWARD_AND_BACKWARD, _WITH_ADAPTER, _CHECKPOINTING = 3.0, 2.0, 1.0


class Operations:
    """Costs of the passes of one run.

    Args:
        model_config: of transformers.
        tokens: int64 [N, S], tokens of every sequence of every example: chosen and rejected of a pair, for instance.
        responses: int64 [N, S], how many of them have loss.
        adapter: whether only an adapter is trained.
        checkpointing: whether activations are computed twice.

    Attributes:
        tokens: as given.
    """

    def __init__(
        self, model_config: Any, tokens: np.ndarray, responses: np.ndarray, *, adapter: bool, checkpointing: bool
    ) -> None:
        self.tokens = tokens
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
        """Tokens and operations of a forward and backward pass over all sequences of some examples."""
        return int(self.tokens[indices].sum()), float(self._passes * self._forward[indices].sum())

    def reference(self, sides: list[tuple[int, int]]) -> tuple[int, float]:
        """Tokens and operations of a forward pass over some sequences, given as (pair, 0 chosen or 1 rejected)."""
        pairs, columns = zip(*sides, strict=True)
        chosen = (list(pairs), list(columns))
        return int(self.tokens[chosen].sum()), float(self._forward[chosen].sum())
