"""Given responses become the tokens and labels of TRL's SFT trainer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from accelerate import PartialState
from trl import SFTTrainer

from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.finetuning.example_rendering import RenderedExample, render_examples
from pairtrace.engine.finetuning.examples import open_examples
from pairtrace.engine.rendered import Quarantined
from pairtrace.engine.rendering import Renderer
from pairtrace.errors import DataFormatError, ModelError
from tests.engine.finetuning.cases import responses, write_rows


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = [
    *responses(4),
    {
        "prompt": [say("system", "Be kind."), say("user", "Hi"), say("assistant", "Hello"), say("user", "Why? ✓")],
        "completion": [say("assistant", " Because.\n\nIt is so. ✓ 日本")],
    },
    {"prompt": [say("user", "Long " * 30)], "completion": [say("assistant", "answer " * 30)]},
]
TEXTS = [
    {"prompt": "The sky is", "completion": " blue."},
    # The boundary merges: "lo" and "w" may be one token.
    {"prompt": "slo", "completion": "wly, he said"},
    {"prompt": "ends already", "completion": " here<eos>"},
    {"prompt": "many words " * 20, "completion": " and more" * 20},
]


def trl_prepared(rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None, truncation: str) -> list[Any]:
    """`input_ids` and the positions with loss that TRL makes, by row; rows that it drops are absent."""
    PartialState(cpu=True)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, None, True
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode=truncation, dataset_text_field="text",
        assistant_only_loss=False, shuffle_dataset=False, seed=0, packing_strategy="bfd",
    )  # fmt: skip
    numbered = datasets.Dataset.from_list([{**row, "row": number} for number, row in enumerate(rows)])
    prepared = trainer._prepare_dataset(numbered, tokenizer, args, False, None, "train").to_list()
    # A causal model predicts nothing at the first position.
    return [
        (row["row"], row["input_ids"], [place for place, label in enumerate(row["labels"]) if place and label != -100])
        for row in prepared
    ]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 45, 30])
@pytest.mark.parametrize("rows", [CONVERSATIONS, TEXTS], ids=["conversations", "texts"])
def test_tokens_and_labels_are_those_of_trl(
    small: Path, tmp_path: Path, rows: list[dict[str, Any]], max_length: int | None, truncation: str
) -> None:
    tokenizer = load_tokenizer(small)
    source = open_examples(str(write_rows(tmp_path / "rows.jsonl", rows)))
    found = render_examples(Renderer(tokenizer, max_length=max_length, truncation=truncation), list(source.read()))
    ours = [
        (one.row, one.ids.tolist(), list(range(one.start, len(one.ids))))
        for one in found
        if isinstance(one, RenderedExample)
    ]
    expected = trl_prepared(rows, tokenizer, max_length, truncation)
    assert ours == expected
    assert len(ours) + sum(isinstance(one, Quarantined) for one in found) == len(rows)
    if max_length == 30 and truncation == "keep_start":
        assert len(ours) < len(rows)


def test_messages_and_rollouts_are_split_before_the_answer(tmp_path: Path) -> None:
    conversation = [say("user", "Why?"), say("assistant", "So.")]
    kinds = {
        "messages": [{"messages": conversation}],
        "rollouts": [{"messages": json.dumps(conversation[:1]), "response": "So."}],
        "prompts": [{"prompt": "Why?", "response": "So."}],
    }
    for name, rows in kinds.items():
        (example,) = open_examples(str(write_rows(tmp_path / f"{name}.jsonl", rows))).read()
        assert (example.prompt, example.completion) == (conversation[:1], conversation[1:]), name
        assert (example.conversation, example.response) == (conversation[:1], "So.")


def test_named_columns_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"q": f"Why {number}?", "a": " So."}) + "\n" for number in range(5))
    source = open_examples(str(path), prompt="q", completion="a", limit=3)
    assert [example.prompt for example in source.read()] == ["Why 0?", "Why 1?", "Why 2?"]
    assert source.rows == 3 and "3 rows" in source.describe()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "two texts or two lists"),
        ([{"messages": [say("user", "Hi"), say("assistant", "A")]}, {"messages": [say("user", "Hi")]}], "not end with"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " \n"}], "empty_response"),
        ([{"messages": "[]", "response": "b"}, {"messages": "no", "response": "b"}], "no JSON"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(small: Path, tmp_path: Path, rows: list[dict[str, Any]], reason: str) -> None:
    source = open_examples(str(write_rows(tmp_path / "rows.jsonl", rows)))
    last = render_examples(Renderer(load_tokenizer(small)), list(source.read()))[-1]
    assert isinstance(last, Quarantined) and reason in last.reason and last.row == 1


def test_data_without_responses(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"no given responses.*columns found: prompt"):
        open_examples(str(write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])))
    with pytest.raises(DataFormatError, match="no column 'answer'"):
        open_examples(str(write_rows(tmp_path / "rows.jsonl", responses(1))), completion="answer")
    tokenizer = load_tokenizer(small)
    tokenizer.chat_template = None
    source = open_examples(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ModelError, match="no chat template"):
        render_examples(Renderer(tokenizer), list(source.read()))
