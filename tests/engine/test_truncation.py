"""Truncated checkpoints: the same tensors, fewer of them, and nothing left behind by a failure."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pairtrace.engine import truncation
from pairtrace.engine.backend import HFBackend
from pairtrace.engine.checkpoint import load_config, model_fingerprint, weight_files
from pairtrace.engine.safetensors_files import read_header
from pairtrace.engine.truncation import INDEX, RECORD, TruncateConfig, cached_truncation, truncate
from pairtrace.errors import ConfigError, LayerError, ModelError, UnsupportedModelError
from tests.engine.test_equivalence import synthetic
from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    make_tokenizer(path)
    return make_model("olmo3", path, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, single: Path) -> Path:
    """The same checkpoint in many small files, none of which ends where a block ends."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(single)
    model.save_pretrained(path, max_shard_size="8KB")
    assert len(weight_files(path)) > 6
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}


def cut(model: Path, layers: int, out: Path) -> dict[str, Any]:
    return truncate(TruncateConfig(model=str(model), layers=layers, out=str(out))).to_dict()


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_keeps_exactly_the_first_blocks(kind: str, layers: int, request: Any, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(kind)
    summary = cut(model, layers, tmp_path / "out")
    wanted = {
        name: tensor
        for name, tensor in tensors(model).items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
    }
    found = tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == torch.bfloat16 for name in wanted)
    assert summary["of"] == 4 and summary["bytes"] == sum(t.numel() * 2 for t in wanted.values())
    index = tmp_path / "out" / INDEX
    assert index.is_file() == (model / INDEX).is_file()
    if index.is_file():
        assert json.loads(index.read_text())["metadata"]["total_size"] == summary["bytes"]


def test_whole_files_are_linked_and_only_the_boundary_is_rewritten(sharded: Path, tmp_path: Path) -> None:
    summary = cut(sharded, 2, tmp_path / "out")
    same = [file.name for file in weight_files(tmp_path / "out") if file.samefile(sharded / file.name)]
    assert len(same) == summary["linked"] > 1
    assert summary["copied"] == 0 and summary["dropped"] > 0 and 1 <= summary["rewritten"] <= 2
    own = [file for file in weight_files(tmp_path / "out") if file.name not in same]
    assert summary["bytes_written"] == sum(file.stat().st_size for file in own)


