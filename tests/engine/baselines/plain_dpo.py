"""The DPO loss and its gradient with respect to LoRA factors, one pair and one sequence at a time, without peft.

Shares no code with the package: the factors are added to the weights, W + (alpha / rank) B A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from pairtrace.engine.rendered import RenderedPair, content_id

Factors = dict[str, torch.Tensor]


def some_pairs(count: int, *, seed: int = 0, vocabulary: int = 600) -> list[RenderedPair]:
    """Pairs of random tokens with prompts and responses of every length."""
    rng = np.random.default_rng(seed)
    pairs = []
    for row in range(count):
        prompt = rng.integers(5, vocabulary, rng.integers(2, 9)).astype(np.int32)
        chosen, rejected = (
            np.concatenate([prompt, rng.integers(5, vocabulary, rng.integers(1, 14)).astype(np.int32)])
            for _ in range(2)
        )
        start = len(prompt)
        pairs.append(
            RenderedPair(
                row=row,
                source="",
                chosen_ids=chosen,
                rejected_ids=rejected,
                chosen_start=start,
                rejected_start=start,
                pair_id=content_id(chosen, start, rejected, start),
            )
        )
    return pairs


class PlainModel:
    """M0 with factors by the names that peft gives them."""

    def __init__(self, path: Path, *, rank: int, alpha: float) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
        self.scale = alpha / rank

    def log_probability(self, ids: np.ndarray, start: int, factors: Factors | None, normalized: bool) -> torch.Tensor:
        weights = dict(self.model.named_parameters())
        for name, value in (factors or {}).items():
            if ".lora_A." in name:
                layer = name.removesuffix(".lora_A.default")
                update = self.scale * factors[f"{layer}.lora_B.default"] @ value
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + update
        logits = functional_call(self.model, weights, (torch.tensor(ids[None].astype(np.int64)),)).logits[0]
        table = torch.log_softmax(logits.double(), dim=-1)
        values = [table[t - 1, int(ids[t])] for t in range(start, len(ids))]
        return sum(values) / (len(values) if normalized else 1)

    def loss(self, pair: RenderedPair, factors: Factors, beta: float, normalized: bool) -> torch.Tensor:
        sides = ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
        policy = [self.log_probability(*side, factors, normalized) for side in sides]
        reference = [self.log_probability(*side, None, normalized).detach() for side in sides]
        margin = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
        return torch.log1p(torch.exp(-margin))

    def gradient(self, pair: RenderedPair, factors: Factors, beta: float, normalized: bool) -> np.ndarray:
        """float64 [P], in the order of `factors`."""
        leaves = {name: value.clone().requires_grad_() for name, value in factors.items()}
        found = torch.autograd.grad(self.loss(pair, leaves, beta, normalized), list(leaves.values()))
        return torch.cat([part.flatten() for part in found]).double().numpy()
