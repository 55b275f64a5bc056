"""Two clients of vLLM that make the same rows: one of its example connector, and pairtrace's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.vllm.backend import VLLMBackend


class Stock:
    """What a client of the example connector does."""

    def __init__(self, model: Path, layer: int, dtype: str, longest: int, cache_gib: float, folder: Path) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        cpu = current_platform.device_type == "cpu"
        connector = (
            {"kv_connector": "StockOnCPU", "kv_connector_module_path": "stock_connector"}
            if cpu
            else {"kv_connector": "ExampleHiddenStatesConnector"}
        )
        self.bytes_out = 0
        self._llm = LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=longest + 1,
            enforce_eager=True,
            skip_tokenizer_init=True,
            **({"block_size": 32, "kv_cache_memory_bytes": int(cache_gib * 2**30)} if cpu else {}),
            speculative_config={
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layer]}},
            },
            kv_transfer_config={
                **connector,
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": str(folder)},
            },
        )

    def run(self, pairs: list[RenderedPair]) -> np.ndarray:
        from vllm import SamplingParams
        from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
            cleanup_hidden_states,
            load_hidden_states,
        )

        sides = [side for pair in pairs for side in ((pair.chosen_ids, pair.chosen_start), _rejected(pair))]
        prompts = [{"prompt_token_ids": ids.tolist()} for ids, _ in sides]
        outputs = self._llm.generate(
            prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False
        )
        self.bytes_out, means = 0, []
        for output, (_, start) in zip(outputs, sides, strict=True):
            path = output.kv_transfer_params["hidden_states_path"]
            states = load_hidden_states(path)["hidden_states"]
            self.bytes_out += Path(path).stat().st_size
            means.append(states[start:, 0].float().mean(dim=0))
            cleanup_hidden_states(path)
        both = torch.stack(means)
        return (both[0::2] - both[1::2]).numpy()

    def forget(self) -> None:
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Ours:
    """pairtrace's back end for a store of float16 differences."""

    def __init__(self, backend: VLLMBackend) -> None:
        self._backend = backend
        self.bytes_out = 0

    def run(self, pairs: list[RenderedPair]) -> np.ndarray:
        before = self._backend.bytes_out
        reduced = self._backend.reduce(pairs, dtype="float16", sides=False)
        self.bytes_out = self._backend.bytes_out - before
        return reduced.diff[:, 0].astype(np.float32)

    def forget(self) -> None:
        for model in self._backend._engine._models:
            model.reset_prefix_cache()

    def close(self) -> None:
        self._backend.close()


def _rejected(pair: RenderedPair) -> tuple[np.ndarray, int]:
    return pair.rejected_ids, pair.rejected_start