def test_copies_where_the_file_system_makes_no_links(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    summary = cut(sharded, 2, tmp_path / "out")
    assert summary["linked"] == 0 and summary["copied"] > 1
    assert not any(file.samefile(sharded / file.name) for file in weight_files(tmp_path / "out"))


def test_is_a_checkpoint_with_the_same_residual_stream(sharded: Path, tmp_path: Path) -> None:
    """Layers up to the cut are those of the whole model, to the bit, and the one after it does not exist."""
    cut(sharded, 3, tmp_path / "out")
    config = load_config(tmp_path / "out")
    assert config.num_hidden_layers == 3 and config.layer_types == load_config(sharded).layer_types[:3]
    pairs = [synthetic([5, 6, 7, 8, 9], [5, 6, 9], 2)]
    whole, part = (HFBackend.load(path, (0, 1, 3), device="cpu").pool(pairs) for path in (sharded, tmp_path / "out"))
    assert np.array_equal(whole.chosen, part.chosen) and np.array_equal(whole.rejected, part.rejected)
    with pytest.raises(LayerError):
        HFBackend.load(tmp_path / "out", (4,), device="cpu")


def test_carries_the_tokenizer_and_no_code(single: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(single, tmp_path / "model"))
    (model / "modeling_evil.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    cut(model, 2, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    described = {file.name for file in model.iterdir()} - {"modeling_evil.py", "pytorch_model.bin"}
    assert names == described | {RECORD}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_layers_outside_the_model_are_refused(layers: int, single: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=rf"--layers is {layers}.*1 to 4"):
        cut(single, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_never_overwrites(single: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        cut(single, 2, tmp_path / "out")


def test_what_a_killed_run_has_left_is_in_nobodys_way(single: Path, tmp_path: Path) -> None:
    """Process ids come back; in a container the first one is the same at each start."""
    (tmp_path / f".out.{os.getpid()}.partial").mkdir()
    cut(single, 2, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unknown_architectures_are_refused(single: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(single, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match="bert"):
        cut(model, 2, tmp_path / "out")


@pytest.mark.parametrize("damage", ["short", "header", "empty"])
def test_damaged_weights_leave_nothing_behind(damage: str, sharded: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sharded, tmp_path / "model"))
    file = weight_files(model)[2]
    raw = file.read_bytes()
    file.write_bytes({"short": raw[:-5], "header": b"\xff" * 8 + raw[8:], "empty": b""}[damage])
    with pytest.raises(ModelError, match="damaged"):
        cut(model, 2, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_weight_that_is_missing_is_noticed(kind: str, request: Any, tmp_path: Path) -> None:
    """Of the blocks that stay; what is missing of the others is no matter."""
    model = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "model"))
    for block in (3, 0):
        gone = f"model.layers.{block}.mlp.up_proj.weight"
        (file,) = [file for file in weight_files(model) if gone in load_file(file)]
        held = {name: tensor for name, tensor in load_file(file).items() if name != gone}
        save_file(held, file, metadata={"format": "pt"})
        if block == 3:
            assert cut(model, 2, tmp_path / "shallow")["layers"] == 2
    with pytest.raises(ModelError, match=rf"is incomplete: it lacks 1 weights of .*, for example {re.escape(gone)}"):
        cut(model, 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_names_are_others_the_index_tells(sharded: Path, tmp_path: Path) -> None:
    """An older checkpoint with buffers that the model no longer has, and without a weight."""
    model = Path(shutil.copytree(sharded, tmp_path / "model"))
    gone, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.rotary_emb.inv_freq"
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][other] = index["weight_map"][gone]
    (model / INDEX).write_text(json.dumps(index))
    file = model / index["weight_map"][gone]
    held = {**load_file(file), other: torch.ones(3)}
    save_file(held, file, metadata={"format": "pt"})
    assert cut(model, 2, tmp_path / "whole")["layers"] == 2
    del held[gone]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"is incomplete: its weight files lack {re.escape(gone)} \(1 of"):
        cut(model, 2, tmp_path / "out")


def test_the_cache_makes_it_once(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PAIRTRACE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "pairtrace")
    fingerprint = model_fingerprint(sharded)
    made = [cached_truncation(str(sharded), layers, fingerprint) for layers in (2, 2, 0, 1)]
    assert made[0] == made[1] and made[2] == made[3] != made[0]
    assert load_config(made[0]).num_hidden_layers == 2 and load_config(made[2]).num_hidden_layers == 1
    assert sum("are kept in" in message for message in caplog.messages) == 2
    # With all blocks there is nothing to cut.
    assert cached_truncation(str(sharded), 4, fingerprint) == sharded


def test_a_cache_that_cannot_be_written_names_the_way_out(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAIRTRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write .*PAIRTRACE_CACHE names another directory"):
        cached_truncation(str(sharded), 2, "f" * 64)


def test_a_cached_link_that_was_written_to_is_made_anew(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving into the checkpoint's directory changes linked files: their old fingerprint must not vouch for them."""
    monkeypatch.setenv("PAIRTRACE_CACHE", str(tmp_path / "cache"))
    model = Path(shutil.copytree(sharded, tmp_path / "model"))
    out = cached_truncation(str(model), 2, "f" * 64)
    linked = next(file for file in weight_files(out) if file.samefile(model / file.name))
    raw = linked.read_bytes()
    begin = read_header(linked).data
    linked.write_bytes(raw[:begin] + bytes(len(raw) - begin))
    assert not truncation._is_whole(out)
    shutil.rmtree(model)
    shutil.copytree(sharded, model)
    again = cached_truncation(str(model), 2, "f" * 64)
    assert again == out and (out / linked.name).read_bytes() == raw
