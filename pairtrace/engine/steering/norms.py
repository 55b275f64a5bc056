"""How long the residual stream is. Legend: B rows, T tokens, D width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pairtrace.engine.evaluation.likelihood import Forced, batches, padded_ids
from pairtrace.engine.probes.hooks import decoder_of, reading_layers


def mean_norms(model: Any, rows: Sequence[Forced], layers: Sequence[int], token_budget: int) -> dict[int, float]:
    """Mean length of the residual stream at the tokens of given responses.

    Prompts do not count: their first token is often an attention sink, hundreds of times as long as any other.

    Args:
        model: a transformers causal language model in evaluation mode.
        rows: prompts with their responses; at least one response token in all.
        layers: residual layers.
        token_budget: tokens per forward pass.

    Returns:
        By layer, in the units of the activations.
    """
    sums = dict.fromkeys(layers, 0.0)
    count = 0
    decoder = decoder_of(model)
    for batch in batches(rows, token_budget):
        chosen = [rows[place] for place in batch]
        ids = padded_ids(chosen)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for number, row in enumerate(chosen):
            mask[number, row.start : len(row.ids)] = True
        with torch.inference_mode(), reading_layers(model, layers) as states:
            decoder(input_ids=ids.to(model.device), use_cache=False)
            for layer in layers:
                lengths = torch.linalg.vector_norm(states[layer].float(), dim=-1)
                sums[layer] += float(lengths[mask.to(lengths.device)].double().sum())
        count += int(mask.sum())
    assert count, "there is a response token"
    return {layer: total / count for layer, total in sums.items()}
