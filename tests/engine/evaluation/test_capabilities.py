from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pairtrace.engine.evaluation.capabilities import capability_scores
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.parts import open_part
from pairtrace.errors import ConfigError, MissingDependencyError

RESULTS = {
    "hellaswag": {"alias": "hellaswag", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.6, "n": 3},
    "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "name": "gsm8k"},
}


class FakeLmEval(ModuleType):
    """Takes exactly the documented arguments of `lm_eval.simple_evaluate` that are used."""

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.calls: list[dict[str, Any]] = []

    def simple_evaluate(
        self,
        model: str,
        model_args: Any = None,
        tasks: Any = None,
        num_fewshot: Any = None,
        batch_size: Any = None,
        device: Any = None,
        limit: Any = None,
        log_samples: bool = True,
        apply_chat_template: bool | str = False,
    ) -> dict[str, Any]:
        assert isinstance(tasks, list) and isinstance(model_args, dict)
        self.calls.append(
            {"model": model, "limit": limit, "device": device, "batch_size": batch_size, "tasks": tasks, **model_args}
        )
        if tasks[0] not in RESULTS:
            raise KeyError(tasks[0])
        assert apply_chat_template and not log_samples
        return {"results": {tasks[0]: RESULTS[tasks[0]]}, "configs": {}, "versions": {}}


def config(*tasks: str) -> EvaluateConfig:
    return EvaluateConfig(prompts="p.jsonl", models=("m",), lm_eval=tasks, lm_eval_limit=7, batch_size=5, device="cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLmEval:
    module = FakeLmEval()
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return module


def test_scores_and_arguments(fake: FakeLmEval, model: Path, tmp_path: Path) -> None:
    with open_part(tmp_path, "capabilities", {"a": 1}) as part:
        scores = capability_scores(config("hellaswag", "gsm8k"), str(model), part)
    assert scores == {
        "hellaswag": {
            "acc,none": {"value": 0.5, "stderr": 0.01},
            "acc_norm,none": {"value": 0.6, "stderr": None},
        },
        "gsm8k": {"exact_match,strict-match": {"value": 0.25, "stderr": None}},
    }
    assert [call["tasks"] for call in fake.calls] == [["hellaswag"], ["gsm8k"]]
    assert fake.calls[0] == {
        "model": "hf",
        "limit": 7,
        "device": "cpu",
        "batch_size": 5,
        "tasks": ["hellaswag"],
        "pretrained": str(model),
        "dtype": "auto",
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    # A second run reads what the first one found.
    with open_part(tmp_path, "capabilities", {"a": 1}) as part:
        assert capability_scores(config("gsm8k", "hellaswag"), str(model), part) == scores
    assert len(fake.calls) == 2


def test_an_unknown_task_is_named(fake: FakeLmEval, model: Path) -> None:
    with open_part(None, "capabilities", {}) as part, pytest.raises(ConfigError, match="cannot run 'poetry'"):
        capability_scores(config("poetry"), str(model), part)


def test_the_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with (
        open_part(None, "capabilities", {}) as part,
        pytest.raises(MissingDependencyError, match=r"pip install 'pairtrace\[lm-eval\]'"),
    ):
        capability_scores(config("gsm8k"), str(model), part)
