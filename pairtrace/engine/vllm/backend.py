"""The vLLM back end of extraction: each side of a pair is a sequence of its own, and only rows of pairs come back.

Legend: n pairs, L layers, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pairtrace.engine.architectures import check_layers, family_of
from pairtrace.engine.backend import OnPack
from pairtrace.engine.checkpoint import load_config, resolve_checkpoint, resolve_dtype
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.flops import ModelShape, causal
from pairtrace.engine.packed_model import check_ids
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.reduced import Reduced, problems_of
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.truncation import cached_truncation
from pairtrace.engine.vllm.cache_need import require_cache
from pairtrace.engine.vllm.engine import Engine, EngineRequest
from pairtrace.engine.vllm.families import vllm_family
from pairtrace.engine.vllm.installed import require_vllm
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.engine.vllm.rows import unpack_rows, wire_dtype
from pairtrace.errors import ConfigError, EngineError

PURPOSE = "extraction with --backend vllm"
# After the last sequence has ended its rows are a step away; longer than this means that they never come.
_DRAIN_SECONDS = 120.0


class VLLMBackend:
    """A truncated checkpoint in vLLM that pools in its workers.

    Attributes:
        layers: residual layers that are read; `l` is the stream after `l` blocks, 0 the embedding output.
        width: D.
        compute_dtype: dtype of the forward pass.
        device: where it runs.
        token_budget: tokens per step of the engine.
        out_of_memory: always 0: vLLM makes room by itself, by preempting sequences.
        bytes_out: bytes that have left the workers.
    """

    out_of_memory = 0

    def __init__(
        self,
        engine: Engine,
        layers: tuple[int, ...],
        config: Any,
        *,
        dtype: str,
        sides: bool,
        longest: int,
        compute_dtype: str,
        meter: CostMeter | None = None,
    ) -> None:
        self.layers = layers
        self.width = int(config.hidden_size)
        self.compute_dtype = compute_dtype
        self.device = engine.device
        self.token_budget = int(engine.config.scheduler_config.max_num_batched_tokens)
        self.bytes_out = 0
        self._engine, self._config, self._meter = engine, config, meter
        self._dtype, self._sides, self._longest = dtype, sides, longest
        self._shape = ModelShape.from_config(config)

    @classmethod
    def load(
        cls,
        model: str | Path,
        layers: Sequence[int],
        *,
        store_dtype: str,
        sides: bool,
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        token_budget: int | None = None,
        fingerprint: str,
        options: VLLMOptions | None = None,
        meter: CostMeter | None = None,
        progress: Progress = NULL_PROGRESS,
    ) -> VLLMBackend:
        """Start vLLM on the first `max(layers)` blocks of a checkpoint.

        Args:
            model: checkpoint directory or hub id.
            layers: residual layers to read, each from 0 to the number of blocks.
            store_dtype: dtype of the store that the rows are for.
            sides: rows also hold the means of both sides.
            dtype: dtype of the forward pass, "auto" for the checkpoint's own.
            device: "auto", or what the installed vLLM runs on.
            max_length: longest sequence that will come, in tokens; None takes the model's context.
            token_budget: tokens per step of the engine; None for vLLM's default.
            fingerprint: of the weights; the truncated checkpoint is cached under it.
            options: how vLLM is run.
            meter: counts tokens and operations.
            progress: hears of the truncation.

        Raises:
            MissingDependencyError: vLLM is not installed.
            LayerError: a layer is outside the model.
            UnsupportedModelError: vLLM does not give out the hidden states of this architecture.
            ConfigError: an option cannot be used, or the cache cannot hold one sequence.
            EngineError: vLLM does not start.
        """
        require_vllm(PURPOSE)
        from pairtrace.engine.vllm.connector import pooling_arguments

        options = options or VLLMOptions()
        path = resolve_checkpoint(model)
        config = load_config(path)
        wanted = tuple(sorted(set(layers)))
        check_layers(wanted, config)
        family_of(config, max_length)
        family = vllm_family(config)
        longest = max_length or int(config.max_position_embeddings)
        compute_dtype = str(resolve_dtype(dtype, config)).removeprefix("torch.")
        require_cache(config, wanted, longest, compute_dtype, options)
        engine = Engine(
            cached_truncation(str(path), wanted[-1], fingerprint, progress),
            purpose=PURPOSE,
            dtype=compute_dtype,
            max_model_len=longest + 1,
            options=options,
            device=device,
            skip_tokenizer_init=True,
            # Prompts are all there is: graphs and compilation would cost minutes and speed up decoding.
            enforce_eager=True,
            **({} if token_budget is None else {"max_num_batched_tokens": token_budget}),
            **pooling_arguments(wanted, lookup=family.lookup, dtype=wire_dtype(store_dtype), sides=sides),
        )
        try:
            engine.call("pairtrace_prepare")
        except EngineError:
            engine.close()
            raise
        config.num_hidden_layers = max(1, wanted[-1])
        return cls(
            engine,
            wanted,
            config,
            dtype=store_dtype,
            sides=sides,
            longest=longest,
            compute_dtype=compute_dtype,
            meter=meter,
        )

    def reduce(
        self, pairs: Sequence[RenderedPair], *, dtype: str, sides: bool, on_pack: OnPack | None = None
    ) -> Reduced:
        """Run both sides of every pair and return the rows of a store, in order.

        Args:
            pairs: n rendered pairs.
            dtype, sides: as given to `load`.
            on_pack: called with (1, tokens computed) when both sides of a pair have ended.

        Raises:
            ModelError: a token is outside the model's embedding.
            ConfigError: a sequence is longer than the engine was made for.
            EngineError: the engine died.
        """
        assert (dtype, sides) == (self._dtype, self._sides), "the workers cast to the dtype they were started with"
        check_ids(pairs, int(self._config.vocab_size))
        requests = self._requests(pairs)
        open_sides = [2] * len(pairs)
        tokens = [0] * len(pairs)

        def on_finished(position: int, output: Any) -> None:
            pair = position // 2
            open_sides[pair] -= 1
            length, cached = len(output.prompt_token_ids), int(output.num_cached_tokens or 0)
            tokens[pair] += length - cached
            if self._meter is not None:
                attended = causal(length) - causal(cached)
                flops = self._shape.forward_flops(length - cached, attended, self._shape.blocks)
                self._meter.add(tokens=length - cached, flops=flops)
            if not open_sides[pair] and on_pack is not None:
                on_pack(1, tokens[pair])

        self._engine.run(requests, on_finished)
        return self._collect(len(pairs))

    def close(self) -> None:
        """End the engine."""
        if self._meter is not None:
            self._meter.extra["bytes_from_workers"] = self.bytes_out
        self._engine.close()

    def _requests(self, pairs: Sequence[RenderedPair]) -> list[EngineRequest]:
        from vllm import SamplingParams

        from pairtrace.engine.vllm.connector import span_arguments

        requests = []
        for number, pair in enumerate(pairs):
            sides = ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start))
            for side, (ids, start) in enumerate(sides):
                if len(ids) > self._longest:
                    raise ConfigError(
                        f"row {pair.row} has {len(ids)} tokens, but the engine was started for at most {self._longest} "
                        "(the model's context); give --max-length"
                    )
                params = SamplingParams(
                    max_tokens=1, temperature=0.0, detokenize=False, extra_args=span_arguments(number, side, start)
                )
                # Both sides in the same engine, one after the other: the second finds the prompt in the cache.
                requests.append(EngineRequest(ids.tolist(), params, replica=number))
        return requests

    def _collect(self, count: int) -> Reduced:
        """Wait for the rows of all pairs: the engine reports a sequence one step before its worker has pooled it."""
        shape = (count, len(self.layers), self.width)
        array = np.uint16 if self._dtype == "bfloat16" else np.dtype(wire_dtype(self._dtype))
        kept = [np.zeros(shape, array) for _ in range(3 if self._sides else 1)]
        norm, checks = np.zeros(shape[:2], np.float32), np.zeros((count, 3), np.float32)
        missing, deadline = set(range(count)), time.monotonic() + _DRAIN_SECONDS
        while missing:
            taken = [batch for worker in self._engine.call("pairtrace_take") for batch in worker]
            for numbers, packed in taken:
                self.bytes_out += len(packed)
                rows = unpack_rows(packed, len(numbers), len(self.layers), self.width, self._dtype, self._sides)
                norm[numbers], checks[numbers] = rows.norm, rows.checks
                for values, found in zip(kept, rows.kept, strict=True):
                    values[numbers] = found
                missing -= set(numbers)
            if taken:
                deadline = time.monotonic() + _DRAIN_SECONDS
            elif time.monotonic() > deadline:
                raise EngineError(f"vLLM ran {count} pairs, but {len(missing)} of their rows never came")
            elif missing:
                time.sleep(0.005)
        finite = checks[:, 1:] > 0
        problems = problems_of(checks[:, 0], finite[:, 0], finite[:, 1], self._dtype)
        chosen, rejected = kept[1:] if self._sides else (None, None)
        return Reduced(diff=kept[0], norm=norm, chosen=chosen, rejected=rejected, problems=problems)

    def __enter__(self) -> VLLMBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
