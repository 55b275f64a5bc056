"""What the connector takes for granted about vLLM, on the real engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pairtrace.engine.backend import HFBackend
from tests.engine.test_equivalence import relative_error, synthetic
from tests.vllm.engines import MAX_LENGTH, needs_vllm, start, vllm_model

pytestmark = needs_vllm

BLOCK = 32


def test_each_request_ends_once_with_all_its_blocks_also_after_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache for a few sequences, and prompts in small pieces: many are under way at once, and some have to go."""
    from pairtrace.engine.vllm import connector
    from tests.vllm import recording

    original, log = connector.pooling_arguments, tmp_path / "log.jsonl"
    monkeypatch.setenv(recording.LOG, str(log))
    monkeypatch.setenv("PAIRTRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(connector, "pooling_arguments", lambda *a, **k: recording.recorded(original(*a, **k)))
    model = vllm_model("llama", tmp_path / "model")
    random = np.random.default_rng(0)
    pairs = [
        synthetic(*(random.integers(5, 590, 200).tolist() for _ in range(2)), chosen_start=1 + 7 * number)
        for number in range(24)
    ]
    engine = {"long_prefill_token_threshold": 32, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    # Of 4 blocks' keys and values and one layer's states a token needs 4 * (4 * 2 * 32 + 64) bytes.
    few = 3.2 * (MAX_LENGTH + 1 + BLOCK) * 4 * (4 * 2 * 32 + 64) / 2**30
    with start(model, (4,), engine=engine, options={"cache_gib": few}) as backend:
        reduced = backend.reduce(pairs, dtype="float32", sides=True)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    finished = [entry for entry in entries if entry["event"] == "finished"]
    assert Counter(entry["request"] for entry in finished).most_common(1)[0][1] == 1
    assert len(finished) == 2 * len(pairs) and all(entry["keeps"] for entry in finished)
    assert all(entry["blocks"] >= -(-entry["tokens"] // BLOCK) for entry in finished)
    assert sum(entry["preemptions"] for entry in finished) > 0, "the cache was not small enough"
    wanted = HFBackend.load(model, (4,), device="cpu", max_length=MAX_LENGTH).pool(pairs)
    assert reduced.chosen is not None and reduced.rejected is not None and reduced.problems == {}
    found, expected = (
        np.stack(sides, axis=1) for sides in ((reduced.chosen, reduced.rejected), (wanted.chosen, wanted.rejected))
    )
    assert relative_error(found, expected) <= 1e-5
