"""Log-probabilities and divergences of given responses, teacher-forced in batches.

Rows are padded on the right and attention is causal, so that no token attends to padding and no mask is needed.

Legend: B rows, T tokens of the longest row, R response tokens of a row, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional

from pairtrace.engine.flops import ModelShape, causal
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.errors import ModelError

Value = TypeVar("Value")
# Elements of a float64 [R, V] block: 128 MiB.
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class Forced:
    """A sequence whose response is given.

    Attributes:
        ids: token ids of prompt and response.
        start: index of the first response token, at least 1.
    """

    ids: Sequence[int] | np.ndarray
    start: int

    @property
    def response_tokens(self) -> int:
        """Number of response tokens."""
        return len(self.ids) - self.start


def padded_ids(rows: Sequence[Forced]) -> torch.Tensor:
    """Token ids, int64 [B, T], padded on the right, where causal attention never looks."""
    ids = torch.zeros((len(rows), max(len(row.ids) for row in rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.as_tensor(row.ids)
    return ids


def batches(rows: Sequence[Forced], token_budget: int) -> Iterator[list[int]]:
    """Positions in `rows` in batches of rows of similar length, each of at most `token_budget` tokens with padding."""
    order = sorted(range(len(rows)), key=lambda position: -len(rows[position].ids))
    begin = 0
    while begin < len(order):
        size = max(1, token_budget // len(rows[order[begin]].ids))
        yield order[begin : begin + size]
        begin += size


def flops_of(shape: ModelShape | None, rows: Sequence[Forced]) -> float:
    """Operations of one forward pass over these rows, padding left out; 0 where there is no formula."""
    if shape is None:
        return 0.0
    return float(
        sum(
            shape.forward_flops(len(row.ids), causal(len(row.ids)), shape.blocks)
            + shape.head_flops_per_token * row.response_tokens
            for row in rows
        )
    )


def log_probabilities(model: Any, rows: Sequence[Forced], name: str) -> list[float]:
    """Sum of the log-probabilities of each row's response tokens, in nats.

    Args:
        model: a transformers causal language model in evaluation mode.
        rows: one batch.
        name: of the model, for errors.

    Raises:
        ModelError: a sum is not finite, or memory does not suffice for one row.
    """

    def run(part: Sequence[Forced]) -> list[float]:
        logits = _response_logits(model, part)
        sums = [-_cross_entropy(block, row) for block, row in zip(logits, part, strict=True)]
        return torch.stack(sums).tolist()

    return _require_finite(_in_memory(rows, run, name), name)


def divergences(model: Any, base: Any, rows: Sequence[Forced], name: str) -> list[float]:
    """KL(model || base), exact over the vocabulary, summed over the response positions of each row, in nats.

    Args:
        model: a transformers causal language model in evaluation mode.
        base: another one with the same vocabulary.
        rows: one batch.
        name: of the model, for errors.

    Raises:
        ModelError: the vocabularies differ in size, a sum is not finite, or memory does not suffice for one row.
    """

    def run(part: Sequence[Forced]) -> list[float]:
        pairs = zip(_response_logits(model, part), _response_logits(base, part), strict=True)
        return torch.stack([_divergence(mine, theirs, name) for mine, theirs in pairs]).tolist()

    return _require_finite(_in_memory(rows, run, name), name)


def _response_logits(model: Any, rows: Sequence[Forced]) -> list[torch.Tensor]:
    """For each row the logits that predict its response tokens: [R, V]."""
    # The last token predicts nothing that is asked for.
    ids = padded_ids([Forced(ids=row.ids[:-1], start=row.start) for row in rows])
    first = min(row.start for row in rows) - 1
    logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    return [logits[number, row.start - 1 - first : len(row.ids) - 1 - first] for number, row in enumerate(rows)]


def _cross_entropy(logits: torch.Tensor, row: Forced) -> torch.Tensor:
    targets = torch.as_tensor(row.ids[row.start :], dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits.float(), targets, reduction="none").double().sum()


def _divergence(mine: torch.Tensor, theirs: torch.Tensor, name: str) -> torch.Tensor:
    if mine.shape[-1] != theirs.shape[-1]:
        raise ModelError(
            f"{name} has {mine.shape[-1]} outputs and the base {theirs.shape[-1]}: their divergence is not defined; "
            "give the checkpoint that this model was trained from"
        )
    total = torch.zeros((), dtype=torch.float64, device=mine.device)
    step = max(1, _BLOCK // mine.shape[-1])
    for begin in range(0, len(mine), step):
        log_p = torch.log_softmax(mine[begin : begin + step].double(), dim=-1)
        log_q = torch.log_softmax(theirs[begin : begin + step].double(), dim=-1)
        total += (log_p.exp() * (log_p - log_q)).sum()
    return total


def _in_memory(rows: Sequence[Forced], run: Callable[[Sequence[Forced]], list[Value]], name: str) -> list[Value]:
    """The result of `run`, in halves when memory runs out."""
    try:
        with torch.inference_mode():
            return run(rows)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise ModelError(
                f"memory does not suffice for {name} and a sequence of {len(rows[0].ids)} tokens; lower --max-length"
            ) from error
    # Only here is the error gone, and with it its hold on the tensors of the failed pass.
    gc.collect()
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return _in_memory(rows[:half], run, name) + _in_memory(rows[half:], run, name)


def _require_finite(values: list[float], name: str) -> list[float]:
    if not all(math.isfinite(value) for value in values):
        raise ModelError(
            f"{name} gives probabilities that are not finite; its training may have diverged, or its dtype is too "
            "narrow (try --compute-dtype float32)"
        )
    return values
