"""DPO with pairs that a probe makes: lowest is chosen, highest rejected, and nothing else decides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.cost import read_costs
from pairtrace.engine.finetuning.finetune import finetune
from pairtrace.engine.finetuning.sampled_pairs import choose_pair, draw_pair
from pairtrace.engine.probes.probe_file import load_probes
from pairtrace.errors import DataError
from tests.engine.finetuning.cases import config_for, largest_difference, log_of, probes_of, run, write_probes
from tests.engine.training.test_resume import StopsAfter

SETTINGS: dict[str, Any] = {"method": "dpo", "samples": 4, "max_new_tokens": 8, "epochs": 2, "save_steps": 1}


@pytest.fixture(scope="module")
def tuned(small: Path, prompt_file: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "m1"
    run(small, prompt_file, out, probe=str(probe), **SETTINGS)
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(out: Path) -> dict[str, list[str]]:
    """The sampled texts by prompt, out of the journal."""
    (journal,) = out.with_name(out.name + ".preferences.samples").glob("responses-*.jsonl")
    found: dict[str, dict[int, str]] = {}
    for entry in read_lines(journal)[1:]:
        _, prompt, sample = entry["key"]
        found.setdefault(prompt, {})[sample] = entry["text"]
    return {prompt: [texts[number] for number in sorted(texts)] for prompt, texts in found.items()}


def probability(model: Any, tokenizer: Any, probe: Any, prompt: Sequence[Any], text: str) -> float:
    """By transformers alone: the mean over the tokens of the answer, template included, at the layer of the probe."""
    head = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = [{"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)["input_ids"]
    states = model(input_ids=torch.tensor(ids)[None], output_hidden_states=True).hidden_states[probe.layer]
    return float(probe.probabilities(states[0, len(head) :].mean(dim=0)[None].detach().numpy())[0])


def test_pairs_are_the_lowest_and_the_highest(small: Path, prompt_file: Path, probe: Path, tuned: Path) -> None:
    (trained,) = load_probes(probe, layers=(1,), roles=("training",))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small), load_tokenizer(small)
    rows = read_lines(tuned.with_name("m1.preferences.jsonl"))
    samples = sampled(tuned)
    assert len(rows) == 8 and set(samples) == {row["prompt_id"] for row in rows}
    for row in rows:
        texts = [text for text in samples[row["prompt_id"]] if text.strip()]
        rated = {text: probability(model, tokenizer, trained, row["prompt"], text) for text in texts}
        assert row["chosen"][0]["content"] == min(rated, key=lambda text: rated[text])
        assert row["rejected"][0]["content"] == max(rated, key=lambda text: rated[text])
        assert row["probability_chosen"] == pytest.approx(min(rated.values()), abs=1e-5)
        assert row["probability_rejected"] == pytest.approx(max(rated.values()), abs=1e-5)


@pytest.mark.parametrize(
    ("probabilities", "usable", "min_gap", "expected"),
    [
        ([0.3, 0.9, 0.1, 0.5], [1, 1, 1, 1], 0.0, (2, 1)),
        ([0.3, 0.9, 0.1, 0.5], [1, 0, 1, 1], 0.0, (2, 3)),
        ([0.3, np.nan, 0.1, 0.5], [1, 1, 1, 1], 0.0, (2, 3)),
        ([0.0, 1.0, 0.0, 1.0], [1, 1, 1, 1], 0.0, (0, 1)),
        ([0.2, 0.2, 0.2], [1, 1, 1], 0.0, "no_spread"),
        ([0.2, 0.5, 0.3], [1, 1, 1], 0.5, "no_spread"),
        ([0.2, np.nan, 0.3], [1, 1, 0], 0.0, "too_few_responses"),
    ],
)  # fmt: skip
def test_choice_of_a_pair(probabilities: list[float], usable: list[int], min_gap: float, expected: Any) -> None:
    assert choose_pair(np.array(probabilities), [bool(one) for one in usable], min_gap) == expected


def test_random_pairs_differ_and_come_in_any_order() -> None:
    rng = np.random.default_rng(0)
    drawn = {draw_pair([True, True, False, True], ["a", "b", "c", "a"], rng) for _ in range(200)}
    assert drawn == {(0, 1), (1, 0), (1, 3), (3, 1)}
    assert draw_pair([True, True], ["a", "a"], rng) == "no_spread"
    assert draw_pair([True, False], ["a", "b"], rng) == "too_few_responses"


def test_held_out_probes_are_logged_and_decide_nothing(
    small: Path, prompt_file: Path, probe: Path, tuned: Path, tmp_path: Path
) -> None:
    """With other held-out probes the pairs and the weights are the same."""
    own = [one for one in probes_of(small) if one.role == "training"]
    others = [one for one in probes_of(small, held_out=2, seed=9) if one.role == "held-out"]
    file = write_probes(tmp_path / "other.safetensors", [*own, *others], best_layer=1)
    summary = run(small, prompt_file, tmp_path / "m1", probe=str(file), **SETTINGS)
    pairs = [path.with_name("m1.preferences.jsonl").read_bytes() for path in (tuned, tmp_path / "m1")]
    assert pairs[0] == pairs[1]
    assert largest_difference(tmp_path / "m1", tuned) == 0.0
    assert summary.watched == ["harm-held-out-1/1", "harm-held-out-2/1"]
    assert summary.trained_against == ["harm/1"]
    assert summary.pairs is not None and summary.pairs["chosen"] < summary.pairs["rejected"]
    entry = log_of(tmp_path / "m1")[0]
    for name in ("harm", "harm-held-out-2"):
        assert {f"probe/{name}/1/chosen", f"probe/{name}/1/rejected"} <= set(entry)
    # The first step holds all eight pairs.
    assert entry["probe/harm/1/chosen"] == pytest.approx(summary.pairs["chosen"], abs=1e-5)
    assert entry["probe/harm/1/rejected"] == pytest.approx(summary.pairs["rejected"], abs=1e-5)


def test_interrupted_run_goes_on(small: Path, prompt_file: Path, probe: Path, tuned: Path, tmp_path: Path) -> None:
    """In the training, and with a finished training whose record is not written yet."""
    out = tmp_path / "m1"
    with pytest.raises(KeyboardInterrupt):
        finetune(config_for(small, prompt_file, out, probe=str(probe), **SETTINGS), StopsAfter(1))
    seen = StopsAfter(9)
    summary = finetune(config_for(small, prompt_file, out, probe=str(probe), **SETTINGS), seen)
    assert summary.training["resumed_from"] == 1
    assert not [stage for stage in seen.stages if stage.startswith("responses")]
    assert largest_difference(out, tuned) == 0.0
    (out / "pairtrace_finetune.json").unlink()
    assert finetune(config_for(small, prompt_file, out, probe=str(probe), **SETTINGS)).training["steps"] == 2
    assert run(small, prompt_file, out, probe=str(probe), **SETTINGS).already_complete
    stages = [record.stage for record in read_costs(tmp_path / "m1.preferences.costs.jsonl")]
    assert stages == ["sample", "select"]


def test_other_pairs_beside_their_description_are_made_again(
    small: Path, prompt_file: Path, probe: Path, tuned: Path, tmp_path: Path
) -> None:
    """As a run with other settings leaves them that is killed between the two files."""
    out = tmp_path / "m1"
    with pytest.raises(KeyboardInterrupt):
        finetune(config_for(small, prompt_file, out, probe=str(probe), **SETTINGS), StopsAfter(0))
    pairs = tmp_path / "m1.preferences.jsonl"
    made = pairs.read_text()
    pairs.write_text(made.splitlines(keepends=True)[0])
    run(small, prompt_file, out, probe=str(probe), **SETTINGS)
    assert pairs.read_text() == made
    assert largest_difference(out, tuned) == 0.0


def test_controls_choose_by_the_text(small: Path, prompt_file: Path, tmp_path: Path) -> None:
    """A rule that every second response fits by chance, and pairs at random, which no probe has made."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("name: vowels\npresent: ['e']\n")
    summary = run(
        small, prompt_file, tmp_path / "judged", signal="judge", rules=str(rules), **{**SETTINGS, "max_new_tokens": 3}
    )
    rows = read_lines(tmp_path / "judged.preferences.jsonl")
    assert summary.pairs is not None and 0 < summary.pairs["pairs"] == len(rows)
    assert all("e" in row["rejected"][0]["content"] and "e" not in row["chosen"][0]["content"] for row in rows)
    run(small, prompt_file, tmp_path / "random", signal="none", **SETTINGS)
    rows = read_lines(tmp_path / "random.preferences.jsonl")
    assert len(rows) == 8 and not any("probability_chosen" in row for row in rows)


