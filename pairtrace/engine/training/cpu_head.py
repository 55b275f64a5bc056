"""The LM head of TRL's losses on a CPU.

TRL's own runs there on every position, prompt and padding included, in tiles of 4,096 x 32,768 numbers and with its
log's figures worked out in many passes. The same log-probabilities come from one product and a fused cross entropy
over the response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor
from torch.nn import functional

# Numbers in a matrix of logits; a larger one goes through TRL's tiles.
_LARGEST_LOGITS = 1 << 26


@contextmanager
def head_for_cpu(vocabulary: int, device: torch.device) -> Iterator[None]:
    """While the block runs, models that TRL prepares on a CPU use this head; on other devices nothing changes.

    The trainer's figures of entropy, mean logits and top-1 accuracy are 0 then.
    """
    module = trl.trainer.utils
    names = ("_use_triton", "_CHUNKED_LOGPROB_CHUNK_SIZE", "_ChunkedLogProbFunction")
    # With other names in another version of TRL it stays as it is: slower, and right.
    if device.type != "cpu" or not all(hasattr(module, name) for name in names):
        yield
        return
    before = {name: getattr(module, name) for name in names}
    # `_use_triton` stands there for "score response tokens only".
    values = (lambda _: True, min(vocabulary, 32_768), _Head(before["_ChunkedLogProbFunction"]))
    try:
        for name, value in zip(names, values, strict=True):
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class _Head:
    """Stands in for TRL's autograd function of the same signature.

    Args:
        tiled: that function, for matrices that would be too large.
    """

    def __init__(self, tiled: Any) -> None:
        self._tiled = tiled

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        tile: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities of `targets`, float32 [N], and TRL's further figures.

        Args:
            hidden: [N, H].
            weight: [V, H].
            bias: [V] or None.
            targets: int64 [N].
            temperature, softcap, scale: logits are multiplied by the scale, capped, divided by the temperature.
            tile, outputs: for TRL's function.
        """
        if hidden.shape[0] * weight.shape[0] > _LARGEST_LOGITS:
            figures: tuple[Tensor | None, ...] = self._tiled.apply(
                hidden, weight, bias, targets, temperature, tile, softcap, scale, outputs
            )
            return figures
        logits = functional.linear(hidden, weight, bias).float()
        if scale != 1.0:
            logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if temperature != 1.0:
            logits = logits / temperature
        log_probabilities = -functional.cross_entropy(logits, targets, reduction="none")
        not_measured = torch.zeros_like(log_probabilities.detach())
        return log_probabilities, not_measured, None, not_measured, not_measured.bool()
