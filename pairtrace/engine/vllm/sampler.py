"""Sampling responses through vLLM: all requests in one continuous batch, each with its own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pairtrace.engine.checkpoint import load_config, resolve_checkpoint, resolve_dtype
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.sampling import Request, Sampled, decode
from pairtrace.engine.vllm.adapters import Adapter
from pairtrace.engine.vllm.engine import Engine, EngineRequest
from pairtrace.engine.vllm.installed import require_vllm
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError

PURPOSE = "sampling with --backend vllm"
# Tokens of a forward pass on a CPU, unless a sequence is longer.
_CPU_STEP = 4096
# Arguments of `vllm.LLM` that have it split prompts.
_SPLITTING = ("enable_chunked_prefill", "long_prefill_token_threshold", "max_num_scheduled_tokens")


class VLLMSampler:
    """A checkpoint that answers through vLLM; the engine is started by the first question.

    Args:
        encoder: of the checkpoint.
        dtype: of the forward pass, "auto" for the checkpoint's own.
        device: "auto", or what the installed vLLM runs on.
        adapters: that requests may name.
        options: how vLLM is run.

    Attributes:
        config: transformers configuration of the checkpoint.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ConfigError: its version is not supported.
        ModelError: the checkpoint is missing or damaged.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        dtype: str = "auto",
        device: str = "auto",
        adapters: Sequence[Adapter] = (),
        options: VLLMOptions | None = None,
    ) -> None:
        require_vllm(PURPOSE)
        self._path = resolve_checkpoint(encoder.model)
        self.config = load_config(self._path)
        self._encoder, self._device = encoder, device
        self._dtype = str(resolve_dtype(dtype, self.config)).removeprefix("torch.")
        self._adapters = tuple(adapters)
        self._options = options or VLLMOptions()
        self._engine: Engine | None = None
        self._longest = 0

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
            requests: what to answer.
            temperature: 0 takes the most likely token.
            max_new_tokens: longest response, in tokens.
            batch_size: finished responses per call of `on_batch`; vLLM fills its forward passes by itself.
            on_batch: called with (position in `requests`, response) of each, as they finish.

        Returns:
            The responses in the order of `requests`.

        Raises:
            ConfigError: vLLM refuses a request, or does not run on the device.
            EngineError: vLLM does not start, or died.
        """
        if not requests:
            return []
        engine = self._started(max(len(request.prompt) for request in requests) + max_new_tokens)
        results: dict[int, Sampled] = {}
        finished: list[tuple[int, Sampled]] = []

        def hand_over() -> None:
            if finished and on_batch is not None:
                on_batch(list(finished))
            finished.clear()

        def on_finished(position: int, output: Any) -> None:
            generated = list(output.outputs[0].token_ids)
            results[position] = decode(self._encoder.tokenizer, generated, self._encoder.end_tokens)
            finished.append((position, results[position]))
            if len(finished) >= batch_size:
                hand_over()

        try:
            for places in _batches(requests, engine.device):
                engine.run(
                    [self._request(requests[place], temperature, max_new_tokens) for place in places],
                    lambda position, output, places=places: on_finished(places[position], output),  # type: ignore[misc]
                )
        finally:
            hand_over()  # also after an error: what was answered is kept
        return [results[position] for position in range(len(requests))]

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _request(self, request: Request, temperature: float, max_new_tokens: int) -> EngineRequest:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        lora = None
        if request.adapter is not None:
            paths = [str(adapter.path) for adapter in self._adapters]
            number = paths.index(request.adapter) + 1
            lora = LoRARequest(f"adapter-{number}", number, request.adapter)
        params = SamplingParams(
            temperature=temperature,
            seed=request.seed if temperature > 0 else None,
            max_tokens=max_new_tokens,
            # Exactly the encoder's end tokens; vLLM would add some of its own.
            stop_token_ids=list(self._encoder.end_tokens),
            ignore_eos=True,
            detokenize=False,
        )
        # Equal prompts go to the same engine, which computes them once.
        return EngineRequest(list(request.prompt), params, replica=hash(tuple(request.prompt)), lora=lora)

    def _started(self, longest: int) -> Engine:
        """The engine; one that was started for shorter sequences is replaced."""
        if self._engine is not None and longest <= self._longest:
            return self._engine
        self.close()
        lora: dict[str, Any] = {}
        if self._adapters:
            room = max(adapter.room for adapter in self._adapters)
            lora = {"enable_lora": True, "max_lora_rank": room, "max_loras": len(self._adapters)}
        engine = Engine(
            Path(self._path),
            purpose=PURPOSE,
            dtype=self._dtype,
            max_model_len=longest,
            options=self._options,
            device=self._device,
            skip_tokenizer_init=True,
            **_whole_prompts(self._options, longest),
            **lora,
        )
        self._engine, self._longest = engine, longest
        return engine


def _whole_prompts(options: VLLMOptions, longest: int) -> dict[str, Any]:
    """Settings that keep a prompt in one forward pass on a CPU.

    Where a step computes a part of a prompt, vLLM 0.32 turns the random numbers of its request back by four, which a
    CPU's generator cannot do: the engine dies. A preempted request counts as a prompt again, so `longest` has to fit.

    Raises:
        ConfigError: the user's options split prompts on a CPU.
    """
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return {}
    splitting = [name for name in _SPLITTING if options.engine.get(name)]
    if splitting:
        raise ConfigError(
            f"--engine-option {splitting[0]}={options.engine[splitting[0]]}: on a CPU vLLM cannot split prompts while "
            "it samples with seeds; leave the option out"
        )
    step = options.engine.get("max_num_batched_tokens", _CPU_STEP)
    if step < longest:
        if "max_num_batched_tokens" in options.engine:
            raise ConfigError(
                f"--engine-option max_num_batched_tokens={step}: on a CPU a sequence of {longest} tokens has to fit "
                "into one step; give as many, or leave the option out"
            )
        step = longest
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": step}


def _batches(requests: Sequence[Request], device: str) -> list[list[int]]:
    """Positions of the requests that may be in one batch: all of them, but on a CPU one adapter at a time.

    On a CPU vLLM 0.32 applies an adapter also to the requests without one that share a step with it: it indexes the
    adapters' weights with -1, which is the last.
    """
    if device != "cpu":
        return [list(range(len(requests)))]
    groups: dict[str | None, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.adapter, []).append(place)
    return list(groups.values())
