"""Checkpoints: what identifies them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pairtrace.engine.checkpoint import (
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_checkpoint,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from pairtrace.errors import ConfigError, ModelError, UnsupportedModelError
from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def copy_of(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_fingerprint_is_the_contents_not_the_place(model: Path, tmp_path: Path) -> None:
    assert model_fingerprint(copy_of(model, tmp_path)) == model_fingerprint(model)


def test_fingerprint_sees_a_single_flipped_bit(model: Path, tmp_path: Path) -> None:
    copied = copy_of(model, tmp_path)
    file = weight_files(copied)[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert model_fingerprint(copied) != model_fingerprint(model)


@pytest.mark.parametrize(("key", "value", "same"), [("rms_norm_eps", 1e-3, False), ("transformers_version", "x", True)])
def test_fingerprint_counts_what_changes_the_result(
    key: str, value: object, same: bool, model: Path, tmp_path: Path
) -> None:
    copied = copy_of(model, tmp_path)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, key: value}))
    assert (model_fingerprint(copied) == model_fingerprint(model)) is same


def test_weights_that_are_missing_are_never_made_up(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    copied = copy_of(model, tmp_path)
    file = weight_files(copied)[0]
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(AutoModelForCausalLM, copied, load_config(copied), "auto")


def test_missing_shard_of_the_weights(model: Path, tmp_path: Path) -> None:
    copied = copy_of(model, tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing.*model-00002"):
        weight_files(copied)


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    copied = copy_of(model, tmp_path)
    weight_files(copied)[0].unlink()
    (copied / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="unpickled"):
        model_fingerprint(copied)


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge"):
        resolve_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        resolve_checkpoint(file)
    with pytest.raises(ModelError, match="nowhere/nothing"):
        resolve_checkpoint("nowhere/nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="broken"):
        load_config(broken)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(broken)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    """A checkpoint that brings its own configuration class is refused, and its code never runs."""
    ran = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnConfig: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_config(tmp_path)
    assert not ran.exists()


def test_devices_and_dtypes() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for device in ("warp", "mps", "meta", "xpu"):
        with pytest.raises(ConfigError, match=device):
            resolve_device(device)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="sees 0 CUDA devices"):
            resolve_device("cuda")
    assert resolve_dtype("auto", SimpleNamespace(dtype=torch.bfloat16)) is torch.bfloat16
    assert resolve_dtype("auto", SimpleNamespace(dtype=None)) is torch.float32
    assert resolve_dtype("float16", SimpleNamespace(dtype=None)) is torch.float16


@pytest.mark.parametrize("content", ["{broken", "[1, 2]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_damaged_configuration(content: str, model: Path, tmp_path: Path) -> None:
    copied = copy_of(model, tmp_path)
    (copied / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config"):
        load_config(copied)


@pytest.mark.parametrize("content", ["{broken", "{}", '{"weight_map": 3}'])
def test_damaged_weight_index(content: str, model: Path, tmp_path: Path) -> None:
    copied = copy_of(model, tmp_path)
    (copied / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        weight_files(copied)


def test_quantised_checkpoints_are_refused(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        load_model(AutoModelForCausalLM, model, config, "auto")


def test_a_directory_with_a_tokenizer_alone_will_do(tmp_path: Path) -> None:
    assert load_tokenizer(make_tokenizer(tmp_path)).eos_token == "<eos>"
