"""The report end to end on random models, against the stages that it is made of."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pairtrace.cli import app
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.detectability.areas import split_examples
from pairtrace.engine.detectability.config import DetectabilityConfig
from pairtrace.engine.detectability.measure import detectability
from pairtrace.engine.probes.config import ProbeEvalConfig, ProbeTrainConfig
from pairtrace.engine.probes.evaluate import evaluate_probes
from pairtrace.engine.probes.probe_file import trained_prompts
from pairtrace.engine.probes.train import train_probes
from pairtrace.errors import ConfigError, DataError, ExamplesError, ProbeMismatchError
from tests.engine.extraction import write_rows
from tests.engine.training.test_resume import StopsAfter
from tests.models import make_model, make_tokenizer


@dataclass(frozen=True)
class Case:
    """Two models, a probe of the first, and what they are measured on."""

    before: Path
    after: Path
    probe: Path
    rollouts: Path
    prompts: Path
    text: Path

    def config(self, out: Path, **changes: Any) -> DetectabilityConfig:
        settings: dict[str, Any] = {
            "prompts": str(self.prompts), "before": str(self.before), "after": (f"tuned={self.after}",),
            "probe": str(self.probe), "rollouts": str(self.rollouts), "text": str(self.text), "out": str(out),
            "folds": 2, "max_new_tokens": 4, "replicates": 50, "device": "cpu",
        }  # fmt: skip
        return DetectabilityConfig(**{**settings, **changes})


def judged(number: int) -> list[dict[str, Any]]:
    """Two responses to a prompt whose words tell the class most of the time."""
    told = number % 5 != 0
    return [
        {"prompt_id": f"q{number}", "prompt": f"How do I do {number}?", "response": text, "verdict": verdict}
        for text, verdict in (
            (f"take a hammer and break it {number}", told),
            (f"sorry, not {number} of them", not told),
        )
    ]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("detectability")
    for name, seed in (("before", 0), ("after", 1)):
        make_tokenizer(root / name)
        make_model("olmo2", root / name, num_hidden_layers=2, seed=seed)
    rollouts = write_rows(root / "judged.jsonl", [row for number in range(30) for row in judged(number)])
    train_probes(
        ProbeTrainConfig(
            rollouts=str(rollouts), model=str(root / "before"), layers=(1, 2), out=str(root / "harm.safetensors"),
            folds=2, test_share=0.4, hold_out=2, device="cpu",
        )
    )  # fmt: skip
    prompts = [
        {"id": f"{cell}{number}", "prompt": f"Tell me {number}", "cell": cell}
        for cell in ("harmful", "benign") for number in range(4)
    ]  # fmt: skip
    text = [{"prompt": f"Word {number}:", "completion": " yes and no"} for number in range(5)]
    return Case(
        before=root / "before",
        after=root / "after",
        probe=root / "harm.safetensors",
        rollouts=rollouts,
        prompts=write_rows(root / "prompts.jsonl", prompts),
        text=write_rows(root / "text.jsonl", text),
    )


def test_report_agrees_with_its_stages(case: Case, tmp_path: Path) -> None:
    report = detectability(case.config(tmp_path / "report.json"))
    (layer,) = report.layers
    for model, found in ((case.before, report.before), (case.after, report.runs[0])):
        measured = evaluate_probes(
            ProbeEvalConfig(
                probe=str(case.probe), rollouts=str(case.rollouts), model=str(model), layers=(layer,), device="cpu"
            )
        )
        area = measured.find("harm", layer).roc_auc
        figure = found.figures["training"]
        assert (figure.value, figure.low, figure.high) == pytest.approx((area.value, area.low, area.high))
        for name in ("harm-held-out-1", "harm-held-out-2", "harm-mean-difference"):
            assert found.probes[f"{name}/{layer}"] == pytest.approx(measured.find(name, layer).roc_auc.value)
    # On the model of the probes, a new probe learns from the same examples and becomes the old one.
    assert report.before.figures["retrained"].value == pytest.approx(report.before.figures["training"].value)
    assert report.runs[0].figures["retrained"].value != pytest.approx(report.runs[0].figures["training"].value)
    assert report.methods[0].changes["loss"].value == pytest.approx(
        report.runs[0].figures["loss"].value - report.before.figures["loss"].value
    )
    assert report.before.figures["loss"].value == pytest.approx(plain_loss(case.before, case.text), rel=1e-5)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["before"]["figures"]["behavior"]["value"] == report.before.figures["behavior"].value
    assert (tmp_path / "report.svg").read_text().startswith("<svg")
    assert [row["model"] for row in report.rows()] == ["before", "tuned"]


def plain_loss(path: Path, text: Path) -> float:
    """Nats per completion token with transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), load_tokenizer(path)
    nats, tokens = 0.0, 0
    for row in map(json.loads, text.read_text().splitlines()):
        head = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor(tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"])
        with torch.no_grad():
            predicted = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        nats -= float(predicted[torch.arange(len(ids) - 1), ids[1:]][len(head) - 1 :].sum())
        tokens += len(ids) - len(head)
    return nats / tokens


def test_held_out_figure_is_that_of_the_mean_probability(case: Case, tmp_path: Path) -> None:
    from pairtrace.engine.cost import CostMeter
    from pairtrace.engine.probes.probe_file import load_probes
    from pairtrace.engine.probes.rollout_examples import RolloutExamples
    from pairtrace.engine.progress import NULL_PROGRESS

    config = case.config(tmp_path / "report.json")
    report = detectability(config)
    (layer,) = report.layers
    with CostMeter(method="test", stage="test", device="cpu") as meter:
        examples = RolloutExamples.read(config.reading(str(case.after), (layer,)), meter, NULL_PROGRESS)
    learned, judged_on = split_examples(config, examples, trained_prompts(case.probe))
    assert not set(examples.prompts[learned]) & set(examples.prompts[judged_on])
    assert (learned ^ judged_on).all()
    ((_, rows),) = examples.blocks(layer)
    probes = load_probes(case.probe, layers=(layer,), roles=("held-out",))
    mean = np.mean([probe.probabilities(rows[judged_on]) for probe in probes], axis=0)
    expected = roc_auc_score(examples.labels[judged_on], mean)
    assert report.runs[0].figures["held-out"].value == pytest.approx(expected)


def test_a_rerun_measures_nothing_again_and_a_new_model_alone(case: Case, tmp_path: Path) -> None:
    first = detectability(case.config(tmp_path / "report.json"))
    seen = StopsAfter(0)
    again = detectability(case.config(tmp_path / "report.json"), seen)
    assert seen.stages == [] and again.before == first.before and again.runs == first.runs
    copy = shutil.copytree(case.after, tmp_path / "copy")
    make_model("olmo2", copy, num_hidden_layers=2, seed=2)
    more = detectability(case.config(tmp_path / "report.json", after=(f"tuned={case.after}", f"tuned={copy}")), seen)
    assert [stage for stage in seen.stages if str(case.before) in stage] == []
    assert [method.runs for method in more.methods] == [2]
    values = [run.figures["training"].value for run in more.runs]
    assert more.methods[0].figures["training"].value == pytest.approx(np.mean(values))


def test_the_command(case: Case, tmp_path: Path) -> None:
    arguments = ["detectability", case.prompts, case.before, f"tuned={case.after}", "--probe", case.probe]
    arguments += ["--rollouts", case.rollouts, "--out", tmp_path / "report.json", "--folds", "2", "--device", "cpu"]
    arguments += ["--max-new-tokens", "4", "--replicates", "50"]
    shown = CliRunner().invoke(app, list(map(str, arguments)))
    assert shown.exit_code == 0, shown.output
    assert re.search(r"before +1 .*\n +tuned +1 ", shown.stdout)
    assert "retrained: ROC-AUC of probes trained on this model's own activations" in shown.stdout
    assert "loss" not in shown.stdout, "no texts were given"


def test_new_prompts_are_split(case: Case, tmp_path: Path) -> None:
    """Rollouts without a prompt of the probes' training: half of them train the new probes."""
    rollouts = write_rows(tmp_path / "new.jsonl", [row for number in range(100, 120) for row in judged(number)])
    report = detectability(case.config(tmp_path / "report.json", rollouts=str(rollouts)))
    assert 0 <= report.before.figures["retrained"].value <= 1


def test_wrong_input(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ProbeMismatchError, match="another model fingerprint"):
        detectability(case.config(tmp_path / "r.json", before=str(case.after), after=(f"tuned={case.before}",)))
    make_tokenizer(tmp_path / "narrow")
    make_model("olmo2", tmp_path / "narrow", num_hidden_layers=2, hidden_size=16)
    with pytest.raises(ProbeMismatchError, match=r"another width than .*: expected 16, found 32"):
        detectability(case.config(tmp_path / "r.json", after=(f"narrow={tmp_path / 'narrow'}",)))
    alone = write_rows(tmp_path / "alone.jsonl", [judged(number)[0] for number in range(101, 105)])
    with pytest.raises(ExamplesError, match="class 1 alone"):
        detectability(case.config(tmp_path / "r.json", rollouts=str(alone)))
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        detectability(case.config(tmp_path / "r.json", text=str(tmp_path / "nowhere.jsonl")))
    assert not list(tmp_path.glob("r.*")), "refused before any model answers"
    with pytest.raises(ConfigError, match=r"reports end in \.json"):
        case.config(tmp_path / "report.txt")
    with pytest.raises(ConfigError, match="give the trained one another name"):
        case.config(tmp_path / "r.json", after=(f"before={case.after}",))
    with pytest.raises(ConfigError, match="no trained checkpoint"):
        case.config(tmp_path / "r.json", after=())
