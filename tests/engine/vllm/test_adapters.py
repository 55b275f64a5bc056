"""LoRA adapters: which are taken, and what identifies them; no vLLM needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pairtrace.engine.sampling import Request
from pairtrace.engine.vllm.adapters import Adapter, find_adapter, fingerprint_of
from pairtrace.engine.vllm.sampler import _batches
from pairtrace.errors import ModelError
from tests.models import make_model

SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("base"))


def adapter(path: Path, *, value: float = 1.0, **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    save_file({"lora_A": torch.full((4, 2), value)}, path / "adapter_model.safetensors")
    return path


def found(path: Path, base: Path | None = None) -> Adapter:
    adapter = find_adapter(str(path), None if base is None else str(base))
    assert adapter is not None
    return adapter


def test_checkpoints_and_hub_ids_are_no_adapters(base: Path, tmp_path: Path) -> None:
    assert find_adapter(str(base)) is None and find_adapter("org/model") is None
    both = adapter(tmp_path / "both")
    (both / "config.json").write_text("{}")
    assert find_adapter(str(both)) is None


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (512, 512)])
def test_room_for_the_rank(rank: int, room: int, tmp_path: Path) -> None:
    assert found(adapter(tmp_path / "a", r=rank)).room == room


def test_a_rank_without_room(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="rank 513"):
        _ = found(adapter(tmp_path / "a", r=513)).room


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "no plain LoRA adapter"),
        ({"use_dora": True}, "no plain LoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "no plain LoRA adapter"),
        ({"r": "x"}, "is damaged"),
        ({"peft_type": None}, "no plain LoRA adapter"),
    ],
)
def test_what_vllm_would_not_run_alike_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        found(adapter(tmp_path / "a", **changes))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        found(path)


def test_an_adapter_of_other_weights_is_refused(base: Path, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other", seed=1)
    same = make_model("llama", tmp_path / "same")
    path = adapter(tmp_path / "a", base_model_name_or_path=str(same))
    assert found(path, base).base == str(same)
    with pytest.raises(ModelError, match="was trained on"):
        found(path, other)
    # A path that is not here says nothing.
    assert found(adapter(tmp_path / "b", base_model_name_or_path="/nowhere"), other).rank == 4


def test_the_fingerprint_is_that_of_what_it_computes(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", base_model_name_or_path="here", lora_dropout=0.1)
    same = adapter(tmp_path / "same", base_model_name_or_path="there")
    others = [
        adapter(tmp_path / "weights", value=2.0),
        adapter(tmp_path / "scale", lora_alpha=16),
    ]
    prints = [fingerprint_of(str(path), str(base)) for path in (one, same, *others)]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    moved = make_model("llama", tmp_path / "other", seed=1)
    assert fingerprint_of(str(one), str(moved)) != prints[0]
    assert fingerprint_of(str(base), str(base)) not in prints


def test_on_a_cpu_adapters_never_share_a_batch_with_requests_without_one() -> None:
    """There vLLM would apply them to both; everywhere else there is one batch."""
    given = [None, "a", None, "b", "a"]
    requests = [Request(name="r", prompt=[1], seed=0, adapter=adapter) for adapter in given]
    assert _batches(requests, "cuda") == [[0, 1, 2, 3, 4]]
    assert _batches(requests, "cpu") == [[0, 2], [1, 4], [3]]
