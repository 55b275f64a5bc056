"""Batches of pairs through the model and back; a batch that does not fit into memory is halved.

Legend: B pairs of a batch, N pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pairtrace.engine.baselines.gradient_loss import PairBatch, batches
from pairtrace.engine.baselines.gradient_model import LoraModel
from pairtrace.engine.baselines.gradient_rows import (
    DpoSettings,
    Parts,
    batched_gradients,
    published_gradients,
    reference_log_probabilities,
)
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.rendered import RenderedPair

logger = logging.getLogger(__name__)

# Padded tokens. Small batches keep a CPU's caches warm; on a GPU the logits of a large vocabulary set the limit.
DEFAULT_TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}

Reduce = Callable[[Parts], Tensor | None]


class PairGradients:
    """Per-pair gradients of one model, reduced batch by batch.

    Args:
        model: with the adapter of a checkpoint.
        settings: of the loss.
        published: one pair at a time, see `published_gradients`.
        token_budget: padded tokens per batch; None for the device's default.
        meter: counts tokens and operations.
    """

    def __init__(
        self, model: LoraModel, settings: DpoSettings, *, published: bool, token_budget: int | None, meter: CostMeter
    ) -> None:
        self.model = model
        self.settings = settings
        self.token_budget = default_budget(model, token_budget)
        self._published = published
        self._meter = meter

    def references(self, pairs: Sequence[RenderedPair]) -> np.ndarray | None:
        """Log-probabilities under M0, float32 [N, 2]; None for the published procedure, which does not keep them."""
        if self._published:
            return None

        def run(members: list[int]) -> Tensor:
            batch = self._batch(pairs, members)
            found = reference_log_probabilities(self.model, batch, self.settings)
            self._meter.add(tokens=batch.tokens, flops=batch.forward_flops(self.model.shape, every_logit=False))
            return found

        values = np.full((len(pairs), 2), np.nan, np.float32)
        for members, found in self._halving(pairs, run):
            if found is not None:
                values[members] = found.cpu().numpy()
        return values

    def reduced(
        self, pairs: Sequence[RenderedPair], references: np.ndarray | None, reduce: Reduce
    ) -> Iterator[tuple[list[int], Tensor | None]]:
        """Go through the pairs in batches.

        Args:
            pairs: N pairs.
            references: what `references` gave for them.
            reduce: makes one value out of a batch's gradients; None asks for a smaller batch.

        Yields:
            Positions of a batch and its value; None for a single pair that did not fit into memory or whose value
            was None.
        """

        def run(members: list[int]) -> Tensor | None:
            batch = self._batch(pairs, members)
            flops = batch.forward_flops(self.model.shape, every_logit=self._published)
            if references is None:
                parts = published_gradients(self.model, batch, self.settings)
            else:
                known = torch.from_numpy(references[members]).to(self.model.device)
                parts = batched_gradients(self.model, batch, known, self.settings)
            value = reduce(parts)
            # Frozen matrices pass a gradient on but get none: their backward pass costs what their forward pass does.
            passes = 3 if self._published else 2
            self._meter.add(tokens=batch.tokens * (passes - 1), flops=passes * flops)
            return value

        yield from self._halving(pairs, run)

    def _batch(self, pairs: Sequence[RenderedPair], members: list[int]) -> PairBatch:
        return PairBatch.of([pairs[member] for member in members], self.model.device)

    def _halving(
        self, pairs: Sequence[RenderedPair], run: Callable[[list[int]], Tensor | None]
    ) -> Iterator[tuple[list[int], Tensor | None]]:
        waiting = [[n] for n in range(len(pairs))] if self._published else list(batches(pairs, self.token_budget))
        # The longest pairs come last in the list, and first here: what does not fit shows at once.
        while waiting:
            members = waiting.pop()
            exhausted = False
            value = None
            try:
                value = run(members)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                exhausted = True
            if exhausted and self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            if value is None and len(members) > 1:
                middle = len(members) // 2
                waiting += [members[:middle], members[middle:]]
                continue
            if exhausted:
                logger.warning("row %d does not fit into memory, even alone", pairs[members[0]].row)
            yield members, value


def default_budget(model: LoraModel, token_budget: int | None) -> int:
    """Padded tokens per batch: what was given, or the device's default."""
    return token_budget or DEFAULT_TOKEN_BUDGET.get(model.device.type, DEFAULT_TOKEN_BUDGET["cpu"])
