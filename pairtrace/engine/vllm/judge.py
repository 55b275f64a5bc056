"""A judge without a server: questions of the OpenAI interface, answered by vLLM in processes of this run.

Any number of threads may ask; one more thread feeds the engine, so that all open questions are one continuous batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pairtrace.engine.baselines.judge_client import REQUEST_REFUSED
from pairtrace.engine.baselines.judge_request import Verdict, read_verdict
from pairtrace.engine.checkpoint import load_config, resolve_checkpoint, resolve_dtype
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.sampling import decode
from pairtrace.engine.vllm.engine import Engine, EngineRequest
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError, DataError

Answer = TypeVar("Answer")

PURPOSE = "judging with --backend vllm"
# Questions hold a conversation and a response; a longer context than this only costs cache.
_LONGEST_CONTEXT = 16384
_KNOWN = frozenset({"model", "messages", "temperature", "max_tokens", "response_format", "seed", "top_p"})
_Question = tuple[EngineRequest, "Future[dict[str, Any]]"]


class VLLMJudge:
    """Answers the questions that `JudgeClient` would send to a server.

    Where the chat template knows no system turn, what it says begins the first turn of the user.

    Args:
        model: checkpoint directory or hub id, with a chat template.
        options: how vLLM is run.

    Attributes:
        address: what it is, for messages.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ModelError: the checkpoint is missing or damaged, or has no chat template.
        ConfigError: its chat template refuses a question.
        EngineError: vLLM does not start.
    """

    def __init__(self, model: str, options: VLLMOptions | None = None) -> None:
        self.address = f"{model} in vLLM"
        encoder = PromptEncoder.load(model)
        self._context = min(encoder.context or _LONGEST_CONTEXT, _LONGEST_CONTEXT)
        # A question that is too long concerns itself alone: it is refused here, not by the encoder.
        self._encoder = replace(encoder, context=None)
        question, self._system_turn = {"role": "user", "content": "?"}, True
        try:
            self._encoded([{"role": "system", "content": "!"}, question])
        except ConfigError:
            self._encoded([question])
            self._system_turn = False
        path = resolve_checkpoint(model)
        self._engine = Engine(
            Path(path),
            purpose=PURPOSE,
            dtype=str(resolve_dtype("auto", load_config(path))).removeprefix("torch."),
            max_model_len=self._context,
            options=options or VLLMOptions(),
            # White space that a schema allows anywhere a weak model may write for ever. What a request says of it vLLM
            # ignores, and only a named library of grammars takes it for the whole engine.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        )
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._answer_all, name="pairtrace-judge-engine", daemon=True)
        self._thread.start()

    def ask(self, body: dict[str, Any]) -> Verdict:
        """One question about a response; the verdict, or its absence with the reason.

        Raises:
            ConfigError: the request holds a setting that is not known or not possible here.
            EngineError: the engine died.
        """
        found = self.answer(body, read_verdict)
        return Verdict(None, found) if isinstance(found, str) else found

    def answer(self, body: dict[str, Any], read: Callable[[Any], Answer]) -> Answer | str:
        """One question of any kind.

        Args:
            body: the request, as for `/chat/completions`.
            read: makes something of the answer, which has the form of one of `/chat/completions`; its result is no
                string.

        Returns:
            What `read` made of the answer; `REQUEST_REFUSED` where the question does not fit into the context.

        Raises:
            ConfigError: the request holds a setting that is not known or not possible here.
            EngineError: the engine died.
        """
        request = self._request(body)
        if request is None or self._stopped.is_set():
            return REQUEST_REFUSED
        future: Future[dict[str, Any]] = Future()
        self._questions.put((request, future))
        return read(future.result())

    def stop(self) -> None:
        """Take no further questions; those that were asked are answered."""
        self._stopped.set()

    def close(self) -> None:
        """End the engine, when what was asked is answered."""
        self.stop()
        self._questions.put(None)
        self._thread.join()
        self._engine.close()

    def _encoded(self, messages: list[dict[str, Any]]) -> list[int]:
        try:
            return self._encoder.encode("the question", messages)
        except DataError as error:
            raise ConfigError(f"{self.address} cannot be asked: {error}") from error

    def _request(self, body: dict[str, Any]) -> EngineRequest | None:
        """None for a question that does not fit."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import StructuredOutputsParams

        unknown = sorted(body.keys() - _KNOWN)
        if unknown:
            raise ConfigError(
                f"the request of the judge holds {', '.join(unknown)}, which --backend vllm does not know; known are "
                f"{', '.join(sorted(_KNOWN))}"
            )
        prompt = self._encoded(body["messages"] if self._system_turn else _without_system_turn(body["messages"]))
        try:
            # As for a server: without a limit an answer may fill the context.
            room = int(body.get("max_tokens", max(1, self._context - len(prompt))))
            if len(prompt) + room > self._context:
                return None
            schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
            structure = None if schema is None else StructuredOutputsParams(json=schema)
            params = SamplingParams(
                temperature=float(body.get("temperature", 0.0)),
                top_p=float(body.get("top_p", 1.0)),
                seed=body.get("seed"),
                max_tokens=room,
                stop_token_ids=list(self._encoder.end_tokens),
                detokenize=False,
                structured_outputs=structure,
            )
        except (VLLMClientError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"the request of the judge holds a setting that vLLM refuses: {error}") from error
        if params.temperature > 0 and params.seed is not None and self._engine.device == "cpu":
            raise ConfigError(
                "the request of the judge holds a seed and a temperature: on a CPU vLLM dies where a step computes a "
                "part of a prompt that is sampled with a seed; leave the seed out"
            )
        return EngineRequest(prompt, params, replica=hash(tuple(prompt)))

    def _answer_all(self) -> None:
        """Until `None` comes: run what is asked, and what is asked meanwhile, in one batch."""
        going = True
        while going:
            first = self._questions.get()
            if first is None:
                return
            batch = _Batch(self._questions, first)
            try:
                self._engine.run(
                    [first[0]],
                    lambda position, output, batch=batch: batch.resolve(position, self._read(output)),  # type: ignore[misc]
                    more=batch.more,
                )
            except Exception as error:  # noqa: BLE001 - raised by those who wait, who else would wait for ever
                batch.fail(error)
            going = not batch.ended

    def _read(self, output: Any) -> dict[str, Any]:
        """An output of vLLM in the form of an answer of `/chat/completions`."""
        (completion,) = output.outputs
        sampled = decode(self._encoder.tokenizer, list(completion.token_ids), self._encoder.end_tokens)
        return {
            "choices": [{"message": {"content": sampled.response}, "finish_reason": completion.finish_reason}],
            "usage": {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": sampled.tokens},
        }


def _without_system_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the system says at the beginning of what the user says."""
    said = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    user, *others = [message for message in messages if message["role"] != "system"]
    return [{**user, "content": f"{said}\n\n{user['content']}"}, *others] if said else messages


class _Batch:
    """The questions of one run of the engine, in the order in which it got them."""

    def __init__(self, questions: queue.SimpleQueue[_Question | None], first: _Question) -> None:
        self._questions = questions
        self._futures = [first[1]]
        self.ended = False

    def more(self) -> list[EngineRequest]:
        """What was asked meanwhile."""
        found = []
        while not self.ended:
            try:
                asked = self._questions.get_nowait()
            except queue.Empty:
                break
            if asked is None:
                self.ended = True
            else:
                found.append(asked[0])
                self._futures.append(asked[1])
        return found

    def resolve(self, position: int, answer: dict[str, Any]) -> None:
        self._futures[position].set_result(answer)

    def fail(self, error: Exception) -> None:
        """The engine is gone: whoever waits is told."""
        self.more()
        for future in self._futures:
            if not future.done():
                future.set_exception(error)
