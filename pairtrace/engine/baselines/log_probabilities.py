"""Log-probabilities of responses, in packs without padding whose common start is computed once.

The packs are those of the extraction (`engine.packing`), with the whole model behind them.
Legend: P pairs of a pack, T tokens of a pack, R predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pairtrace.engine.architectures import family_of
from pairtrace.engine.checkpoint import load_config, load_model, resolve_checkpoint, resolve_device
from pairtrace.engine.flops import ModelShape
from pairtrace.engine.packed_model import PackedModel, check_token_budget
from pairtrace.engine.packing import build_pack, packed_flops, shared_length
from pairtrace.engine.rendered import RenderedPair

# Fewer tokens than in an extraction on a GPU: here every one of them may have the logits of a whole vocabulary.
DEFAULT_TOKEN_BUDGET = {"cpu": 1024, "cuda": 8192}
# Rows of logits that are widened to float32 at a time.
_LOGIT_ROWS = 1024

OnPack = Callable[[int, int, float], None]


class ResponseScorer(PackedModel):
    """A causal language model that says how likely the responses of rendered pairs are."""

    def __init__(self, model: Any, *, token_budget: int | None = None) -> None:
        super().__init__(model, token_budget, DEFAULT_TOKEN_BUDGET)
        self._shape = ModelShape.from_config(model.config)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        token_budget: int | None = None,
    ) -> ResponseScorer:
        """Load a checkpoint with its language-model head.

        Args:
            model: checkpoint directory or hub id.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: dtype of the forward pass, "auto" for the checkpoint's own.
            max_length: longest sequence that will come, in tokens.
            token_budget: tokens per pack; None for the device's default.

        Raises:
            UnsupportedModelError: the architecture is not reproduced exactly.
            ModelError: weights are missing or damaged.
            ConfigError: the device, dtype or budget cannot be used.
        """
        from transformers import AutoModelForCausalLM

        check_token_budget(token_budget)
        path = resolve_checkpoint(model)
        config = load_config(path)
        family_of(config, max_length)
        chosen = resolve_device(device)
        loaded = load_model(AutoModelForCausalLM, path, config, dtype).to(chosen)
        return cls(loaded, token_budget=token_budget)

    def log_probabilities(self, pairs: Sequence[RenderedPair], on_pack: OnPack | None = None) -> np.ndarray:
        """Summed log-probabilities of the response tokens of each side, float32 [N, 2] (chosen, rejected).

        The softmax is computed in float32 and the sums in float64, whatever the dtype of the model. NaN for a pair that
        does not fit into memory even alone.

        Args:
            pairs: N rendered pairs.
            on_pack: called with (pairs, tokens, floating-point operations) after every pack.

        Raises:
            ModelError: a token is outside the model's embedding.
        """
        result = np.full((len(pairs), 2), np.nan, np.float32)
        for members, tokens, sums in self._run_packs(pairs, lambda members: self._forward(pairs, members)):
            if sums is not None:
                result[members.start : members.stop] = sums
            if on_pack is not None:
                on_pack(len(members), tokens, sum(self._flops(pairs[index]) for index in members))
        return result

    def _flops(self, pair: RenderedPair) -> float:
        head = self._shape.head_flops_per_token * (pair.chosen_tokens + pair.rejected_tokens)
        return packed_flops(pair, self._shape, self._shape.blocks) + head

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[RenderedPair], members: range) -> np.ndarray:
        pack = build_pack(pairs, members, self.device)
        predictors, targets, sides = _predictions([pairs[index] for index in members])
        # A shared token predicts for both sides: its logits are computed once.
        kept, place = np.unique(predictors, return_inverse=True)
        output = self._model(
            input_ids=pack.input_ids[None],
            position_ids=pack.plan.positions[None],
            use_cache=False,
            pair_plan=pack.plan,
            logits_to_keep=torch.from_numpy(kept).to(self.device),
        )
        logits = output.logits[0]
        assert logits.shape[0] == len(kept)
        places = torch.from_numpy(place).to(self.device)
        wanted = torch.from_numpy(targets).to(self.device)
        normaliser = torch.cat([part.float().logsumexp(dim=-1) for part in logits.split(_LOGIT_ROWS)])
        values = logits[places, wanted].float() - normaliser[places]
        # On the host: the order of the additions is fixed there.
        sums = np.bincount(sides, weights=values.cpu().numpy(), minlength=2 * len(members))
        return sums.reshape(-1, 2).astype(np.float32)


def _predictions(pairs: Sequence[RenderedPair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a pack has to predict, as laid out by `build_pack`.

    Returns:
        int64 [R] each: place in the pack of the token before, the token, and the sum it belongs to (2 * pair for
        chosen, 2 * pair + 1 for rejected).
    """
    predictors, targets, sides = [], [], []
    cursor = 0
    for number, pair in enumerate(pairs):
        shared, length = shared_length(pair), len(pair.chosen_ids)
        chosen = np.arange(pair.chosen_start, length)
        rejected = np.arange(pair.rejected_start, len(pair.rejected_ids))
        before = rejected - 1
        # The rejected leaf lies behind the chosen sequence; what comes before the leaf is part of that sequence.
        predictors += [cursor + chosen - 1, cursor + np.where(before < shared, before, before + length - shared)]
        targets += [pair.chosen_ids[chosen], pair.rejected_ids[rejected]]
        sides += [np.full(len(chosen), 2 * number), np.full(len(rejected), 2 * number + 1)]
        cursor += length + len(pair.rejected_ids) - shared
    return tuple(np.concatenate(parts).astype(np.int64) for parts in (predictors, targets, sides))  # type: ignore[return-value]
