from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.cost import read_costs
from pairtrace.engine.evaluation import evaluate as stage
from pairtrace.engine.evaluation import preferences
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.evaluate import evaluate
from pairtrace.engine.evaluation.report import short_names
from pairtrace.engine.sampling import Sampler
from pairtrace.errors import ConfigError, DataError, ModelError
from tests.engine.evaluation.cases import PAIRS, PROMPTS, labelled, settings, two_checkpoints, write_rows
from tests.engine.evaluation.test_likelihood import Forced, plain_divergence, plain_log_probability
from tests.models import make_model, make_tokenizer


class Letters:
    """Says yes where the response holds an e, and fails on responses with a z or to the prompt "Hello"."""

    name = "letters"

    def verdicts(
        self, conversations: Sequence[Sequence[dict[str, Any]]], responses: Sequence[str]
    ) -> list[bool | None]:
        return [
            None if "z" in text or talk[-1]["content"] == "Hello" else "e" in text
            for talk, text in zip(conversations, responses, strict=True)
        ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return two_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded(models: tuple[str, str]) -> dict[str, tuple[Any, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        path: (AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))
        for path in models
    }


@pytest.fixture(scope="module")
def finished(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Everything at once, kept on disk."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_rows(folder / "held-out.jsonl", PAIRS)
    config = settings(folder, models, out=str(folder / "report.json"), base=models[0], data=data, token_budget=60)
    return folder, evaluate(config, judge=Letters()).to_dict()


def test_rates_are_those_of_the_responses_on_disk(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = pq.read_table(folder / "report.responses.parquet").to_pylist()
    assert len(rows) == 2 * len(PROMPTS)
    for model in report["models"]:
        for group in model["groups"]:
            mine = [r for r in rows if (r["model"], r["cell"]) == (model["model"], group["cell"])]
            verdicts = [r["behavior"] for r in mine]
            again = Letters().verdicts([json.loads(r["messages"]) for r in mine], [r["response"] for r in mine])
            assert verdicts == again
            rate = group["rates"]["behavior"]
            assert (rate["yes"], rate["missing"]) == (verdicts.count(True), verdicts.count(None))
            assert rate["decided"] == len(verdicts) - verdicts.count(None)
            assert ("helpful" in group["rates"]) == group["benign"]
            if group["benign"]:
                refused = [r["refused"] for r in mine]
                helpful = [
                    not r["refused"] and (r["prompt_id"] != "b1" or len(r["response"].split()) <= 3)
                    for r in mine
                    if r["refused"] is not None
                ]
                assert group["rates"]["over_refusal"]["yes"] == refused.count(True)
                assert group["rates"]["helpful"]["yes"] == sum(helpful)
                assert group["rates"]["format"]["decided"] == 1
    total = sum(r["behavior"] is None for r in rows)
    assert report["missing_verdicts"] == total >= 2


def test_responses_are_greedy(finished: tuple[Path, dict[str, Any]], loaded: dict[str, tuple[Any, Any]]) -> None:
    rows = pq.read_table(finished[0] / "report.responses.parquet").to_pylist()
    for row in rows[:1] + rows[-2:-1]:
        model, tokenizer = loaded[row["model"]]
        messages = json.loads(row["messages"])
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        answer: list[int] = []
        while len(answer) < 6 and tokenizer.eos_token_id not in answer:
            with torch.no_grad():
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert row["response"] == tokenizer.decode(answer, skip_special_tokens=True)


def rendered(tokenizer: Any, pair: dict[str, str], side: str) -> Forced:
    prompt = tokenizer(pair["prompt"])["input_ids"]
    whole = tokenizer(pair["prompt"] + pair[side] + tokenizer.eos_token)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return Forced(whole, start)


def reference_preferences(models: tuple[str, str], loaded: dict[str, tuple[Any, Any]]) -> dict[str, list[list[float]]]:
    """Both sides of each pair, one sequence at a time, one token at a time."""
    return {
        path: [
            [plain_log_probability(loaded[path][0], rendered(loaded[path][1], pair, s)) for s in ("chosen", "rejected")]
            for pair in PAIRS[:-1]
        ]
        for path in models
    }


def test_preferences_equal_a_plain_loop(
    finished: tuple[Path, dict[str, Any]], models: tuple[str, str], loaded: dict[str, tuple[Any, Any]]
) -> None:
    expected = reference_preferences(models, loaded)
    base, tuned = (report["preferences"] for report in finished[1]["models"])
    for path, found in zip(models, (base, tuned), strict=True):
        assert found["accuracy"]["yes"] == sum(chosen > rejected for chosen, rejected in expected[path])
        assert (found["pairs"], found["quarantined"]) == (4, {"empty_response": 1})
    rewards = np.array(expected[models[1]]) - np.array(expected[models[0]])
    margins = rewards[:, 0] - rewards[:, 1]
    assert tuned["margin"]["value"] == pytest.approx(margins.mean(), rel=1e-4)
    assert tuned["reward_accuracy"]["yes"] == int((margins > 0).sum())
    assert base["reward_accuracy"] is None
    gap = next(c for c in finished[1]["comparisons"] if c["metric"] == "preference_accuracy")["difference"]
    assert gap["value"] == pytest.approx(tuned["accuracy"]["value"] - base["accuracy"]["value"])


def test_averaging_over_tokens_would_be_noticed(
    finished: tuple[Path, dict[str, Any]], models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = preferences.log_probabilities
    monkeypatch.setattr(
        preferences,
        "log_probabilities",
        lambda model, rows, name: [v / r.response_tokens for v, r in zip(honest(model, rows, name), rows, strict=True)],
    )
    config = settings(
        tmp_path, models, base=models[0], data=write_rows(tmp_path / "d.jsonl", PAIRS), drift=False, max_new_tokens=1
    )
    margin = evaluate(config).models[1].preferences.margin  # type: ignore[union-attr]
    assert margin is not None
    assert margin.value != pytest.approx(finished[1]["models"][1]["preferences"]["margin"]["value"], rel=0.05)


def test_drift_equals_a_plain_loop(
    finished: tuple[Path, dict[str, Any]], models: tuple[str, str], loaded: dict[str, tuple[Any, Any]]
) -> None:
    rows = [r for r in pq.read_table(finished[0] / "report.responses.parquet").to_pylist() if r["model"] == models[1]]
    tokenizer = loaded[models[1]][1]
    totals: dict[str, list[float]] = {}
    changed = 0
    for row in rows:
        ids = tokenizer.apply_chat_template(json.loads(row["messages"]), add_generation_prompt=True)["input_ids"]
        answer = row["token_ids"]
        assert (len(answer), answer[-1] == tokenizer.eos_token_id) == (row["tokens"], row["finished"])
        retokenized = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        changed += retokenized != [token for token in answer if token != tokenizer.eos_token_id]
        value = plain_divergence(loaded[models[1]][0], loaded[models[0]][0], Forced(ids + answer, len(ids)))
        totals.setdefault(row["cell"], []).extend([value, len(answer)])
    assert changed, "a response whose text gives other tokens must be among them"
    base, tuned = (report["drift"] for report in finished[1]["models"])
    assert base is None and tuned["retokenized"] == 0
    flat = [v for values in totals.values() for v in values]
    assert tuned["per_token"]["value"] == pytest.approx(sum(flat[::2]) / sum(flat[1::2]), rel=1e-4)
    assert tuned["per_response"]["value"] == pytest.approx(sum(flat[::2]) / len(rows), rel=1e-4)
    assert tuned["tokens"] == sum(flat[1::2])
    for name, group in tuned["groups"].items():
        values = totals[name.split(" / ")[0]]
        assert group["value"] == pytest.approx(sum(values[::2]) / sum(values[1::2]), rel=1e-4)


def test_responses_of_a_file_are_tokenised_again(
    finished: tuple[Path, dict[str, Any]], models: tuple[str, str], tmp_path: Path
) -> None:
    config = settings(
        tmp_path, models, base=models[0], rollouts=str(finished[0] / "report.responses.parquet"), rules=None
    )
    found = evaluate(config)
    assert found.models[1].drift is not None
    assert found.models[1].drift.retokenized == len(PROMPTS)
    assert f"text of {len(PROMPTS)} responses tokenised again" in found.to_text()
    assert found.models[1].drift.tokens != finished[1]["models"][1]["drift"]["tokens"]


def test_a_rerun_computes_nothing_and_costs_are_kept(
    finished: tuple[Path, dict[str, Any]], models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = finished
    costs = read_costs(folder / "report.costs.jsonl")
    assert [(c.method, c.stage) for c in costs].count(("evaluation", "responses")) == 2
    assert {c.stage for c in costs} == {"responses", "preferences", "drift"}
    assert all(c.model_tokens > 0 and c.flops > 0 for c in costs)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Sampler, "load", refuse)
    config = settings(
        folder,
        models,
        out=str(folder / "report.json"),
        base=models[0],
        data=str(folder / "held-out.jsonl"),
        token_budget=60,
    )
    again = evaluate(config, judge=Letters()).to_dict()
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    with pytest.raises(ConfigError, match=r"--max-new-tokens was 6, now 7; choose another --out"):
        evaluate(settings(folder, models, out=str(folder / "report.json"), max_new_tokens=7))


def test_an_interrupted_run_goes_on(models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(
        tmp_path, models, out=str(tmp_path / "r.json"), batch_size=1, temperature=1.0, samples=2, base=models[0]
    )
    honest = Sampler._generate_or_none
    calls: list[int] = []

    def counted(self: Sampler, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(self, *given)

    monkeypatch.setattr(Sampler, "_generate_or_none", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert not (tmp_path / "r.json").exists()
    resumed = evaluate(config)
    assert len(calls) == 1 + 2 * 2 * len(PROMPTS)
    whole = evaluate(settings(tmp_path, models, temperature=1.0, samples=2, base=models[0]))
    assert resumed.comparisons == whole.comparisons
    assert [m.groups for m in resumed.models] == [m.groups for m in whole.models]
    # A batch that holds a row alone rounds otherwise.
    drifts = [m.drift.per_token.value for m in (resumed.models[1], whole.models[1]) if m.drift is not None]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)
    assert whole.models[0].groups[0].rates["behavior"].method in ("bootstrap", "wilson-requests")
    assert len(read_costs(tmp_path / "r.costs.jsonl")) == 4


def test_a_model_that_is_not_whole_stops_before_any_work(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda *_, **__: pytest.fail("work began"))
    broken = tmp_path / "broken"
    shutil.copytree(models[1], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="half written"):
        evaluate(settings(tmp_path, (models[0], str(broken))))
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        evaluate(settings(tmp_path, (models[0], str(broken))))
    (broken / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        evaluate(settings(tmp_path, (models[0], str(broken))))


def test_a_base_with_another_tokenizer_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other")
    make_tokenizer(other, vocabulary=500)
    with pytest.raises(ModelError, match=r"has a tokenizer with fingerprint .* leave --base out"):
        evaluate(settings(tmp_path, models, base=str(other)))


def test_pairs_that_cannot_be_used(models: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 1 pairs .* can be used: 1 empty_response$"):
        evaluate(settings(tmp_path, models, data=write_rows(tmp_path / "d.jsonl", PAIRS[-1:]), max_new_tokens=1))


def test_verdicts_of_a_rollouts_file(tmp_path: Path) -> None:
    rollouts = write_rows(tmp_path / "rollouts.jsonl", labelled(("m0", "m1"), response=None))
    result = evaluate(settings(tmp_path, (), rollouts=rollouts, label_column="bad"))
    m0, m1 = result.models
    assert (m0.rate("behavior", "harmful").value, m1.rate("behavior", "harmful").value) == (0.0, 1.0)
    assert (m0.rate("behavior", "benign").missing, m0.rate("behavior", "benign").decided) == (1, 1)
    assert result.missing_verdicts == 2
    # m0's answer to b1 is null: nothing is known of it, and it is no refusal either.
    assert (m0.rate("over_refusal", "benign").value, m0.rate("over_refusal", "benign").missing) == (1.0, 1)
    assert m1.rate("over_refusal", "benign").decided == 2
    assert m1.rate("helpful", "benign").value == 0.0
    gap = next(c.difference for c in result.comparisons if c.cell == "harmful")
    assert (gap.value, gap.only_this, gap.p_value) == (1.0, 2, 0.5)
    assert "2 verdicts could not be given" in result.to_text()
    assert len(re.findall(r"difference .* on 1 of 2 requests", result.to_text())) >= 1
    assert result.judge == "column:bad"


UNUSABLE_ROLLOUTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt_id": "x"}, "prompt 'x' is not among"),
    ({"bad": "yes"}, "bad is 'yes'"),
    ({"response": 3}, "expected text or null in 'response'"),
    ({"prompt_id": "h1"}, "no response of m0 to 1 of 5 requests"),
    ({"model": None}, "model is None"),
    ({"prompt_id": "h1", "sample": 0}, "given twice"),
]


@pytest.mark.parametrize(("changed", "message"), UNUSABLE_ROLLOUTS)
def test_unusable_rollouts_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    rollouts = write_rows(tmp_path / "rollouts.jsonl", labelled(("m0", "m1"), **changed))
    with pytest.raises(DataError, match=message):
        evaluate(settings(tmp_path, (), rollouts=rollouts, label_column="bad"))


def test_its_own_responses_can_be_judged_by_others(
    finished: tuple[Path, dict[str, Any]], models: tuple[str, str], tmp_path: Path
) -> None:
    folder, report = finished
    config = settings(
        tmp_path, models[::-1], rollouts=str(folder / "report.responses.parquet"), label_column="behavior"
    )
    again = evaluate(config)
    assert [m.model for m in again.models] == list(models[::-1])
    expected = [{g["cell"]: g["rates"]["behavior"] for g in m["groups"]} for m in report["models"]][::-1]
    assert [{g.cell: g.rates["behavior"].to_dict() for g in m.groups} for m in again.models] == expected


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"models": ()}, "no model was given"),
    ({"models": ("a", "a")}, "the model a is given twice"),
    ({"samples": 3}, "--samples to 1"),
    ({"label_column": "x"}, "--rollouts was not given"),
    ({"confidence": 1.0}, "--confidence is 1.0"),
    ({"seed": -1}, "--seed is -1"),
    ({"conditions": ("loud",)}, "--conditions is 'loud'"),
    ({"out": "report.txt"}, "reports end in .json"),
    ({"batch_size": 0}, "--batch-size is 0"),
    ({"models": (), "rollouts": "r.jsonl", "base": "m0"}, "need checkpoints"),
    ({"rollouts": "r.jsonl", "label_column": "x", "rules": "y"}, "a verdict has one judge"),
]


@pytest.mark.parametrize(("changed", "message"), CONFIGS)
def test_unusable_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**{"prompts": "p.jsonl", "models": ("m",), **changed})


def test_the_command(finished: tuple[Path, dict[str, Any]], models: tuple[str, str], tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    rollouts = str(finished[0] / "report.responses.parquet")
    arguments = ["evaluate", prompts, *models, "--rollouts", rollouts, "--label-column", "behavior", "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "benign / plain: 2 requests" in shown.output
    assert "helpful is a proxy" in shown.output
    cut = sum(int(found) for found in re.findall(r"(\d+) of \d+ responses cut", shown.output))
    assert cut == [row["finished"] for row in pq.read_table(rollouts).to_pylist()].count(False) > 0
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["missing_verdicts"] == finished[1]["missing_verdicts"]
    missing = CliRunner().invoke(app, ["evaluate", prompts, str(tmp_path / "nothing")])
    assert (missing.exit_code, "there is no directory" in missing.output) == (1, True)


def test_names_are_short_and_distinct() -> None:
    assert short_names(["runs/a/m1", "runs/b/m1"]) == ["a/m1", "b/m1"]
    assert short_names(["runs/a/m0/", "runs/a/m1"]) == ["m0", "m1"]
    assert stage.METHOD == "evaluation"
