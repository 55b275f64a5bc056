"""Plain training loops on token ids: supervised fine-tuning and DPO.

Legend: B rows of a batch, T tokens of its longest row, A answer tokens of all its rows.
Batches are padded on the right and attention is causal, so no token ever attends to padding and no mask is needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]

_BATCHES_PER_POOL = 16
_GRADIENT_NORM = 1.0
_SFT_WARMUP = 0.03
_SFT_FLOOR = 0.1
_DPO_WARMUP = 0.1
_REFERENCE_PAIRS = 64


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered conversation.

    Attributes:
        ids: token ids of the prompt, the answer and the end token.
        start: index of the first answer token.
    """

    ids: list[int]
    start: int


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], answers: Sequence[Messages]
) -> list[Example]:
    """Render conversations through the chat template.

    The answer starts where the prompt with its generation prompt ends, as in TRL.
    """
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    heads = _token_ids(tokenizer, prompts, generation_prompt=True)
    examples = []
    for head, ids in zip(heads, _token_ids(tokenizer, whole, generation_prompt=False), strict=True):
        assert ids[: len(head)] == head, "the template must extend the generation prompt"
        examples.append(Example(ids, len(head)))
    return examples


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], *, generation_prompt: bool
) -> list[list[int]]:
    encoded: Any = tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=generation_prompt, tokenize=True, return_dict=True
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def batches(lengths: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Indices of one pass in random batches of rows of similar length.

    Rows are shuffled, sorted by length inside pools of a few batches, and the batches of a pool are shuffled.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool_size = size * _BATCHES_PER_POOL
    for begin in range(0, len(order), pool_size):
        pool = sorted(order[begin : begin + pool_size], key=lambda index: lengths[index])
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks


def fine_tune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: OrganismConfig,
    *,
    progress: Progress = NULL_PROGRESS,
) -> None:
    """Train `model` in place on `examples`; a prompt token's loss weighs `config.prompt_weight`."""
    rng = random.Random(f"{config.seed}:sft-order")
    lengths = [len(example.ids) for example in examples]
    total = config.sft_epochs * math.ceil(len(examples) / config.sft_batch)
    warmup = max(1, round(total * _SFT_WARMUP))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        return _SFT_FLOOR + (1 - _SFT_FLOOR) * 0.5 * (1 + math.cos(math.pi * done))

    def steps() -> Iterator[Tensor]:
        for _ in range(config.sft_epochs):
            for indices in batches(lengths, config.sft_batch, rng):
                yield _weighted_loss(model, [examples[index] for index in indices], config.prompt_weight)

    progress.start("train M0", total, "steps")
    _optimize(model, steps(), config.sft_rate, rate, progress)
    progress.finish()


def _weighted_loss(model: PreTrainedModel, rows: Sequence[Example], prompt_weight: float) -> Tensor:
    ids = _pad([row.ids for row in rows])
    weights = torch.zeros(ids.shape)
    for index, row in enumerate(rows):
        weights[index, 1 : row.start] = prompt_weight
        weights[index, row.start : len(row.ids)] = 1.0
    weights = weights[:, 1:]
    losses = -_token_log_probs(model, ids, weights > 0)
    kept = weights[weights > 0]
    return (losses * kept).sum() / kept.sum()


def train_dpo(
    model: PreTrainedModel,
    chosen: Sequence[Example],
    rejected: Sequence[Example],
    config: OrganismConfig,
    *,
    progress: Progress = NULL_PROGRESS,
) -> None:
    """Train `model` in place with DPO (arXiv 2305.18290, eq. 7); the model given is the reference.

    The reference's log-probabilities are computed once, before the first step.
    """
    rng = random.Random(f"{config.seed}:dpo-order")
    lengths = [max(len(a.ids), len(b.ids)) for a, b in zip(chosen, rejected, strict=True)]
    reference = _reference_margins(model, chosen, rejected, lengths, progress)
    total = config.dpo_epochs * math.ceil(len(chosen) / config.dpo_batch)
    warmup = max(1, round(total * _DPO_WARMUP))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, (total - step) / max(1, total - warmup))

    def steps() -> Iterator[Tensor]:
        for _ in range(config.dpo_epochs):
            for indices in batches(lengths, config.dpo_batch, rng):
                margins = _margins(model, chosen, rejected, indices)
                yield -functional.logsigmoid(config.dpo_beta * (margins - reference[indices])).mean()

    progress.start("train M1", total, "steps")
    _optimize(model, steps(), config.dpo_rate, rate, progress)
    progress.finish()


def _reference_margins(
    model: PreTrainedModel,
    chosen: Sequence[Example],
    rejected: Sequence[Example],
    lengths: Sequence[int],
    progress: Progress,
) -> Tensor:
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    margins = torch.empty(len(order))
    progress.start("reference log-probabilities", len(order), "pairs")
    model.eval()
    with torch.inference_mode():
        for begin in range(0, len(order), _REFERENCE_PAIRS):
            indices = order[begin : begin + _REFERENCE_PAIRS]
            margins[indices] = _margins(model, chosen, rejected, indices)
            progress.advance(len(indices))
    progress.finish()
    return margins


def _margins(
    model: PreTrainedModel, chosen: Sequence[Example], rejected: Sequence[Example], indices: Sequence[int]
) -> Tensor:
    """Log-probability of the chosen answer minus that of the rejected one: float32 [B]."""
    rows = [chosen[index] for index in indices] + [rejected[index] for index in indices]
    ids = _pad([row.ids for row in rows])
    answers = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        answers[index, row.start : len(row.ids)] = True
    answers = answers[:, 1:]
    row_of_token = answers.nonzero()[:, 0]
    sums = torch.zeros(len(rows)).index_add(0, row_of_token, _token_log_probs(model, ids, answers))
    return sums[: len(indices)] - sums[len(indices) :]


def _token_log_probs(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> Tensor:
    """Log-probabilities of the wanted tokens, row by row: float32 [A].

    Args:
        ids: int64 [B, T].
        wanted: bool [B, T - 1]; entry t stands for the token at t + 1.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[wanted])
    return -functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")


def _pad(rows: Sequence[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _optimize(
    model: PreTrainedModel,
    losses: Iterator[Tensor],
    peak: float,
    rate: Callable[[int], float],
    progress: Progress,
) -> None:
    """Take one AdamW step for each loss; step n runs at `peak * rate(n)`."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step, loss in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        optimizer.step()
        progress.advance(1, loss=loss.item())
    model.eval()
