"""Token-by-token decoding of a batch whose finished rows are taken out.

`generate` of transformers runs every row of a batch until the last one has ended. Here a row that has ended leaves the
batch, and its keys and values the cache, as soon as enough of them have gathered; what the others say does not change.

Legend: B rows of the batch, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Taking rows out copies the cache: not before this share of the batch has ended.
_ENDED_SHARE = 0.1

Choose = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From the logits (float32 [b, V]) of the rows that are left, their places in the batch (int64 [b]) and the step to the
next token of each: int64 [b]."""


def decode_batch(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    end_tokens: tuple[int, ...],
    max_new_tokens: int,
    choose: Choose,
) -> list[list[int]]:
    """What a decoder says after each prompt.

    Args:
        model: a transformers causal language model in evaluation mode, of a family in `architectures.FAMILIES`.
        ids: int64 [B, T], padded on the left, on the model's device.
        mask: int64 [B, T], 0 for padding.
        end_tokens: ids that end a response.
        max_new_tokens: longest response, in tokens.
        choose: takes the next tokens.

    Returns:
        The generated tokens of each row, up to its first end token, that one included.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ends = torch.tensor(end_tokens, dtype=torch.int64, device=ids.device)
    answers = torch.full((len(ids), max_new_tokens), -1, dtype=torch.int64, device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = choose(output.logits[:, -1].float(), rows, step)
        answers[rows[running], step] = tokens[running]
        running &= ~torch.isin(tokens, ends)
        left = int(running.sum())
        if left == 0:
            break
        if left <= (1 - _ENDED_SHARE) * len(rows):
            kept = running.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, tokens, mask, positions = rows[kept], tokens[kept], mask[kept], positions[kept]
            running = running[kept]
        ids = tokens[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return [[token for token in answer if token >= 0] for answer in answers.tolist()]
