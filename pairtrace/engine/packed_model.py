"""A model that runs over packs of pairs: what its passes have in common, whatever is read from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.packing import next_members, packed_tokens
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.tree_attention import ATTENTION_NAME, register_attention
from pairtrace.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class PackedModel:
    """A transformers model with the attention of packs, and a token budget that shrinks with the memory.

    Attributes:
        device: where it runs.
        compute_dtype: name of the dtype of the forward pass.
        token_budget: tokens per pack; halved whenever memory runs out.
        out_of_memory: how many times it was halved.
    """

    def __init__(self, model: Any, token_budget: int | None, defaults: Mapping[str, int]) -> None:
        """`defaults` gives the token budget of each type of device, at least that of "cpu"."""
        register_attention()
        model.config._attn_implementation = ATTENTION_NAME
        parameter = next(model.parameters())
        self.device: torch.device = parameter.device
        self.compute_dtype = str(parameter.dtype).removeprefix("torch.")
        self.token_budget = token_budget or defaults.get(self.device.type, defaults["cpu"])
        self.out_of_memory = 0
        self._embedded = int(model.get_input_embeddings().num_embeddings)
        self._model = model.eval().requires_grad_(False)

    def _run_packs(
        self, pairs: Sequence[RenderedPair], forward: Callable[[range], Result]
    ) -> Iterator[tuple[range, int, Result | None]]:
        """Run `pairs` in packs, in order; running out of memory halves the token budget and goes on.

        Args:
            pairs: N rendered pairs.
            forward: the result of the pairs at these positions.

        Yields:
            Positions, tokens and result of each pack; None for a pair that does not fit into memory even alone.

        Raises:
            ModelError: a token is outside the model's embedding.
        """
        check_ids(pairs, self._embedded)
        costs = [packed_tokens(pair) for pair in pairs]
        start = 0
        while start < len(pairs):
            members = next_members(costs, start, self.token_budget)
            tokens = sum(costs[members.start : members.stop])
            result = self._forward_or_none(forward, members)
            if result is None and len(members) > 1:
                self.token_budget = max(1, min(self.token_budget, tokens) // 2)
                self.out_of_memory += 1
                logger.warning("out of memory: the token budget is now %d", self.token_budget)
                continue
            if result is None:
                logger.warning("row %d does not fit into memory, even alone", pairs[start].row)
            start = members.stop
            yield members, tokens, result

    def _forward_or_none(self, forward: Callable[[range], Result], members: range) -> Result | None:
        """Result of one pack; None when memory ran out."""
        try:
            return forward(members)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only here is the error gone, and with it its hold on the tensors of the failed pass.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def check_ids(pairs: Sequence[RenderedPair], embedded: int) -> None:
    """ModelError for a token outside an embedding of `embedded` rows, which on a GPU would end the process."""
    for pair in pairs:
        largest = max(int(pair.chosen_ids.max()), int(pair.rejected_ids.max()))
        if largest >= embedded:
            raise ModelError(
                f"row {pair.row} holds token {largest}, but the model embeds {embedded} tokens: "
                "tokenizer and model do not belong together"
            )


def check_token_budget(token_budget: int | None) -> None:
    """ConfigError for a budget below one token; None stands for the device's default."""
    if token_budget is not None and token_budget < 1:
        raise ConfigError(f"the token budget is {token_budget}; expected at least 1")
