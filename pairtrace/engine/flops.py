"""Analytic floating-point operations of a decoder's forward pass; a multiplication and an addition count as two.

Counted are the matrix products: attention projections, attention scores and their product with the values, MLP, and the
LM head. Norms, rotary embeddings and activation functions are left out (below 1 % at usual widths). A sliding window
is ignored, so long sequences of such models are counted too high.

Legend: D width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pairtrace.errors import UnsupportedModelError

Count = TypeVar("Count", float, npt.NDArray[np.float64])

# Two matrices (up, down); every other supported family has a gate as well.
_UNGATED = frozenset({"gpt_neox", "phi", "starcoder2"})
_GATED = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3",
     "qwen3_moe", "smollm3"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide the operations of a decoder.

    Attributes:
        width: D.
        blocks: number of decoder blocks.
        heads: query heads.
        kv_heads: key and value heads.
        head_width: width of a head.
        vocabulary: rows of the LM head.
        mlp_matrices: 3 with a gate, 2 without.
        mlp_width: intermediate width of one MLP or expert.
        active_experts: MLPs that a token passes through (1 in a dense model).
        routed_experts: experts that the router scores, 0 in a dense model.
    """

    width: int
    blocks: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    mlp_matrices: int
    mlp_width: int
    active_experts: int = 1
    routed_experts: int = 0

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the sizes from a transformers configuration.

        Raises:
            UnsupportedModelError: the model type is not known here.
        """
        kind = config.model_type
        if kind not in _UNGATED | _GATED:
            raise UnsupportedModelError(
                f"model type {kind!r} has no FLOP formula here; known are {', '.join(sorted(_UNGATED | _GATED))}"
            )
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
        heads = int(config.num_attention_heads)
        return cls(
            width=int(config.hidden_size),
            blocks=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocabulary=int(config.vocab_size),
            mlp_matrices=2 if kind in _UNGATED else 3,
            mlp_width=int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size),
            active_experts=int(config.num_experts_per_tok) if experts else 1,
            routed_experts=int(experts),
        )

    @classmethod
    def known(cls, config: Any) -> ModelShape | None:
        """As `from_config`; None for a model type without a formula here."""
        try:
            return cls.from_config(config)
        except UnsupportedModelError:
            return None

    @property
    def block_flops_per_token(self) -> int:
        """Operations of one block for one token, without the attention products."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.active_experts * self.mlp_matrices * self.width * self.mlp_width
        return 2 * (attention + mlp + self.width * self.routed_experts)

    @property
    def flops_per_attended(self) -> int:
        """Operations of one block for one (query, key) pair over all heads: the score, and the weighted value."""
        return 4 * self.heads * self.head_width

    @property
    def head_flops_per_token(self) -> int:
        """Operations of the LM head for one token."""
        return 2 * self.width * self.vocabulary

    def generation_flops(self, prompt: float, generated: float) -> float:
        """Operations of reading a prompt and generating tokens with cached keys and values, the LM head on the latter.

        Args:
            prompt, generated: token counts.
        """
        tokens = prompt + generated
        return self.forward_flops(tokens, causal(tokens), self.blocks) + self.head_flops_per_token * generated

    def forward_flops(self, tokens: Count, attended: Count, blocks: int, *, head: bool = False) -> Count:
        """Operations of a forward pass.

        Args:
            tokens: T, or an array of them.
            attended: (query, key) pairs; `causal(T)` for a plain causal sequence.
            blocks: how many blocks are run.
            head: whether the LM head is run on every token.
        """
        total = blocks * (self.block_flops_per_token * tokens + self.flops_per_attended * attended)
        return total + self.head_flops_per_token * tokens if head else total


def causal(tokens: Count) -> Count:
    """(query, key) pairs of a causal sequence of T tokens: T (T + 1) / 2."""
    return tokens * (tokens + 1) / 2


def extraction_flops(shape: ModelShape, layer: int, prompt: Count, chosen: Count, rejected: Count) -> Count:
    """Operations of pairtrace for one pair: `layer` blocks, no LM head, the prompt computed once.

    Args:
        shape: of the model.
        layer: deepest layer that is read.
        prompt, chosen, rejected: token counts, numbers or arrays.
    """
    attended = causal(prompt + chosen) + rejected * prompt + causal(rejected)
    return shape.forward_flops(prompt + chosen + rejected, attended, layer)


def published_flops(shape: ModelShape, prompt: Count, chosen: Count, rejected: Count) -> Count:
    """Operations of the published procedure for one pair: two full forwards with the LM head (arXiv 2602.11079).

    Args:
        shape: of the model.
        prompt, chosen, rejected: token counts, numbers or arrays.
    """
    first = shape.forward_flops(prompt + chosen, causal(prompt + chosen), shape.blocks, head=True)
    second = shape.forward_flops(prompt + rejected, causal(prompt + rejected), shape.blocks, head=True)
    return first + second
