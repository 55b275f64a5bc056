"""The extraction stage end to end: every row accounted for, resumable, reusable, right."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from pairtrace.engine.backend import HFBackend, Pooled
from pairtrace.engine.channel import Channel, run_thread
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.extract import default_shard_rows, extract
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendering import RenderedPair, Renderer
from pairtrace.errors import (
    StoreMismatchError,
)
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from tests.engine.extraction import config_for, contents, pair, write_rows
from tests.engine.test_equivalence import plain_forward, relative_error
from tests.models import HH, SHAREGPT, make_model, make_tokenizer

pytestmark = pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data")


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


def test_int8_rows_are_the_float32_rows_within_half_a_step(model: Path, tmp_path: Path) -> None:
    """The same run twice, at the two ends of precision; the int8 store is compressed and knows how it was made."""
    template = tmp_path / "own.jinja"
    template.write_text(load_tokenizer(model).chat_template)
    exact, rounded = (
        config_for(model, tmp_path / dtype, limit=40, sides=True, dtype=dtype, codec=codec, chat_template=str(template))
        for dtype, codec in (("float32", "none"), ("int8", "zstd:3"))
    )
    assert extract(exact).ok == extract(rounded).ok > 0
    wide, store = ActivationStore.open(exact.store), ActivationStore.open(rounded.store)
    assert verify(rounded.store).ok
    assert (store.manifest.codec, store.manifest.chat_template) == ("zstd:3", str(template))
    for layer in (2, 4):
        for array in ("diff", "chosen", "rejected"):
            for start, rows in store.blocks(layer, array):
                assert isinstance(rows, ScaledRows)
                expected = wide.take(layer, np.arange(start, start + len(rows)), array)
                # Half a step before each row got its norm back.
                step = np.abs(expected / rows.column_scale).max(axis=1)[:, None] / 127 * rows.column_scale
                assert (np.abs(rows.values * step - expected) <= 0.5 * step * (1 + 1e-4)).all()
                kept = np.linalg.norm(rows.decode(), axis=1)
                np.testing.assert_allclose(kept, np.linalg.norm(expected, axis=1), rtol=1e-5)
        np.testing.assert_array_equal(store.norms(layer), wide.norms(layer))


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
    assert_same_but_for_last_bits(store, Path(whole.store))
    assert verify(store).ok


def assert_same_but_for_last_bits(store: Path, other: Path) -> None:
    """All files are equal, but for last bits of sums: on some processors they differ from process to process."""
    found, expected = contents(store), contents(other)
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert all(name.startswith(("diff/", "norm/")) for name in differing), differing
    groups = [zarr.open_group(path, mode="r") for path in (store, other)]
    for name, tolerance in (("diff/2", 2.0**-10), ("norm/2", 1e-6)):
        rows = [np.asarray(group[name][:], np.float32) for group in groups]
        np.testing.assert_allclose(*rows, rtol=tolerance, atol=1e-6)


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


def test_default_shard_size() -> None:
    assert [default_shard_rows(n) for n in (1, 64 * 64, 64 * 64 + 1, 378_341)] == [64, 64, 128, 2048]


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
    """Peak memory of 1,000 and 9,000 rows in fresh processes; short rows and one block keep it quick."""
    model = tmp_path / "m0"
    make_tokenizer(model)
    make_model("olmo2", model, hidden_size=1024, num_hidden_layers=1)
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
    for rows in (1_000, 9_000):
        data = write_rows(tmp_path / f"{rows}.jsonl", [pair(f"q {i}", f"a {i}", f"b {i % 97}") for i in range(rows)])
        command = [sys.executable, "-c", program, str(data), str(model), str(tmp_path / f"{rows}.zarr")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert int(output[0]) >= rows * 0.95
        peaks[rows] = int(output[1]) / 1024
    # Activations of 8,000 rows kept by mistake would be 62 MiB (two sides of 1,024 float32 values).
    assert peaks[9_000] - peaks[1_000] < 24, f"peak memory in MiB: {peaks}"
