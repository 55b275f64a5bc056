"""What the tests on a real vLLM share: tiny models that its kernels take, and small engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pairtrace.engine.checkpoint import load_tokenizer, model_fingerprint
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendering import RenderedPair, Renderer
from pairtrace.engine.vllm.backend import VLLMBackend
from pairtrace.engine.vllm.installed import installed_version
from pairtrace.engine.vllm.options import VLLMOptions
from tests.engine.test_equivalence import synthetic
from tests.models import HH, SHAREGPT, make_model, make_tokenizer

needs_vllm = pytest.mark.skipif(installed_version() is None, reason="needs vLLM, which has its own run: make test-vllm")

MAX_LENGTH = 220
# vLLM's attention on CPUs wants heads of 32 and more.
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# Small steps: prompts come in several pieces, and engines start quickly.
SMALL: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 256}
CACHE_GIB = 0.25


def vllm_model(kind: str, path: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    make_tokenizer(path)
    sizes = {**SIZES, "use_sliding_window": False} if kind == "qwen2" else SIZES
    return make_model(kind, path, dtype=dtype, **{**sizes, **overrides})


def start(model: Path, layers: tuple[int, ...], **changes: Any) -> VLLMBackend:
    engine = {**SMALL, **changes.pop("engine", {})}
    options = {"cache_gib": CACHE_GIB, **changes.pop("options", {})}
    settings = {
        "store_dtype": "float32",
        "sides": True,
        "max_length": MAX_LENGTH,
        "fingerprint": model_fingerprint(model),
        **changes,
    }
    return VLLMBackend.load(model, layers, options=VLLMOptions(engine=engine, **options), **settings)


def real_pairs(tokenizer: Path) -> list[RenderedPair]:
    """Rows of both shared files, long and short, some cut at the limit."""
    renderer = Renderer(load_tokenizer(tokenizer), max_length=MAX_LENGTH)
    rows = [*open_pairs(HH).read(0, 24), *open_pairs(SHAREGPT).read(0, 16)]
    good = [result for result in renderer.render(rows) if isinstance(result, RenderedPair)]
    assert len(good) >= 16
    return good


def odd_pairs() -> list[RenderedPair]:
    """Responses that share a beginning of several blocks, prefixes of each other, the same sequences twice, edges."""
    run = list(range(5, 205))
    return [
        synthetic(run, [*run[:150], 7, 8], 10),
        synthetic(run, [*run[:150], 7, 8], 10),  # identical requests
        synthetic([*run[:150], 7, 8], run, 10),  # the same sequences with their sides exchanged
        synthetic(run, run[:96], 33),  # one a prefix of the other, ending with a block
        synthetic(run[:64], run, 63),  # one token, at the end of a block
        synthetic(run[:65], run[:64], 63),  # the pooled part begins in a cached block
        synthetic([5, 9], [6, 9], 1),  # no shared prompt
        synthetic(run[20:60], run[10:70], 1),
    ]