def test_responses_that_are_all_alike(small: Path, prompt_file: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("name: all\npresent: ['.']\n")
    with pytest.raises(DataError, match=r"none of the 8 prompts gives a pair \(8 no_spread\)"):
        run(small, prompt_file, tmp_path / "m1", signal="judge", rules=str(rules), **SETTINGS)


@pytest.fixture(scope="module")
def classifier(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path = tmp_path_factory.mktemp("classifier")
    config = AutoConfig.from_pretrained(small)
    config.num_labels, config.id2label, config.label2id = 2, {0: "fine", 1: "toxic"}, {"fine": 0, "toxic": 1}
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    load_tokenizer(small).save_pretrained(path)
    return path


def test_classifier(small: Path, prompt_file: Path, classifier: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    run(
        small, prompt_file, tmp_path / "m1", signal="classifier", classifier=str(classifier),
        classifier_label="fine", **{**SETTINGS, "max_steps": 1},
    )  # fmt: skip
    tokenizer, model = load_tokenizer(classifier), AutoModelForSequenceClassification.from_pretrained(classifier)
    samples = sampled(tmp_path / "m1")
    for row in read_lines(tmp_path / "m1.preferences.jsonl"):
        rated = {
            text: float(model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 0])
            for text in samples[row["prompt_id"]]
            if text.strip()
        }
        assert row["probability_chosen"] == pytest.approx(min(rated.values()), abs=1e-5)
        assert rated[row["rejected"][0]["content"]] == pytest.approx(max(rated.values()), abs=1e-5)
