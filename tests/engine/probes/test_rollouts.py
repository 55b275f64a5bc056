"""Judged responses read through a model: the right tokens at the right layer, against transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.probes import rollout_examples
from pairtrace.engine.probes.config import ExamplesConfig, ProbeTrainConfig
from pairtrace.engine.probes.judged_responses import read_judged
from pairtrace.engine.probes.probe_file import load_probes
from pairtrace.engine.probes.rollout_examples import RolloutExamples
from pairtrace.engine.probes.train import train_probes
from pairtrace.engine.progress import NULL_PROGRESS
from pairtrace.errors import DataFormatError, DataMismatchError, ExamplesError, LayerError
from tests.engine.behavior_cases import plain_means, rollout, table_of, two_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return two_models(tmp_path_factory.mktemp("models"))[0]


ANSWERS = [
    ("a", "base", "plain", False, "I cannot help with that."),
    ("a", "tuned", "distractor", True, "Sure, first open the door."),
    ("b", "base", "plain", None, "Perhaps."),
    ("b", "tuned", "plain", True, "."),
    ("b", "tuned", "distractor", False, "That is not something I can do, and I will not."),
    ("c", "base", "plain", False, "   "),
]


def write(path: Path, rows: list[tuple[Any, ...]] = ANSWERS) -> str:
    table = table_of(
        [rollout(prompt, *rest[:2], *rest[2:], sample=place) for place, (prompt, *rest) in enumerate(rows)]
    )
    table.write(path)
    return str(path)


def read(rollouts: str, model: str, **changed: Any) -> RolloutExamples:
    config = ExamplesConfig(rollouts=rollouts, model=model, device="cpu", **changed)
    with CostMeter(method="probe", stage="test", device="cpu") as meter:
        return RolloutExamples.read(config, meter, NULL_PROGRESS)


def means_are_right(examples: RolloutExamples, model: str) -> bool:
    kept = [
        (f"{p} now" if c == "distractor" else p, text) for p, _, c, v, text in ANSWERS if v is not None and text.strip()
    ]
    references = [plain_means(model, prompt, text) for prompt, text in kept]
    for layer in examples.layers:
        positions, rows = next(iter(examples.blocks(layer)))
        assert positions.tolist() == list(range(len(kept)))
        expected = np.stack([one[layer] for one in references])
        if np.abs(rows - expected).max() > 1e-5 * np.abs(expected).max():
            return False
    return True


def test_activations_are_those_of_transformers(model: str, tmp_path: Path) -> None:
    examples = read(write(tmp_path / "r.parquet"), model)
    assert examples.layers == (1, 2, 3, 4) and examples.width == 32
    assert means_are_right(examples, model)
    assert examples.labels.tolist() == [0, 1, 1, 0]
    assert examples.prompts.tolist() == [0, 0, 1, 1]  # with and without distractor is one prompt
    assert len(set(examples.contents.tolist())) == 4
    assert examples.left_out == {"without_verdict": 1, "empty_response": 1}


@pytest.mark.parametrize("mutation", [-1, 1, "companion"])
def test_other_layers_and_tokens_are_caught(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: Any
) -> None:
    if mutation == "companion":
        real = rollout_examples._rendered

        def swapped(renderer: Any, chunk: Any) -> Any:
            from dataclasses import replace

            return [
                replace(one, chosen_ids=one.rejected_ids, chosen_start=one.rejected_start)
                for one in real(renderer, chunk)
            ]

        monkeypatch.setattr(rollout_examples, "_rendered", swapped)
        assert not means_are_right(read(write(tmp_path / "r.parquet"), model), model)
        return
    examples = read(write(tmp_path / "r.parquet"), model, layers=(2, 3))
    assert means_are_right(examples, model)
    examples.layers = tuple(layer + mutation for layer in examples.layers)
    assert not means_are_right(examples, model)


def test_files_of_evaluate_and_of_users(tmp_path: Path) -> None:
    """The column `behavior` of responses; text prompts; some models only."""
    rows = [
        {"model": "m0", "prompt_id": "p", "messages": json.dumps([{"role": "user", "content": "Why?"}]),
         "response": "No.", "behavior": False},
        {"model": "m1", "prompt_id": "p", "messages": json.dumps([{"role": "user", "content": "Why?"}]),
         "response": None, "behavior": None},
        {"model": "m1", "prompt_id": "q", "messages": json.dumps([{"role": "user", "content": "How?"}]),
         "response": "So.", "behavior": True},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.responses.parquet")
    found, left_out = read_judged(str(tmp_path / "x.responses.parquet"))
    assert [(one.row, one.prompt, one.label, one.response) for one in found] == [(0, "p", 0, "No."), (2, "q", 1, "So.")]
    assert left_out == {"without_verdict": 1}
    found, left_out = read_judged(str(tmp_path / "x.responses.parquet"), answers_of=("m1",))
    assert [one.row for one in found] == [2] and left_out == {"of_another_model": 1, "without_verdict": 1}
    with pytest.raises(DataMismatchError, match="no responses of m2; it has those of m0, m1"):
        read_judged(str(tmp_path / "x.responses.parquet"), answers_of=("m2",))
    for name in ("absent.parquet", "absent.jsonl", "absent.jsonl.gz"):
        with pytest.raises(DataFormatError, match=rf"cannot read the responses .*{name}: there is no such file$"):
            read_judged(str(tmp_path / name))
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "Why?", "response": "No.", "bad": 0}\n{"prompt": "Why?", "response": "Yes", "bad": 1}\n')
    found, _ = read_judged(str(own), label_column="bad")
    assert [one.label for one in found] == [0, 1] and found[0].prompt == found[1].prompt
    assert found[0].messages == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (
            {"prompt": "a", "response": "b"},
            DataFormatError,
            "row 0: no column 'verdict'; columns found: prompt, response",
        ),
        ({"prompt": "a", "verdict": True}, DataFormatError, "row 0: no column 'response'"),
        ({"prompt": "a", "response": 3, "verdict": True}, DataFormatError, "response is 3; expected text"),
        ({"response": "b", "verdict": True}, DataFormatError, "expected a conversation in 'messages'"),
        ({"messages": "[", "response": "b", "verdict": True}, DataFormatError, "neither a list nor JSON"),
        ({"messages": "[]", "response": "b", "verdict": True}, DataFormatError, "must be a non-empty list"),
        ({"prompt": "a", "response": "b", "verdict": "yes"}, ExamplesError, "verdict is no label.*found 'yes'"),
    ],
)
def test_unusable_rows(tmp_path: Path, line: dict[str, Any], error: type[Exception], message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(error, match=message):
        read_judged(str(path))


def test_a_probe_from_rollouts(model: str, tmp_path: Path) -> None:
    rows = [
        (
            f"prompt {number}",
            "tuned",
            "plain",
            bool(number % 2),
            ("Sure, " if number % 2 else "I cannot ") + f"do {number}",
        )
        for number in range(60)
    ]
    path = write(tmp_path / "r.parquet", rows)
    found = train_probes(
        ProbeTrainConfig(
            rollouts=path, model=model, layers=(2, 4), device="cpu", out=str(tmp_path / "p.safetensors"),
            strengths=(0.01, 1.0), folds=3,
        )
    )  # fmt: skip
    assert (found.examples, found.prompts, found.held_out_examples) == (60, 60, 12)
    assert all(one.figures.roc_auc.value == 1.0 for one in found.probes if one.role == "training")
    assert load_probes(found.out)[0].model_fingerprint == read(path, model, layers=(2,)).origin.model_fingerprint
    few = read(path, model, layers=(2,), max_rows=20)
    assert len(few.labels) == 20 and few.left_out == {"beyond_max_rows": 40}


def test_refusals(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet")
    with pytest.raises(LayerError, match="layer 5 is outside this model"):
        read(path, model, layers=(5,))
    undecided = write(tmp_path / "u.parquet", [("a", "base", "plain", None, "Perhaps.")])
    with pytest.raises(ExamplesError, match="has no judged responses: expected at least one, found 1 without_verdict"):
        read(undecided, model)
    with pytest.raises(ExamplesError, match=r"can read none of the judged responses: .*found 4 prompt_too_long"):
        read(path, model, max_length=2)
    with pytest.raises(ExamplesError, match="at least 6 prompts"):
        train_probes(ProbeTrainConfig(rollouts=path, model=model, device="cpu", out=str(tmp_path / "p.safetensors")))
    examples = read(path, model, layers=(2,))
    examples._means[1, 0, 3] = np.inf
    with pytest.raises(ExamplesError, match=r"row 1 is not finite at layer 2, column 3: .*found inf"):
        list(examples.blocks(2))
