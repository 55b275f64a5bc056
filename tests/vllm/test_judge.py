"""A judge in vLLM: structured output from the real engine, whatever the model is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.baselines.judge import score_by_judge
from pairtrace.engine.baselines.judge_client import REQUEST_REFUSED
from pairtrace.engine.baselines.judge_config import JudgeConfig
from pairtrace.engine.baselines.judge_request import Rubric
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
