"""The extraction stage end to end: every row accounted for, resumable, reusable, right."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine import shards
from pairtrace.engine.backend import HFBackend, Pooled
from pairtrace.engine.channel import Channel, run_thread
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.extract import ExtractConfig, default_shard_rows, extract
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendering import RenderedPair, Renderer
from pairtrace.errors import (
    ConfigError,
    DataError,
    LayerError,
    ModelError,
    StoreLockedError,
    StoreMismatchError,
    StoreWriteError,
)
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.engine.test_equivalence import plain_forward, relative_error
from tests.models import HH, SHAREGPT, make_model, make_tokenizer

pytestmark = pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m0")
    make_tokenizer(path)
    return make_model("olmo2", path)


def config_for(model: Path, store: Path, **changes: Any) -> ExtractConfig:
    settings = {"data": str(HH), "max_length": 200, "limit": 150, "shard_rows": 16, "fsync": False, **changes}
    return ExtractConfig(model=str(model), layers=(2, 4), store=str(store), device="cpu", **settings)


def contents(path: Path) -> dict[str, bytes]:
    """Every chunk of a store, by name; the manifest apart (it carries the time of creation)."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("c/**/*"))
        if file.is_file() and not file.name.endswith(".partial")
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    def say(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return {
        "prompt": say("user", prompt),
        "chosen": say("assistant", chosen),
        "rejected": say("assistant", rejected),
        **more,
    }


def test_values_equal_the_plain_forward(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path / "acts.zarr", limit=40, sides=True, dtype="float32")
    summary = extract(config)
    store = ActivationStore.open(config.store)
    assert summary.rows == 40 == summary.ok + summary.quarantined
    results = Renderer(load_tokenizer(model), max_length=200).render(list(open_pairs(HH).read(0, 40)))
    good = [result for result in results if isinstance(result, RenderedPair)]
    rows = [result.row for result in good]
    assert np.flatnonzero(store.status() == 1).tolist() == rows
    wanted = plain_forward(model, good, (2, 4))
    for depth, layer in enumerate((2, 4)):
        sides = np.stack([store.take(layer, rows, "chosen"), store.take(layer, rows, "rejected")], axis=1)
        assert relative_error(sides[:, :, None], wanted[:, :, depth : depth + 1]) <= 1e-5
        difference = wanted[:, 0, depth] - wanted[:, 1, depth]
        np.testing.assert_allclose(
            store.take(layer, rows), difference, rtol=0, atol=1e-5 * float(np.abs(difference).max())
        )
        np.testing.assert_allclose(store.norms(layer)[rows], np.linalg.norm(difference, axis=1), rtol=1e-5)
    ids = store.pair_ids()
    tokens = store.tokens()
    for result in good:
        assert ids[result.row].tobytes() == result.pair_id
        assert tokens[result.row].tolist() == [result.prompt_tokens, result.chosen_tokens, result.rejected_tokens]


@pytest.mark.parametrize("data", [HH, SHAREGPT], ids=["hh", "sharegpt"])
def test_every_row_of_the_shared_files_is_accounted_for(data: Path, model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path / "acts.zarr", data=str(data), limit=None, max_length=64, shard_rows=None)
    summary = extract(config)
    store = ActivationStore.open(config.store)
    assert summary.rows == {HH: 2312, SHAREGPT: 300}[data]
    assert summary.ok + summary.quarantined == summary.rows
    assert sum(summary.reasons.values()) == summary.quarantined == int((store.status() == 2).sum())
    assert verify(config.store).ok


def test_second_run_is_a_no_op(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(model, tmp_path / "acts.zarr")
    first = extract(config)
    assert not first.already_complete
    before = contents(Path(config.store))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr(HFBackend, "load", never)
    second = extract(config)
    assert second.already_complete and second.resumed == second.rows == first.rows and second.computed == 0
    assert contents(Path(config.store)) == before


def test_interrupted_run_resumes_to_the_same_bits(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = config_for(model, tmp_path / "whole.zarr")
    extract(whole)
    broken = replace(whole, store=str(tmp_path / "broken.zarr"))
    original = HFBackend.pool
    for stop_after in (0, 3, 2):
        calls = iter(range(100))

        def interrupted(self: HFBackend, *args: Any, stop: int = stop_after, calls: Any = calls) -> Pooled:
            if next(calls) == stop:
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(HFBackend, "pool", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(broken)
    monkeypatch.setattr(HFBackend, "pool", original)
    summary = extract(broken)
    assert summary.resumed == 5 * 16
    assert contents(Path(broken.store)) == contents(Path(whole.store))


def test_kill_at_random_instants_then_resume(model: Path, tmp_path: Path) -> None:
    """kill -9, twenty times over, each at another instant of the run; the end equals an uninterrupted store."""
    whole = config_for(model, tmp_path / "whole.zarr", limit=400, max_length=400)
    extract(whole)
    store = tmp_path / "killed.zarr"
    config = replace(whole, store=str(store))
    # A server process that has only imported the libraries forks each victim: a start costs milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pairtrace.engine.backend", "pairtrace.engine.extract", "transformers"])
    generator = random.Random(0)
    marks = []
    for kill in range(20):
        victim = context.Process(target=extract, args=(config,))
        victim.start()
        # Half of the kills fall right after a mark appears, within the shard loop; the other half anywhere.
        begun = len(list(store.glob("status/c/*"))) if kill % 2 else None
        deadline = time.monotonic() + 120
        while begun is not None and len(list(store.glob("status/c/*"))) == begun and victim.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05 if kill % 2 else 1.5))
        victim.kill()
        victim.join()
        assert victim.exitcode in (-signal.SIGKILL, 0)
        marks.append(len(list(store.glob("status/c/*"))))
        if victim.exitcode == 0:
            # It finished before the signal: take some shards away again, as if it had been killed earlier.
            for mark in sorted(store.glob("status/c/*"))[5:]:
                mark.unlink()
    assert len(set(marks)) > 3, "the kills must have hit different instants"
    extract(config)
    assert contents(store) == contents(Path(whole.store))
    assert verify(store).ok


def test_reuse_copies_known_pairs(model: Path, tmp_path: Path) -> None:
    rows = [pair(f"question {i}", f"yes {i}", f"no {i}", source="a") for i in range(40)]
    old = config_for(model, tmp_path / "old.zarr", data=str(write_rows(tmp_path / "old.jsonl", rows)), limit=None)
    extract(old)
    mixed = [rows[7], *[pair(f"new {i}", "yes", "no") for i in range(20)], *reversed(rows), rows[3], rows[3]]
    data = write_rows(tmp_path / "mixed.jsonl", mixed)
    fresh = extract(replace(old, data=str(data), store=str(tmp_path / "fresh.zarr")))
    reusing = replace(old, data=str(data), store=str(tmp_path / "reused.zarr"), reuse=(old.store,))
    summary = extract(reusing)
    assert (summary.computed, summary.reused) == (20, 43)
    assert (fresh.computed, fresh.reused) == (60, 3), "repeated pairs are computed once"
    first, second = ActivationStore.open(reusing.store), ActivationStore.open(tmp_path / "fresh.zarr")
    for layer in (2, 4):
        left, right = (np.concatenate([block for _, block in store.blocks(layer)]) for store in (first, second))
        np.testing.assert_allclose(left.astype(np.float32), right.astype(np.float32), rtol=2e-3, atol=1e-5)
        twins = first.take(layer, [0, 20 + 33, 61, 62, 20 + 37])
        assert (twins[0] == twins[1]).all() and (twins[2] == twins[3]).all() and (twins[2] == twins[4]).all()
        assert (twins[0] != twins[2]).any()
    assert first.sources()[0] == "a" and first.sources()[1] == ""


def test_reuse_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_tokenizer(other)
    make_model("olmo2", other, seed=1)
    extract(config_for(other, tmp_path / "other.zarr", limit=16))
    with pytest.raises(StoreMismatchError, match="model_fingerprint"):
        extract(config_for(model, tmp_path / "acts.zarr", limit=16, reuse=(str(tmp_path / "other.zarr"),)))


def test_seen_pairs_against_a_dictionary() -> None:
    generator = np.random.default_rng(0)
    seen, known = shards.SeenPairs(), {}
    row = 0
    for _ in range(30):
        # Few distinct ids, and many that differ only beyond the sorted key.
        ids = np.zeros((17, 16), dtype=np.uint8)
        ids[:, 0] = generator.integers(0, 12, 17)
        ids[:, 15] = generator.integers(0, 3, 17)
        found = seen.find(ids)
        for place, content in enumerate(ids):
            if found[place] >= 0:
                assert known[content.tobytes()][0] <= found[place] and found[place] in known[content.tobytes()]
        for place, content in enumerate(ids):
            known.setdefault(content.tobytes(), []).append(row + place)
        seen.add(ids, np.arange(row, row + 17))
        row += 17


def test_a_shard_is_divided_alike_whatever_is_written() -> None:
    assert [default_shard_rows(n) for n in (1, 64 * 64, 64 * 64 + 1, 378_341)] == [64, 64, 128, 2048]


# --- bad input --------------------------------------------------------------------------------------------------


def test_odd_rows_are_quarantined_and_counted(model: Path, tmp_path: Path) -> None:
    long = "word " * 300
    rows: list[Any] = [
        pair("good", "yes", "no"),
        pair("empty", "", "no"),
        pair("blank", "yes", "  \n "),
        pair("same", "yes", "yes"),
        pair(long, "yes", "no"),
        {**pair("null", "yes", "no"), "chosen": None},
        pair("good again", "sure", "never"),
    ]
    config = config_for(model, tmp_path / "acts.zarr", data=str(write_rows(tmp_path / "odd.jsonl", rows)), limit=None)
    summary = extract(config)
    store = ActivationStore.open(config.store)
    assert (summary.rows, summary.ok, summary.quarantined) == (7, 2, 5)
    assert summary.reasons == {"empty_response": 2, "identical": 1, "prompt_too_long": 1, "malformed_row": 1}
    assert store.status().tolist() == [1, 2, 2, 2, 2, 2, 1]
    assert [bool(reason) for reason in store.reasons()] == [False, True, True, True, True, True, False]
    assert (store.norms(2)[1:6] == 0).all()


def test_hundred_thousand_token_response(model: Path, tmp_path: Path) -> None:
    rows = [pair("long", "a b c d e " * 20_000, "no"), pair("short", "yes", "no")]
    data = write_rows(tmp_path / "long.jsonl", rows)
    summary = extract(config_for(model, tmp_path / "acts.zarr", data=str(data), limit=None, max_length=300))
    assert summary.ok == 2 and summary.tokens < 1000


def test_nan_activations_are_quarantined(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    tokenizer = load_tokenizer(make_tokenizer(broken))
    results = Renderer(tokenizer, max_length=200).render(list(open_pairs(HH).read(0, 60)))
    held = Counter(token for result in results if isinstance(result, RenderedPair) for token in set(result.chosen_ids))
    marker = next(int(token) for token, rows in sorted(held.items()) if 3 <= rows <= 10)
    weights = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        weights.get_input_embeddings().weight[marker] = float("nan")
    weights.save_pretrained(broken)
    config = config_for(broken, tmp_path / "acts.zarr", limit=60)
    summary = extract(config)
    assert 0 < summary.ok < 60 and summary.reasons["nonfinite_activations"] > 0
    assert summary.ok + summary.quarantined == 60
    store = ActivationStore.open(config.store)
    for layer in (2, 4):
        assert all(np.isfinite(block).all() for _, block in store.blocks(layer))


def test_float16_overflow_is_quarantined(model: Path) -> None:
    chosen = np.zeros((3, 1, 4), dtype=np.float32)
    chosen[1, 0, 2] = 70_000
    pooled = Pooled(chosen=chosen, rejected=np.zeros_like(chosen), failed=(2,))
    problems = shards._problems(pooled, "float16", False)
    assert set(problems) == {1, 2} and "overflow" in problems[1] and "out_of_memory" in problems[2]
    assert set(shards._problems(pooled, "float32", False)) == {2}


def test_out_of_memory_halves_the_budget(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(model, tmp_path / "plain.zarr", limit=48, token_budget=4000)
    extract(config)
    original = HFBackend._forward

    def scarce(self: HFBackend, pack: Any) -> Any:
        if pack.tokens > 600:
            raise torch.OutOfMemoryError("no memory for that many tokens")
        return original(self, pack)

    monkeypatch.setattr(HFBackend, "_forward", scarce)
    summary = extract(replace(config, store=str(tmp_path / "scarce.zarr")))
    assert summary.out_of_memory >= 2 and summary.token_budget <= 1000 and summary.ok + summary.quarantined == 48
    left, right = (ActivationStore.open(tmp_path / name) for name in ("plain.zarr", "scarce.zarr"))
    np.testing.assert_allclose(left.norms(4), right.norms(4), rtol=1e-5)

    def barren(self: HFBackend, pack: Any) -> Any:
        if 3 in pack.pairs:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(self, pack)

    monkeypatch.setattr(HFBackend, "_forward", barren)
    summary = extract(replace(config, store=str(tmp_path / "barren.zarr")))
    assert summary.reasons["out_of_memory"] == 3, "one row per shard, the rest goes on"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": (9,)}, LayerError, "layer 9 .* 4"),
        ({"layers": ()}, ConfigError, "--layers"),
        ({"dtype": "float8"}, ConfigError, "float8.*float16"),
        ({"max_length": 0}, ConfigError, "max_length"),
        ({"data": "nowhere.jsonl"}, DataError, "nowhere"),
        ({"model": "nowhere-model"}, ModelError, "nowhere-model"),
        ({"chat_template": "nowhere.jinja"}, ConfigError, "nowhere.jinja"),
        ({"device": "cuda:7"}, ConfigError, "cuda:7"),
        ({"compute_dtype": "int4"}, ConfigError, "int4"),
    ],
)
def test_bad_settings(
    changes: dict[str, Any], error: type[Exception], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        extract(replace(config_for(model, tmp_path / "acts.zarr", limit=16), **changes))


def test_tokenizer_without_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "bare"
    make_tokenizer(path, chat_template=None)
    make_model("olmo2", path)
    with pytest.raises(ModelError, match="--chat-template"):
        extract(config_for(path, tmp_path / "acts.zarr"))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert extract(config_for(path, tmp_path / "acts.zarr", limit=16, chat_template=str(template))).ok > 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_length": 100}, "max_length"),
        ({"layers": (2,)}, "layers"),
        ({"dtype": "float32"}, "dtype"),
        ({"sides": True}, "sides"),
        ({"limit": 20}, "rows"),
    ],
)
def test_a_store_made_otherwise_is_not_resumed(
    changes: dict[str, Any], field: str, model: Path, tmp_path: Path
) -> None:
    config = config_for(model, tmp_path / "acts.zarr", limit=32)
    extract(config)
    with pytest.raises(StoreMismatchError) as caught:
        extract(replace(config, **changes))
    assert caught.value.field == field


def test_a_store_of_another_model_is_not_resumed(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path / "acts.zarr", limit=16)
    extract(config)
    other = tmp_path / "other"
    make_tokenizer(other)
    make_model("olmo2", other, seed=1)
    with pytest.raises(StoreMismatchError, match="model_fingerprint"):
        extract(replace(config, model=str(other)))


def test_second_writer(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path / "acts.zarr", limit=16)
    extract(config)
    manifest = ActivationStore.open(config.store).manifest
    with StoreWriter.create_or_resume(config.store, manifest, fsync=False), pytest.raises(StoreLockedError):
        extract(config)


def test_full_disk_stops_with_what_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(model, tmp_path / "acts.zarr")
    original = StoreWriter.write_shard
    written = iter(range(100))

    def full(self: StoreWriter, block: Any) -> None:
        if next(written) == 2:
            raise StoreWriteError("no space left on device")
        original(self, block)

    monkeypatch.setattr(StoreWriter, "write_shard", full)
    with pytest.raises(StoreWriteError, match="no space"):
        extract(config)
    monkeypatch.setattr(StoreWriter, "write_shard", original)
    assert extract(config).resumed == 2 * 16


def test_incomplete_weights(model: Path, tmp_path: Path) -> None:
    import shutil

    for name, spoil in (("cut", lambda f: f.write_bytes(f.read_bytes()[:5000])), ("gone", lambda f: f.unlink())):
        path = tmp_path / name
        shutil.copytree(model, path)
        spoil(next(path.glob("*.safetensors")))
        with pytest.raises(ModelError, match=r"cannot be loaded|safetensors"):
            extract(config_for(path, tmp_path / f"{name}.zarr"))


def test_an_error_on_one_side_of_a_channel_reaches_the_other() -> None:
    channel: Channel[int] = Channel(depth=1)

    def fail() -> None:
        for item in channel:
            raise OSError(f"item {item}")

    thread = run_thread("failing", channel, fail)
    assert channel.put(1)
    while channel.put(2):
        pass
    thread.join(timeout=10)
    assert isinstance(channel.error, OSError)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Peak memory of 2,000 and 20,000 rows in fresh processes; short rows and one block keep it quick."""
    model = tmp_path / "m0"
    make_tokenizer(model)
    make_model("olmo2", model, hidden_size=512, num_hidden_layers=1)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pairtrace.engine.extract import ExtractConfig, extract\n"
        "data, model, store = sys.argv[1:]\n"
        "s = extract(ExtractConfig(data=data, model=model, layers=(1,), store=store, device='cpu', fsync=False,\n"
        "                          max_length=64, shard_rows=256))\n"
        # Not getrusage: a child begins with its parent's maximum there.
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "print(s.ok, next(line.split()[1] for line in status if line.startswith('VmHWM')))\n"
    )
    peaks = {}
    for rows in (2_000, 20_000):
        data = write_rows(tmp_path / f"{rows}.jsonl", [pair(f"q {i}", f"a {i}", f"b {i % 97}") for i in range(rows)])
        command = [sys.executable, "-c", program, str(data), str(model), str(tmp_path / f"{rows}.zarr")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(output[0]) >= rows * 0.95
        peaks[rows] = int(output[1]) / 1024
    # Activations of 18,000 rows kept by mistake would be 70 MiB (two sides of 512 float32 values).
    assert peaks[20_000] - peaks[2_000] < 24, f"peak memory in MiB: {peaks}"
