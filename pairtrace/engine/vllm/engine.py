"""One or several vLLM engines in processes of their own, behind one queue of requests."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from pairtrace.engine.vllm.installed import require_vllm
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.engine.vllm.orphans import OrphanWatch
from pairtrace.errors import ConfigError, EngineError, PairtraceError

logger = logging.getLogger(__name__)

_CPU_CACHE_GIB = 4.0
# Prefix caching shares whole blocks; vLLM's kernels on CPUs want multiples of 32.
_CPU_BLOCK = 32


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run.

    Attributes:
        prompt: token ids.
        params: `vllm.SamplingParams`.
        replica: requests with the same number go to the same engine.
        lora: `vllm.lora.request.LoRARequest`, or None.
    """

    prompt: list[int]
    params: Any
    replica: int = 0
    lora: Any = None


class Engine:
    """Running engines; a context manager that ends their processes.

    Args:
        model: checkpoint directory.
        purpose: what they are for, named in errors.
        dtype: of the forward pass.
        max_model_len: longest sequence in tokens, with what is generated.
        options: how to run.
        device: "auto", or what the installed vLLM runs on.
        **arguments: further arguments of `vllm.LLM`.

    Attributes:
        device: "cpu", "cuda", ...

    Raises:
        MissingDependencyError: vLLM is not installed.
        ConfigError: its version is not supported, it runs on another device, or the devices do not suffice.
        EngineError: an engine does not start.
    """

    def __init__(
        self,
        model: Path,
        *,
        purpose: str,
        dtype: str,
        max_model_len: int,
        options: VLLMOptions,
        device: str = "auto",
        **arguments: Any,
    ) -> None:
        version = require_vllm(purpose)
        from vllm import LLM
        from vllm.platforms import current_platform

        from pairtrace.engine.vllm.connector import end_waits_of_the_dead, engine_processes

        _require_arguments(options)
        self.device = str(current_platform.device_type)
        if device not in ("auto", self.device):
            raise ConfigError(f"--device is {device!r}, but the installed vLLM runs on {self.device!r}")
        cpu = self.device == "cpu"
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "tensor_parallel_size": options.tensor_parallel,
            # Weights are never unpickled, and nothing of the checkpoint's own shapes a distribution.
            "load_format": "safetensors",
            "trust_remote_code": False,
            "generation_config": "vllm",
            "disable_log_stats": True,
            # Compiling for a CPU takes minutes, and its kernels are no faster.
            **({"block_size": _CPU_BLOCK, "enforce_eager": True} if cpu else {}),
            **arguments,
            **options.engine,
        }
        cache = options.cache_gib if options.cache_gib is not None else _CPU_CACHE_GIB if cpu else None
        if cache is not None:
            settings["kv_cache_memory_bytes"] = int(cache * 2**30)
        self._purpose = purpose
        self._engines: list[Any] = []
        self._models: list[Any] = []
        self._watches: list[OrphanWatch] = []
        self._asked = 0
        logger.info("starting vLLM %s for %s, which takes a while", version, purpose)
        try:
            for replica in range(options.data_parallel):
                with _devices_of(replica, options, self.device), _interruptible():
                    self._models.append(LLM(**settings))
                self._engines.append(self._models[-1].llm_engine)
                end_waits_of_the_dead(self._models[-1])
                self._watches.append(OrphanWatch(engine_processes(self._models[-1])))
        except (PairtraceError, KeyboardInterrupt, SystemExit):
            self.close()
            raise
        except Exception as error:  # vLLM checks some arguments by failing on them, with errors of any kind
            self.close()
            raise EngineError(
                f"vLLM does not start for {purpose}: {str(error).strip()}; what its processes said is above. If memory "
                "for the cache is short, lower --max-length or raise --cache-gib; another --backend does without vLLM"
            ) from error

    @property
    def config(self) -> Any:
        """The engines' `VllmConfig`."""
        return self._engines[0].vllm_config

    def run(
        self,
        requests: Sequence[EngineRequest],
        on_finished: Callable[[int, Any], None],
        more: Callable[[], Sequence[EngineRequest]] = tuple,
    ) -> None:
        """Run requests to their end, all in one continuous batch.

        Args:
            requests: what to run; they begin in this order.
            on_finished: called with (position, `vllm.RequestOutput`) when a request has ended.
            more: called between steps for requests that have come meanwhile; their positions follow on.

        Raises:
            EngineError: an engine died.
            ConfigError: vLLM refuses a request.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        first = self._asked
        try:
            self._add(requests)
            while busy := [engine for engine in self._engines if engine.has_unfinished_requests()]:
                for engine in busy:
                    for output in engine.step():
                        if output.finished:
                            on_finished(int(output.request_id) - first, output)
                self._add(more())
        except EngineDeadError as error:
            raise self._died() from error

    def _add(self, requests: Sequence[EngineRequest]) -> None:
        from vllm.exceptions import VLLMClientError

        for request in requests:
            engine = self._engines[request.replica % len(self._engines)]
            prompt = {"prompt_token_ids": request.prompt}
            try:
                engine.add_request(str(self._asked), prompt, request.params, lora_request=request.lora)
            except (VLLMClientError, ValueError) as error:
                raise ConfigError(f"vLLM refuses a sequence of {len(request.prompt)} tokens: {error}") from error
            self._asked += 1

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of the worker extension returns on every worker of every engine, a step later.

        Raises:
            EngineError: an engine died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        from pairtrace.engine.vllm.connector import step_here

        try:
            for model in self._models:
                step_here(model)
            return [found for model in self._models for found in model.collective_rpc(method, args=arguments)]
        except EngineDeadError as error:
            raise self._died() from error

    def close(self) -> None:
        """End the engines' processes."""
        for engine in self._engines:
            engine.engine_core.shutdown()
        for watch in self._watches:
            watch.stop()
        self._watches.clear()
        self._engines.clear()
        self._models.clear()

    def _died(self) -> EngineError:
        return EngineError(
            f"a process of vLLM died during {self._purpose} (what it said is above; often memory ran out). What is "
            "finished is kept: run the same command again to go on"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_arguments(options: VLLMOptions) -> None:
    """ConfigError for an engine option that vLLM does not know."""
    from vllm.engine.arg_utils import EngineArgs

    unknown = sorted(set(options.engine) - {field.name for field in fields(EngineArgs)})
    if unknown:
        raise ConfigError(f"--engine-option names {', '.join(unknown)}, which this vLLM does not know")


class _Interrupted(BaseException):
    """What SIGINT raises while an engine starts."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the start of an engine.

    vLLM 0.32 swallows a KeyboardInterrupt there (`zmq_socket_ctx`), and then waits ten minutes for an engine that the
    same Ctrl-C has ended.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise _Interrupted

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _devices_of(replica: int, options: VLLMOptions, device: str) -> Iterator[None]:
    """Let the processes that are started inside see the devices of one copy of the model only.

    Raises:
        ConfigError: there are fewer devices than needed.
    """
    from vllm.platforms import current_platform

    if options.data_parallel == 1 or device == "cpu":
        yield
        return
    variable = str(current_platform.device_control_env_var)
    before = os.environ.get(variable)
    visible = before.split(",") if before else [str(number) for number in range(current_platform.device_count())]
    each = options.tensor_parallel
    if len(visible) < options.data_parallel * each:
        raise ConfigError(
            f"--data-parallel {options.data_parallel} times --tensor-parallel {each} needs "
            f"{options.data_parallel * each} devices, but {len(visible)} are there"
        )
    os.environ[variable] = ",".join(visible[replica * each : (replica + 1) * each])
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
