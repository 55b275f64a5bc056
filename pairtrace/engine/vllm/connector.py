"""The part that runs inside vLLM: which sequence ends where, what is pooled when it does, and who tells of its death.

Everything here that vLLM does not document is listed with the test that notices a change (tests/vllm):

- `request_finished_all_groups` is called once per request, with the blocks of the whole sequence, also after a
  preemption; blocks stay as they are until `get_finished` names the request (test_pooling_hook).
- The hidden states lie in a cache of their own, [blocks, layers, tokens of a block, width], in the order of ascending
  layer numbers; number l is the stream after l blocks (test_extraction).
- Blocks that several sequences share hold the same hidden states for all of them (test_extraction).
- A worker extension reaches its connector through `get_kv_transfer_group`, and its model through
  `model_runner.get_model` (test_extraction).
- A call that waits for an engine takes its answer from `outputs_queue` or `utility_results` of the client, which knows
  the sentinels of its processes (test_store).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from pairtrace.engine.vllm.pair_pooler import PairPooler, Span

if TYPE_CHECKING:
    import torch

# Key of a request's own parameters, and of the connector's settings.
SPAN = "pairtrace_span"
DTYPE, SIDES, LOOKUP, READ = "pairtrace_dtype", "pairtrace_sides", "pairtrace_lookup", "pairtrace_read"


def pooling_arguments(layers: tuple[int, ...], *, lookup: bool, dtype: str, sides: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make it pool.

    Args:
        layers: residual layers, ascending.
        lookup: layer 0 is looked up in the embedding, because the model does not give it out.
        dtype: dtype of the rows.
        sides: rows also hold the means of both sides.
    """
    asked = [layer for layer in layers if layer > 0 or not lookup]
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            # vLLM insists on one, also when only a layer is wanted that is looked up.
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": asked or [1]}},
        },
        "kv_transfer_config": {
            "kv_connector": PoolingConnector.__name__,
            "kv_connector_module_path": __name__,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                DTYPE: dtype,
                SIDES: sides,
                LOOKUP: len(asked) < len(layers),
                READ: len(asked),
            },
        },
        "worker_extension_cls": f"{__name__}.{PoolingWorker.__name__}",
    }


def span_arguments(pair: int, side: int, start: int) -> dict[str, Any]:
    """`SamplingParams.extra_args` of one sequence; its pooled tokens begin at `start` and end with the prompt."""
    return {"kv_transfer_params": {SPAN: [pair, side, start]}}


@dataclass
class _Finished(KVConnectorMetadata):
    """From the scheduler to the worker: the sequences that ended since the last step."""

    spans: dict[str, Span] = field(default_factory=dict)


class PoolingConnector(KVConnectorBase_V1, SupportsHMA):
    """Pools the response of each finished sequence where its hidden states are.

    vLLM makes one in the scheduler, which learns of finished requests, and one in each worker, which has the cache.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = self._kv_transfer_config.kv_connector_extra_config
        self.lookup = bool(settings[LOOKUP])
        self._read = int(settings[READ])
        self._group = _hidden_state_group(kv_cache_config)
        self._finished: dict[str, Span] = {}
        self.pooler = PairPooler(settings[DTYPE], settings[SIDES])
        self.embed: Any = None
        self._cache: torch.Tensor | None = None
        self._pools = False
        self._done: set[str] = set()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str:
        """The states of one token in one piece: tokens before heads, which layers stand in for."""
        return "LBNHC"

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is ever loaded from outside."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is ever loaded from outside."""
        assert num_external_tokens == 0

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Only called for a single group of caches, which holds the hidden states then."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        """Remember where the sequence lies; True keeps its blocks until `get_finished` names it."""
        given = (request.kv_transfer_params or {}).get(SPAN)
        ids = request.prompt_token_ids
        # An aborted request has not computed its prompt, and has nothing to pool.
        if given is None or request.num_computed_tokens < len(ids):
            return False, None
        pair, side, start = given
        looked_up = tuple(ids[start:]) if self.lookup else ()
        self._finished[request.request_id] = Span(pair, side, start, len(ids), tuple(block_ids[self._group]), looked_up)
        return True, None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Hand the finished sequences to the workers, each once."""
        spans, self._finished = self._finished, {}
        return _Finished(spans)

    def get_finished_count(self) -> int:
        """Only one worker pools, so one word that a sequence is done is all there is."""
        return 1

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the cache of the hidden states among all."""
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        (name,) = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        self._cache = kv_caches[name][:, : self._read]
        # Hidden states are the same on every rank of a tensor-parallel group.
        self._pools = get_tensor_model_parallel_rank() == 0

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, None]:
        """Pool the sequences that ended before this step, and let go of their blocks.

        The copy of the rows is queued behind the pooling, which reads the blocks before any later step writes to them.
        """
        metadata = self._get_connector_metadata() if self.has_connector_metadata() else None
        if self._pools and isinstance(metadata, _Finished) and metadata.spans:
            assert self._cache is not None
            self.pooler.add(self._cache, list(metadata.spans.values()), self.embed if self.lookup else None)
            self._done |= metadata.spans.keys()
        done, self._done = self._done, set()
        return done or None, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is ever loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is ever loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """The hidden states stay in their cache until their sequence has ended."""

    def wait_for_save(self) -> None:
        """Nothing leaves in the middle of a step."""


def _hidden_state_group(kv_cache_config: Any) -> int:
    """Number of the group of caches that holds the hidden states; where all have pages of one size there is one."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) == 1:
        return 0
    found = [number for number, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    assert len(found) == 1, f"expected one group of caches for hidden states among {len(groups)}, found {found}"
    return found[0]


class PoolingWorker:
    """Methods that every worker of the engine gets; called through `LLM.collective_rpc`."""

    model_runner: Any

    def pairtrace_prepare(self) -> None:
        """Tell the connector how the model embeds its tokens."""
        get_kv_transfer_group().embed = self.model_runner.get_model().embed_input_ids

    def pairtrace_take(self) -> list[tuple[list[int], bytes]]:
        """The rows that are ready here."""
        rows: list[tuple[list[int], bytes]] = get_kv_transfer_group().pooler.take()
        return rows


def end_waits_of_the_dead(model: Any) -> None:
    """Have the calls that wait for an engine fail when its process dies; by themselves they would wait for ever.

    Args:
        model: `vllm.LLM`.
    """
    client = model.llm_engine.engine_core
    if isinstance(client, InprocClient):
        return
    manager = client.resources.engine_manager

    def watch() -> None:
        connection.wait(manager.sentinels())
        client.resources.engine_dead = True
        client.outputs_queue.put_nowait(EngineDeadError())
        for future in list(client.utility_results.values()):
            if not future.done():
                future.set_exception(EngineDeadError())

    threading.Thread(target=watch, name="pairtrace-engine-watch", daemon=True).start()


def engine_processes(model: Any) -> list[int]:
    """The numbers of the processes of an engine, whose end ends their workers; none where it runs in this one.

    Args:
        model: `vllm.LLM`.
    """
    client = model.llm_engine.engine_core
    if isinstance(client, InprocClient):
        return []
    return [process.pid for process in client.resources.engine_manager.processes]


def step_here(model: Any) -> None:
    """Let an engine that runs in this process take a step; one in a process of its own goes on by itself.

    Args:
        model: `vllm.LLM`.
    """
    client = model.llm_engine.engine_core
    if isinstance(client, InprocClient):  # with VLLM_ENABLE_V1_MULTIPROCESSING=0
        client.get_output()
