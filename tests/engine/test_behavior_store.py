from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.behavior import BehaviorConfig, build_behavior
from pairtrace.engine.checkpoint import load_tokenizer, model_fingerprint
from pairtrace.engine.directions import load_directions, read_manifest
from pairtrace.engine.fingerprints import fingerprints
from pairtrace.errors import ConfigError, StoreMismatchError
from tests.engine.behavior_cases import two_models, vectors_match, write_rollouts
from tests.engine.small_store import make_store


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def prints(models: tuple[str, str]) -> dict[str, str]:
    tokenizer, template = fingerprints(load_tokenizer(models[0]), None)
    return {
        "model_fingerprint": model_fingerprint(models[0]),
        "tokenizer_fingerprint": tokenizer,
        "template_fingerprint": template,
    }


@pytest.fixture
def options(models: tuple[str, str], tmp_path: Path) -> dict[str, Any]:
    rollouts = write_rollouts(tmp_path / "mine.jsonl")
    return {"base": models[0], "rollouts": rollouts, "label_column": "harmful", "device": "cpu"}


def build(out: Path, options: dict[str, Any], **more: Any) -> Any:
    return build_behavior(BehaviorConfig(out=str(out), **{**options, **more}))


def test_the_store_decides_layers_and_must_match(
    prints: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    for field in prints:
        foreign = make_store(tmp_path / field, **{**prints, field: "f" * 64})
        with pytest.raises(StoreMismatchError, match=field):
            build(tmp_path / "a.safetensors", options, store=foreign.path)
    own = make_store(tmp_path / "own", width=32, layers=(1, 4), **prints)
    summary = build(tmp_path / "b.safetensors", options, store=own.path)
    assert summary.layers == (1, 4)
    assert vectors_match(summary.out, options["base"])
    assert {direction.tokenizer_fingerprint for direction in load_directions(summary.out)} == {
        prints["tokenizer_fingerprint"]
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 512}, r"max_length is 1024, but 512 is needed; leave out --max-length"),
        ({"max_length": 0}, r"max_length is 1024, but 0 is needed"),
        ({"truncation": "keep_end"}, r"truncation is 'keep_start', but 'keep_end' is needed; leave out --truncation"),
        ({"dtype": "bfloat16"}, r"compute_dtype is 'float32', but 'bfloat16' is needed; leave out --compute-dtype"),
        ({"layers": (1, 3)}, r"layers is \(1, 4\), but \(1, 3\) is needed; choose --layers among"),
    ],
)
def test_options_that_contradict_the_store_are_refused(
    prints: dict[str, str], options: dict[str, Any], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    store = make_store(tmp_path / "own", width=32, layers=(1, 4), **prints)
    with pytest.raises(StoreMismatchError, match=message):
        build(tmp_path / "b.safetensors", options, store=store.path, **given)


def test_the_store_fills_in_what_was_not_given(
    prints: dict[str, str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_length": None, "truncation": "keep_end", "compute_dtype": "bfloat16"}
    store = make_store(tmp_path / "own", width=32, layers=(1, 4), **prints, **settings)
    out = tmp_path / "b.safetensors"
    # Options that say the same as the store are no contradiction; 0 is how "no limit" is said.
    build(out, options, store=store.path, max_length=0, truncation="keep_end", dtype="bfloat16", layers=(4,))
    assert {direction.layer for direction in load_directions(out)} == {4}
    build(out, options, store=store.path)
    reading = read_manifest(out)["reading"]
    assert reading["layers"] == [1, 4]
    assert (reading["max_length"], reading["truncation"], reading["dtype"]) == (None, "keep_end", "bfloat16")
    build(out, options)
    reading = read_manifest(out)["reading"]
    assert (reading["max_length"], reading["truncation"], reading["dtype"]) == (1024, "keep_start", "auto")
    assert reading["same_rendering"] is None


def test_a_store_of_plain_text_is_pointed_out(
    prints: dict[str, str], options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "b.safetensors"
    chat = make_store(tmp_path / "chat", width=32, layers=(1,), **prints, data_format="conversational")
    text = make_store(tmp_path / "text", width=32, layers=(1,), **prints, data_format="standard-implicit")
    with caplog.at_level(logging.WARNING):
        build(out, options, store=chat.path)
        assert "plain text" not in caplog.text
        assert read_manifest(out)["reading"]["same_rendering"] is True
        build(out, options, store=text.path)
    assert "plain text (format standard-implicit)" in caplog.text
    reading = read_manifest(out)["reading"]
    assert (reading["same_rendering"], reading["store_format"]) == (False, "standard-implicit")


def test_negative_lengths_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--max-length is -1"):
        BehaviorConfig(out="b.safetensors", **options, max_length=-1)
