"""Tokenizers, chat templates and rows that rendering is tried on."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HH = SHARED_DATA / "hh-rlhf-harmless-test.jsonl.gz"
SHAREGPT = SHARED_DATA / "dpo-en-demo.json.gz"

needs_shared_data = pytest.mark.skipif(not HH.is_file(), reason=f"the shared preference data is not at {SHARED_DATA}")

SPECIAL = ["<eos>", "<s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<think>", "</think>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips every message, folds the system message into the first request, ends responses with the eos token.
LLAMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
# The generation prompt ends with an empty thought that the whole conversation lacks.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# Refuses conversations whose turns do not alternate; shows tools and a variable of the row.
STRICT = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% if style is defined %}({{ style }}){% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hh_rows() -> list[dict[str, str]]:
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sharegpt_rows() -> list[dict[str, Any]]:
    with gzip.open(SHAREGPT, "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = json.load(file)
    return rows


def hh_to_messages(text: str) -> list[dict[str, str]]:
    """An HH-RLHF dialogue as messages, written apart from the one in the package."""
    pieces = re.split(r"(\n\nHuman: |\n\nAssistant: )", text)
    assert pieces[0] == ""
    roles = {"\n\nHuman: ": "user", "\n\nAssistant: ": "assistant"}
    return [{"role": roles[pieces[i]], "content": pieces[i + 1]} for i in range(1, len(pieces), 2)]


def sharegpt_to_messages(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A row of the ShareGPT file in TRL's conversational form, written apart from the one in the package."""
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    return {
        "prompt": [{"role": names[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
        "chosen": [{"role": "assistant", "content": row["chosen"]["value"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]["value"]}],
    }


def make_tokenizer(texts: list[str], template: str | None = CHATML, *, adds_bos: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on a few texts."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    if adds_bos:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", model.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer
