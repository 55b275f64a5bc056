"""A judge in vLLM: structured output from the real engine, whatever the model is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from pairtrace.engine.baselines.judge import score_by_judge
from pairtrace.engine.baselines.judge_client import REQUEST_REFUSED
from pairtrace.engine.baselines.judge_config import JudgeConfig
from pairtrace.engine.baselines.judge_request import Rubric
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.cost import costs_path, read_costs
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.engine.vllm.judge import VLLMJudge
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError
from tests.engine.small_store import make_store
from tests.models import HH
from tests.vllm.engines import CACHE_GIB, needs_vllm, vllm_model

pytestmark = [
    needs_vllm,
    pytest.mark.usefixtures("engines_in_processes"),
    pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data"),
]

OPTIONS = VLLMOptions(cache_gib=CACHE_GIB, engine={"max_num_seqs": 32})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_model("llama", tmp_path_factory.mktemp("judge"))


def test_every_answer_is_a_verdict_and_none_is_asked_twice(model: Path, tmp_path: Path) -> None:
    """A model of random weights writes JSON by the schema only because the engine makes it."""
    store = make_store(tmp_path, rows=12, quarantined=(5,), zero=())
    config = JudgeConfig(
        store=store.path,
        out=str(tmp_path / "judge.parquet"),
        model=str(model),
        behavior_text="praises the user",
        backend="vllm",
        vllm=OPTIONS,
        concurrency=16,
    )
    summary = score_by_judge(config)
    assert summary.missing == {} and summary.responses == 22 and summary.asked > 11
    assert summary.prompt_tokens > 100 * summary.asked and summary.completion_tokens >= 5 * summary.asked
    table = ScoresTable.open(config.out)
    assert table.manifest["details"]["base_url"] is None
    (cost,) = [record for record in read_costs(costs_path(config.out)) if record.method == "judge"]
    assert cost.model_tokens == summary.prompt_tokens + summary.completion_tokens and cost.api_prompt_tokens == 0
    again = score_by_judge(config)
    assert again.asked == 0 and again.reused == summary.asked


@pytest.fixture(scope="module")
def fond_of_spaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says a space wherever it may, and whose chat template knows no system turn."""
    path = vllm_model("llama", tmp_path_factory.mktemp("spaces"), tie_word_embeddings=False)
    tokenizer = load_tokenizer(path)
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = template + "{{ m.role + ': ' + m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            value.zero_()
        elif name.endswith(("embed_tokens.weight", "norm.weight")):
            value.fill_(1.0)
    weights["lm_head.weight"][tokenizer.encode(" ", add_special_tokens=False)[0]] = 1.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_space_between_the_parts_of_an_answer_is_not_written(fond_of_spaces: Path) -> None:
    from pairtrace.engine.vllm.connector import engine_processes

    judge = VLLMJudge(str(fond_of_spaces), OPTIONS)
    try:
        body = Rubric("praises", "m").body("Hello", "Good day")
        verdict = judge.ask(body)
        assert (verdict.score is not None, verdict.reason) == (True, "")
        free = {name: value for name, value in body.items() if name != "response_format"}
        assert judge.answer(free, lambda answer: [answer["choices"][0]["message"]["content"].strip()]) == [""]
        (process,) = engine_processes(judge._engine._models[0])
        engine = psutil.Process(process)
        assert "EngineCore" in engine.cmdline()[0]
        (watch,) = judge._engine._watches
        assert watch._watch is not None and watch._watch.args[-1] == str(process)
    finally:
        judge.close()
    assert watch._watch is None
    assert psutil.wait_procs([engine], timeout=60)[0] == [engine]


def test_questions_that_cannot_be_asked(model: Path) -> None:
    judge = VLLMJudge(str(model), OPTIONS)
    try:
        body = Rubric("praises", "m").body("Hello", "Good day")
        assert judge.ask(body).reason == ""
        assert judge.ask({**body, "max_tokens": 5000}).reason == REQUEST_REFUSED
        assert judge.ask(Rubric("praises", "m").body("Hello", "Good day " * 5000)).reason == REQUEST_REFUSED
        with pytest.raises(ConfigError, match="holds logit_bias, which --backend vllm does not know"):
            judge.ask({**body, "logit_bias": {}})
    finally:
        judge.close()
    assert judge.ask(body).reason == REQUEST_REFUSED


class NoEngine:
    """In the place of an engine; it fails at whatever it is asked."""

    device = "cpu"

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        pass

    def run(self, *arguments: Any, **settings: Any) -> None:
        raise KeyError("nobody thought of this")

    def close(self) -> None:
        pass


@pytest.fixture
def without_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMJudge]:
    monkeypatch.setattr("pairtrace.engine.vllm.judge.Engine", NoEngine)
    judge = VLLMJudge(str(model), OPTIONS)
    yield judge
    judge.close()


def test_a_template_without_a_system_turn_gets_one_turn_of_the_user(
    fond_of_spaces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairtrace.engine.vllm.judge.Engine", NoEngine)
    judge = VLLMJudge(str(fond_of_spaces), OPTIONS)
    body = Rubric("praises the user", "m").body("Hello", "Good day")
    request = judge._request(body)
    judge.close()
    assert request is not None
    text = load_tokenizer(fond_of_spaces).decode(request.prompt)
    system, user = (message["content"] for message in body["messages"])
    assert text == f"user: {system}\n\n{user}\n"


def test_a_template_that_takes_no_question_is_refused_before_an_engine_starts(
    fond_of_spaces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairtrace.engine.vllm.judge.Engine", NoEngine)
    model = Path(shutil.copytree(fond_of_spaces, tmp_path / "model"))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{{ raise_exception('not me') }}"
    tokenizer.save_pretrained(model)
    with pytest.raises(ConfigError, match=r"cannot be asked: .*not me"):
        VLLMJudge(str(model), OPTIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot"}, "a setting that vLLM refuses.*hot"),
        ({"temperature": -1}, "a setting that vLLM refuses"),
        ({"top_p": 7}, "a setting that vLLM refuses"),
        ({"max_tokens": 0}, "a setting that vLLM refuses"),
        ({"response_format": "json"}, "a setting that vLLM refuses"),
        ({"temperature": 0.5, "seed": 1}, "leave the seed out"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str, without_engine: VLLMJudge) -> None:
    """A seed on a CPU: where a step computes a part of a prompt that is sampled with one, the engine dies."""
    body = Rubric("praises", "m", settings).body("Hello", "Good day")
    with pytest.raises(ConfigError, match=message):
        without_engine.ask(body)


def test_without_a_limit_an_answer_may_fill_the_context(without_engine: VLLMJudge) -> None:
    request = without_engine._request(Rubric("praises", "m", {"max_tokens": None}).body("Hello", "Good day"))
    assert request is not None
    assert len(request.prompt) + request.params.max_tokens == without_engine._context


@pytest.mark.timeout(60)
def test_nobody_waits_for_an_answer_that_will_not_come(without_engine: VLLMJudge) -> None:
    with pytest.raises(KeyError, match="nobody thought of this"):
        without_engine.ask(Rubric("praises", "m").body("Hello", "Good day"))
