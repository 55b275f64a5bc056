"""Sampling responses from a checkpoint, in batches that do not change what is sampled.

Legend: B rollouts of a batch, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor

from pairtrace.engine.architectures import FAMILIES
from pairtrace.engine.checkpoint import load_config, load_model, resolve_checkpoint, resolve_device
from pairtrace.engine.decoding import decode_batch
from pairtrace.engine.memory import is_out_of_memory
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to sample.

    Attributes:
        name: named in errors.
        prompt: token ids of the conversation up to where the answer begins.
        seed: of this response alone.
        adapter: directory of the LoRA adapter to answer with, for a sampler that has loaded it; None for none.
    """

    name: str
    prompt: Sequence[int]
    seed: int
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One sampled response.

    Attributes:
        response: its text, without special tokens.
        tokens: generated tokens, the end token included.
        finished: an end token was reached before the limit.
        token_ids: the generated tokens; `response` tokenised again may give others.
    """

    response: str
    tokens: int
    finished: bool
    token_ids: tuple[int, ...]


def rollout_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts and on nothing else, the same in every process."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _InverseCdf(LogitsProcessor):
    """Turns greedy decoding into sampling at a temperature.

    Token i is drawn when u falls into its interval of the cumulative distribution; u comes from the rollout's own
    generator. So the draw depends neither on the batch nor on the device's random numbers.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, prompt_tokens: int) -> None:
        self.uniforms = uniforms  # float64 [B, max_new_tokens]
        self.temperature = temperature
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        every = torch.arange(len(scores), device=scores.device)
        drawn = self.draw(scores, every, input_ids.shape[1] - self.prompt_tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

    def draw(self, scores: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """The tokens of some rows: int64 [b] out of their logits [b, V]."""
        cumulative = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)  # [b, V]
        wanted = self.uniforms[rows, step][:, None] * cumulative[:, -1:]
        # right=True: the first token whose cumulative probability exceeds u, so none of probability 0.
        return torch.searchsorted(cumulative, wanted, right=True).clamp_(max=scores.shape[1] - 1)[:, 0]


def _most_likely(scores: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    return scores.argmax(dim=-1)


def left_padded(sequences: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [B, T], every sequence ending in the last column."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask


class Sampler:
    """A checkpoint that answers.

    Attributes:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer.
        end_tokens: ids that end a response.
    """

    def __init__(self, model: Any, encoder: PromptEncoder) -> None:
        self.model = model.eval()
        self.tokenizer = encoder.tokenizer
        self.end_tokens = encoder.end_tokens
        pad = self.tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else self.end_tokens[0] if self.end_tokens else 0)
        # Only the temperature asked for shapes the distribution: no top-p or penalties of the checkpoint's own.
        model.generation_config = GenerationConfig(
            eos_token_id=list(self.end_tokens) or None, pad_token_id=self._pad, do_sample=False
        )

    @classmethod
    def load(cls, encoder: PromptEncoder, *, device: str = "auto", dtype: str = "auto") -> Sampler:
        """Load the weights of the encoder's checkpoint, with its language-model head.

        Args:
            encoder: of the checkpoint.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: of the forward pass, "auto" for the checkpoint's own.

        Raises:
            ModelError: weights are missing or damaged.
            ConfigError: the device or dtype cannot be used.
        """
        from transformers import AutoModelForCausalLM

        chosen = resolve_device(device)
        path = resolve_checkpoint(encoder.model)
        return cls(load_model(AutoModelForCausalLM, path, load_config(path), dtype).to(chosen), encoder)

    def sample(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
        on_batch: Callable[[list[tuple[int, Sampled]]], None] | None = None,
    ) -> list[Sampled]:
        """Sample one response per request.

        Args:
            requests: what to answer; batches are formed by prompt length.
            temperature: 0 takes the most likely token.
            max_new_tokens: longest response, in tokens.
            batch_size: rollouts per forward pass; halved whenever memory runs out.
            on_batch: called after each batch with (position in `requests`, response).

        Returns:
            The responses in the order of `requests`.

        Raises:
            ModelError: memory does not suffice for a single response.
        """
        order = sorted(range(len(requests)), key=lambda position: -len(requests[position].prompt))
        results: dict[int, Sampled] = {}
        start = 0
        while start < len(order):
            batch = order[start : start + batch_size]
            uniforms = None
            if temperature > 0:
                draws = [np.random.default_rng(requests[p].seed).random(max_new_tokens) for p in batch]
                uniforms = torch.from_numpy(np.stack(draws))
            answers = self._generate_or_none([requests[p].prompt for p in batch], uniforms, temperature, max_new_tokens)
            if answers is None:
                if len(batch) == 1:
                    raise ModelError(
                        f"memory does not suffice to answer {requests[batch[0]].name} alone; lower --max-new-tokens"
                    )
                batch_size = max(1, len(batch) // 2)
                logger.warning("out of memory: the batch size is now %d", batch_size)
                continue
            finished = list(zip(batch, answers, strict=True))
            results.update(finished)
            start += len(batch)
            if on_batch is not None:
                on_batch(finished)
        return [results[position] for position in range(len(requests))]

    def _generate_or_none(
        self,
        prompts: list[Sequence[int]],
        uniforms: torch.Tensor | None,
        temperature: float,
        max_new_tokens: int,
    ) -> list[Sampled] | None:
        """Answers to one batch; None when memory ran out."""
        device = self.model.device
        ids, mask = (padded.to(device) for padded in left_padded(prompts, self._pad))
        inverse = None if uniforms is None else _InverseCdf(uniforms.to(device), temperature, ids.shape[1])
        # Other families may keep more than keys and values, which only their own `generate` knows about.
        generate = self._generate_fast if self.model.config.model_type in FAMILIES else self._generate
        try:
            with torch.inference_mode():
                rows = generate(ids, mask, inverse, max_new_tokens)
                return [decode(self.tokenizer, row, self.end_tokens) for row in rows]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only here is the error gone, and with it its hold on the tensors of the failed pass.
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, inverse: _InverseCdf | None, max_new_tokens: int
    ) -> list[list[int]]:
        """The general path: generated tokens of each row, padded after its end token."""
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=[] if inverse is None else [inverse],
            max_new_tokens=max_new_tokens,
        )
        generated: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return generated

    def _generate_fast(
        self, ids: torch.Tensor, mask: torch.Tensor, inverse: _InverseCdf | None, max_new_tokens: int
    ) -> list[list[int]]:
        """The same tokens with less work: rows that have ended leave the batch."""
        return decode_batch(
            self.model,
            ids,
            mask,
            end_tokens=self.end_tokens,
            max_new_tokens=max_new_tokens,
            choose=_most_likely if inverse is None else inverse.draw,
        )

    @property
    def config(self) -> Any:
        """The transformers configuration of the model."""
        return self.model.config

    def close(self) -> None:
        """Let the weights go; the sampler cannot be used any more."""
        self.model = None


def decode(tokenizer: Any, generated: list[int], end_tokens: Sequence[int]) -> Sampled:
    """A response out of generated tokens, which may go on behind its end token."""
    ends = [position for position, token in enumerate(generated) if token in end_tokens]
    kept = generated[: ends[0] + 1] if ends else generated
    body = kept[:-1] if ends else kept
    text = tokenizer.decode(body, skip_special_tokens=True)
    return Sampled(response=text, tokens=len(kept), finished=bool(ends), token_ids=tuple(kept))
