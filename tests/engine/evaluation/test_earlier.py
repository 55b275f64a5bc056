"""A report that is there already: what may be added to it, and what would overwrite it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.earlier import require_addition
from pairtrace.engine.evaluation.evaluate import evaluate
from pairtrace.errors import ConfigError
from tests.engine.evaluation.cases import PROMPTS, labelled, settings, write_rows

EARLIER: dict[str, Any] = {"label_column": "bad", "models": ("m0",), "confidence": 0.9}
REPEATED: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"models": ("m0", "m1")}, None),
    ({"batch_size": 3, "samples": 2, "temperature": 0.5}, "--temperature was 0.0, now 0.5"),
    ({"models": ("m1",)}, "MODEL was m0, now m1"),
    ({"confidence": 0.8}, "--confidence was 0.9, now 0.8"),
    ({"label_column": None}, "--label-column was bad, now not given"),
    ({"prompts": "other"}, "PROMPTS was"),
]


@pytest.mark.parametrize(("changed", "message"), REPEATED)
def test_a_report_is_added_to_and_not_overwritten(tmp_path: Path, changed: dict[str, Any], message: str | None) -> None:
    rollouts = write_rows(tmp_path / "rollouts.jsonl", labelled(("m0", "m1")))
    out = tmp_path / "r.json"
    given = {"rollouts": rollouts, "out": str(out), **EARLIER}
    evaluate(settings(tmp_path, **given))
    before = out.read_bytes()
    if "prompts" in changed:
        changed = {"prompts": write_rows(tmp_path / "other.jsonl", [{**PROMPTS[0], "prompt": "New?"}, *PROMPTS[1:]])}
    if message is None:
        evaluate(settings(tmp_path, **{**given, **changed}))
        return
    with pytest.raises(ConfigError, match=message):
        evaluate(settings(tmp_path, **{**given, **changed}))
    assert out.read_bytes() == before
    out.write_text("{}")
    with pytest.raises(ConfigError, match=r"is no report of this version"):
        evaluate(settings(tmp_path, **given))


ADDED: list[tuple[dict[str, Any], str | None]] = [
    ({"data": "d.jsonl", "base": "m0"}, None),
    ({"samples": 3, "conditions": ("plain", "distractor"), "lm_eval": ("arc",)}, None),
    ({"samples": 1}, "--samples was 2, now 1"),
    ({"conditions": ("distractor",)}, "--conditions was plain, now distractor"),
]


@pytest.mark.parametrize(("changed", "message"), ADDED)
def test_what_may_be_added_to_a_report(tmp_path: Path, changed: dict[str, Any], message: str | None) -> None:
    def content(**more: Any) -> dict[str, Any]:
        given = {"prompts": "p", "models": ("m0",), "temperature": 1.0, "samples": 2, "conditions": ("plain",), **more}
        return {**asdict(EvaluateConfig(**given)), "prompts_fingerprint": "f"}

    out = tmp_path / "r.json"
    out.write_text(json.dumps({"settings": content()}))
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        require_addition(str(out), content(**changed))
    out.write_text(json.dumps({"settings": content(data="d.jsonl", base="m0")}))
    with pytest.raises(ConfigError, match=r"--data was d\.jsonl, now not given"):
        require_addition(str(out), content())
    with pytest.raises(ConfigError, match=r"--max-length was 1024, now 9"):
        require_addition(str(out), content(data="d.jsonl", base="m0", max_length=9))
