"""What rollouts depend on before any weights: tokenizer, chat template, end tokens, prompts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine import sampling
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.errors import ConfigError, DataError, DataMismatchError, ModelError
from tests.engine.behavior_cases import two_models
from tests.models import CHAT_TEMPLATE, make_model, make_tokenizer

REFUSAL = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"

USER = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def models(originals: tuple[str, str], tmp_path: Path) -> tuple[Path, Path]:
    """Copies that a test may change."""
    copies = tmp_path / "base", tmp_path / "tuned"
    for original, copy in zip(originals, copies, strict=True):
        shutil.copytree(original, copy)
    return copies


@pytest.fixture
def config(models: tuple[Path, Path], tmp_path: Path) -> RolloutConfig:
    prompts = tmp_path / "prompts.jsonl"
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    entries = [{"id": "a", "prompt": "Hello"}, {"id": "with-system", "messages": system}]
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return RolloutConfig(
        prompts=str(prompts), base=str(models[0]), tuned=str(models[1]), out=str(tmp_path / "r.parquet"),
        samples=1, max_new_tokens=3, device="cpu",
    )  # fmt: skip


def change_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|> "))


def change_tokenizer(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(content))


def change_end(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_template, "template_fingerprint"),
        (change_tokenizer, "tokenizer_fingerprint"),
        (change_end, r"end_tokens \[2\], but this run asks for \[2, 4\]"),
    ],
)
def test_a_changed_checkpoint_is_an_error_and_no_silent_reuse(
    config: RolloutConfig,
    models: tuple[Path, Path],
    change: Any,
    field: str,
    side: int,
) -> None:
    made = sample_rollouts(config)
    assert sample_rollouts(config).table.equals(made.table)
    change(models[side])
    named = ("base", "tuned")[side] + "_" + field
    with pytest.raises(DataMismatchError, match=named):
        sample_rollouts(config)
    # The same for the unfinished file of an interrupted run.
    out = Path(config.out)
    identity = {"identity": made.manifest["identity"]}
    out.with_name(out.name + ".partial.jsonl").write_text(json.dumps(identity) + "\n")
    out.unlink()
    with pytest.raises(DataMismatchError, match=named):
        sample_rollouts(config)


def test_rollouts_of_one_back_end_are_never_taken_for_those_of_another(config: RolloutConfig) -> None:
    """In both directions, finished and unfinished; no vLLM is needed to find that out."""
    made = sample_rollouts(config)
    identity = made.manifest["identity"]
    assert "backend" not in identity, "files are as they were before there was a choice"
    other = replace(config, backend="vllm")
    with pytest.raises(DataMismatchError, match="was made with backend 'hf', but this run asks for 'vllm'"):
        sample_rollouts(other)
    out = Path(config.out)
    out.unlink()
    journal = out.with_name(out.name + ".partial.jsonl")
    journal.write_text(json.dumps({"identity": {**identity, "backend": "vllm"}}) + "\n")
    with pytest.raises(DataMismatchError, match="was made with backend 'vllm', but this run asks for 'hf'"):
        sample_rollouts(config)
    journal.write_text(json.dumps({"identity": identity}) + "\n")
    with pytest.raises(DataMismatchError, match="backend"):
        sample_rollouts(other)


def test_a_prompt_that_one_template_refuses_is_named_before_any_weights(
    config: RolloutConfig, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("no weights before every prompt is rendered")

    monkeypatch.setattr(sampling, "load_model", forbidden)
    (models[1] / "chat_template.jinja").write_text(REFUSAL + CHAT_TEMPLATE)
    message = r"prompt 'with-system' \(plain\): the chat template of .*tuned refuses .*no system, please"
    with pytest.raises(DataError, match=message):
        sample_rollouts(config)
    (models[1] / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match=r"tuned is not valid Jinja \(line 1\)"):
        sample_rollouts(config)
    (models[1] / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(AssertionError, match="no weights before"):
        sample_rollouts(config)


def test_a_prompt_without_room_for_its_answer_is_refused(originals: tuple[str, str]) -> None:
    encoder = PromptEncoder.load(originals[0])
    used = len(encoder.encode("a", USER))
    assert encoder.encode("a", USER, 4096 - used)
    with pytest.raises(ConfigError, match=rf"a: the prompt has {used} tokens.*context of .*base, 4096"):
        encoder.encode("a", USER, 4096 - used + 1)
    with pytest.raises(DataError, match="a: the text is not valid Unicode"):
        encoder.encode("a", [{"role": "user", "content": "\ud800"}])


def test_a_template_must_come_from_somewhere(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    make_tokenizer(bare, chat_template=None)
    make_model("llama", bare)
    with pytest.raises(ModelError, match=r"bare has no chat template.*--chat-template"):
        PromptEncoder.load(str(bare))
    given = tmp_path / "given.jinja"
    given.write_text("{{ messages[-1]['content'] }}")
    encoder = PromptEncoder.load(str(bare), chat_template=str(given))
    assert encoder.tokenizer.decode(encoder.encode("x", USER)) == "Hi there"


def test_a_template_that_prints_the_date_needs_one(models: tuple[Path, Path], tmp_path: Path) -> None:
    (models[0] / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    with pytest.raises(ModelError, match="--template-date"):
        PromptEncoder.load(str(models[0]))
    encoder = PromptEncoder.load(str(models[0]), template_date="2024-07-26")
    assert encoder.tokenizer.decode(encoder.encode("x", USER)).startswith("26 Jul 2024")
    other = PromptEncoder.load(str(models[0]), template_date="2024-07-27")
    assert encoder.identity["template_fingerprint"] != other.identity["template_fingerprint"]


def test_end_tokens_are_those_of_generation_config_or_configuration(models: tuple[Path, Path]) -> None:
    assert PromptEncoder.load(str(models[0])).end_tokens == (2,)
    (models[0] / "generation_config.json").unlink(missing_ok=True)
    assert PromptEncoder.load(str(models[0])).end_tokens == (2,)
    configuration = json.loads((models[0] / "config.json").read_text())
    (models[0] / "config.json").write_text(json.dumps({**configuration, "eos_token_id": [2, 7]}))
    assert PromptEncoder.load(str(models[0])).end_tokens == (2, 7)
    (models[0] / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        PromptEncoder.load(str(models[0]))
