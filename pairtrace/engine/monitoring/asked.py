"""The prompts that are asked at every step, and the answers to them.

An item is a prompt under one condition. Legend: P items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import PromptSet
from pairtrace.engine.rollout_table import BASE, SCHEMA, TUNED, RolloutTable

if TYPE_CHECKING:
    from pairtrace.engine.cost import CostMeter
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.sampling import Sampled, Sampler


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response.

    Attributes:
        response: its text.
        tokens: generated tokens, the end token included.
        finished: an end token was reached.
        seed: of its sampling.
    """

    response: str
    tokens: int
    finished: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Item:
    prompt_id: str
    condition: str
    messages: list[dict[str, Any]]
    tokens: list[int]


class AskedPrompts:
    """A bag of prompts as one checkpoint family reads it.

    Args:
        prompts: the bag; a prompt with a distractor is asked without and with it.
        encoder: of M0, whose tokens all checkpoints of a run share.
        max_new_tokens: longest response, in tokens.

    Raises:
        DataError, ModelError, ConfigError: see `PromptEncoder.encode`.
    """

    def __init__(self, prompts: PromptSet, encoder: PromptEncoder, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        self._items: list[_Item] = []
        for condition in prompts.conditions:
            for prompt in prompts.under(condition):
                messages = prompt.conversation(condition)
                tokens = encoder.encode(f"prompt {prompt.id!r} ({condition})", messages, max_new_tokens)
                self._items.append(_Item(prompt_id=prompt.id, condition=condition, messages=messages, tokens=tokens))

    def __len__(self) -> int:
        return len(self._items)

    def ask(
        self,
        sampler: Sampler,
        *,
        seed: tuple[object, ...],
        temperature: float,
        batch_size: int,
        stage: str,
        progress: Progress = NULL_PROGRESS,
        meter: CostMeter | None = None,
    ) -> list[Answer]:
        """One answer to every item.

        Args:
            sampler: the model that answers.
            seed: parts of the seeds, beside the item's own.
            temperature: 0 takes the most likely token.
            batch_size: responses per forward pass.
            stage: named to `progress`.
            progress: counts responses.
            meter: counts tokens and operations.

        Raises:
            ModelError: memory does not suffice for a single response.
        """
        from pairtrace.engine.flops import ModelShape
        from pairtrace.engine.sampling import Request, rollout_seed

        requests = [
            Request(
                name=f"prompt {item.prompt_id!r} ({item.condition})",
                prompt=item.tokens,
                seed=rollout_seed(*seed, item.condition, item.prompt_id),
            )
            for item in self._items
        ]
        shape = ModelShape.known(sampler.model.config)
        progress.start(stage, len(requests), "responses")

        def on_batch(finished: list[tuple[int, Sampled]]) -> None:
            if meter is not None:
                lengths = [(len(requests[position].prompt), sampled.tokens) for position, sampled in finished]
                flops = 0.0 if shape is None else sum(shape.generation_flops(*pair) for pair in lengths)
                meter.add(tokens=sum(map(sum, lengths)), flops=flops)
            progress.advance(len(finished))

        sampled = sampler.sample(
            requests,
            temperature=temperature,
            max_new_tokens=self._max_new_tokens,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        progress.finish()
        return [
            Answer(response=one.response, tokens=one.tokens, finished=one.finished, seed=request.seed)
            for request, one in zip(requests, sampled, strict=True)
        ]

    def table(
        self, base: Sequence[Answer], tuned: Sequence[Answer] = (), manifest: dict[str, Any] | None = None
    ) -> RolloutTable:
        """Rollouts: first all answers of M0, then those of the model in training.

        Args:
            base: answers of M0 to all P items, of one sample after the other.
            tuned: answers of the model in training, likewise.
            manifest: how they were made.
        """
        records = [
            {
                "prompt_id": item.prompt_id,
                "condition": item.condition,
                "model": model,
                "sample": number // len(self._items),
                "messages": json.dumps(item.messages, ensure_ascii=False),
                "response": answer.response,
                "tokens": answer.tokens,
                "finished": answer.finished,
                "verdict": None,
                "judge": "",
                "seed": answer.seed,
            }
            for model, answers in ((BASE, base), (TUNED, tuned))
            for number, answer in enumerate(answers)
            for item in (self._items[number % len(self._items)],)
        ]
        return RolloutTable(pa.Table.from_pylist(records, schema=SCHEMA), manifest or {})


def answers_of(table: RolloutTable) -> list[Answer]:
    """The rows of a table that `AskedPrompts.table` made, in its order."""
    return [Answer(**row) for row in table.table.select(["response", "tokens", "finished", "seed"]).to_pylist()]
