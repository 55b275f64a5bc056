"""Extraction and bad input: each gets a message that names the row or value, or is quarantined and counted."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine.backend import HFBackend
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.extract import extract
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
from pairtrace.store.writer import StoreWriter
from tests.engine.extraction import config_for, pair, write_rows
from tests.models import HH, make_model, make_tokenizer
from tests.store.samples import make_manifest, write_store

pytestmark = pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data")


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


def test_what_needs_no_model_library_is_refused_without_one(tmp_path: Path) -> None:
    """Layers, places and settings are checked before torch or transformers are imported, which takes long."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 8}')
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("x")
    write_store(tmp_path / "acts.zarr", make_manifest(model="/elsewhere"))
    write_store(tmp_path / "same.zarr", make_manifest(model=str(model)))
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers")))
from pairtrace.engine.extract import ExtractConfig, extract
for store, layers in (("new", (2, 9)), ("file", (2, 5)), ("acts.zarr", (2, 5)), ("same.zarr", (2, 6))):
    place = {str(tmp_path)!r} + "/" + store
    try:
        extract(ExtractConfig(data="absent", model={str(model)!r}, layers=layers, store=place))
    except ValueError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("LayerError layer 9 is outside this model: expected 0 (embedding output) to 8")
    assert lines[1].startswith(f"StoreError {tmp_path}/file is a file, not an activation store")
    assert lines[2].startswith("StoreMismatchError the store's model_fingerprint is")
    assert lines[3].startswith("StoreMismatchError the store's layers is (2, 5), but (2, 6) is needed")
    assert not (tmp_path / "new").exists()


def test_checkpoint_and_data_are_recorded_with_their_whole_paths(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    rows = write_rows(model.parent / "short.jsonl", [pair("hi", "yes", "no")])
    extract(replace(config_for(Path(model.name), tmp_path / "acts.zarr", limit=None), data=rows.name))
    manifest = ActivationStore.open(tmp_path / "acts.zarr").manifest
    assert (manifest.model, manifest.data) == (str(model), str(rows))


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
