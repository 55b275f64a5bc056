"""The attention of packs, as transformers calls it."""

from __future__ import annotations

from typing import Any

import torch

from pairtrace.errors import UnsupportedModelError
from pairtrace.kernels.segment_attention import SegmentPlan, segment_attention

ATTENTION_NAME = "pairtrace_tree"
# Passed by transformers to every attention function, without meaning for a forward pass over whole sequences.
_INERT_KEYWORDS = frozenset({"position_ids", "cache_position", "output_attentions", "use_cache", "is_causal"})


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pair_plan: SegmentPlan | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; refuses whatever it would have to ignore."""
    if pair_plan is None or attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not hand the pack's plan to its attention, or builds a mask of its own"
        )
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _INERT_KEYWORDS)
    if unknown:
        raise UnsupportedModelError(f"{type(module).__name__} uses attention features not reproduced here: {unknown}")
    assert dropout == 0.0
    output = segment_attention(
        query,
        key,
        value,
        pair_plan,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output.transpose(1, 2), None


def register_attention() -> None:
    """Make the attention of packs known to transformers, under `ATTENTION_NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, tree_attention)
