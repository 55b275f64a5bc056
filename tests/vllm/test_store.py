"""Stores through vLLM: the same rows as through transformers, resumed after the engine was killed, clear errors."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError, EngineError, LayerError, StoreMismatchError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from tests.engine.extraction import pair, write_rows
from tests.models import HH
from tests.vllm.engines import CACHE_GIB, SMALL, needs_vllm, vllm_model

pytestmark = [
    needs_vllm,
    pytest.mark.usefixtures("engines_in_processes"),
    pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data"),
]

ROWS = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_model("olmo2", tmp_path_factory.mktemp("m0"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRTRACE_CACHE", str(tmp_path / "cache"))


def config(model: Path, store: Path, **changes: Any) -> ExtractConfig:
    settings: dict[str, Any] = {
        "data": str(HH),
        "limit": ROWS,
        "max_length": 200,
        "layers": (0, 3),
        "shard_rows": 16,
        "fsync": False,
        "dtype": "float32",
        "backend": "vllm",
        "vllm": VLLMOptions(cache_gib=CACHE_GIB, engine=SMALL),
        **changes,
    }
    return ExtractConfig(model=str(model), store=str(store), **settings)


class KillsTheEngine:
    """A progress that ends the engine's processes once so many pairs are done."""

    def __init__(self, after: int) -> None:
        self.after, self.done = after, 0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.done = 0

    def advance(self, done: int, **figures: float) -> None:
        self.done += done
        if self.done >= self.after:
            self.after = 1 << 40
            for child in psutil.Process().children(recursive=True):
                if "EngineCore" in " ".join([child.name(), *child.cmdline()]):
                    os.kill(child.pid, signal.SIGKILL)

    def finish(self) -> None:
        pass


def test_a_killed_engine_leaves_a_sound_store_that_the_next_run_completes(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the rows are then those of the transformers back end, quarantined ones included."""
    data = tmp_path / "rows.jsonl"
    rows = [pair(f"Question {i}?", f"Answer {i} " + "word " * (i % 40), f"No {i}") for i in range(ROWS)]
    rows[5] = pair("Question?", "", "No.")
    rows[70] = pair("Question?", "Same.", "Same.")
    write_rows(data, rows)
    given = config(model, tmp_path / "acts.zarr", data=str(data), limit=None, sides=True)
    with pytest.raises(EngineError, match=r"died during extraction.*run the same command again"):
        extract(given, KillsTheEngine(after=40))
    unfinished = ActivationStore.open(given.store, allow_incomplete=True)
    kept = int((unfinished.status() == OK).sum())
    assert 0 < kept < ROWS - 2
    assert verify(given.store).problems == ()
    summary = extract(given)
    assert capfd.readouterr().out == "", "standard output belongs to the command's answer"
    assert summary.resumed >= kept and summary.resumed + summary.computed + 2 >= ROWS
    assert summary.ok == ROWS - 2
    assert verify(given.store).ok
    plain = config(model, tmp_path / "hf.zarr", data=str(data), limit=None, sides=True, backend="hf", vllm=None)
    extract(plain)
    found, wanted = ActivationStore.open(given.store), ActivationStore.open(plain.store)
    assert found.summary()["reasons"] == wanted.summary()["reasons"] != {}
    assert np.array_equal(found.status(), wanted.status())
    costs = [json.loads(line) for line in (tmp_path / "acts.costs.jsonl").read_text().splitlines()]
    assert costs[-1]["extra"]["bytes_from_workers"] == summary.computed * (3 * 2 * 64 * 4 + 2 * 4 + 3 * 4)
    for name in ("diff", "chosen", "rejected"):
        for layer in (0, 3):
            one, other = (store.take(layer, np.flatnonzero(found.status() == OK), name) for store in (found, wanted))
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    with pytest.raises(StoreMismatchError, match="backend is 'vllm', but 'hf' is needed"):
        extract(config(model, Path(given.store), data=str(data), limit=None, sides=True, backend="hf", vllm=None))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": (5,)}, LayerError, "layer 5 is outside this model"),
        ({"device": "cuda"}, ConfigError, "cuda"),
        ({"vllm": VLLMOptions(engine={"no_such": 1})}, ConfigError, "--engine-option names no_such"),
        ({"vllm": VLLMOptions(cache_gib=1e-5)}, ConfigError, "does not hold one sequence of 200 tokens"),
        # Enough by the count of bytes, but not for whole blocks of every layer.
        ({"vllm": VLLMOptions(cache_gib=2.5e-4)}, EngineError, "does not start.*raise --cache-gib"),
        (
            {"max_length": None, "limit": 2000, "vllm": VLLMOptions(cache_gib=CACHE_GIB)},
            ConfigError,
            "give --max-length",
        ),
    ],
)
def test_what_cannot_run_is_told(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    context = 128 if "limit" in changes else 4096
    model = vllm_model("llama", tmp_path / "model", max_position_embeddings=context)
    with pytest.raises(error, match=message):
        extract(config(model, tmp_path / "acts.zarr", **changes))
