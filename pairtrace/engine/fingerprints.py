"""Fingerprints of a tokenizer and its chat template: what decides which tokens a pair becomes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprints(tokenizer: Any, chat_template: str | None = None) -> tuple[str, str]:
    """Fingerprints of everything that rendering depends on, stable over processes and machines.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        chat_template: the template that replaces the tokenizer's own, if any.

    Returns:
        Two SHA-256 digests in hex: of the tokenizer (vocabulary, rules, special tokens), of the template.
    """
    template = chat_template if chat_template is not None else tokenizer.chat_template
    return _digest(_description(tokenizer)), _digest(template)


def _description(tokenizer: Any) -> dict[str, Any]:
    # The probe shows what no file tells, such as whether special tokens within a text are split.
    probe = " ".join(["A probe:", *tokenizer.all_special_tokens, "\n\tnaïve 漢字 42."])
    description: dict[str, Any] = {
        "special_tokens": tokenizer.special_tokens_map,
        "probe": [tokenizer(probe, add_special_tokens=added)["input_ids"] for added in (False, True)],
    }
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls with padding or truncation leave their settings in the backend; rendering uses neither.
        backend.pop("padding", None)
        backend.pop("truncation", None)
        return {**description, "backend": backend}
    added = {
        str(index): [
            token.content,
            token.lstrip,
            token.rstrip,
            token.single_word,
            token.normalized,
            token.special,
        ]
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    vocabulary_file = getattr(tokenizer, "vocab_file", None)
    options = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, bool | int | float) and name != "model_max_length"
    }
    return {
        **description,
        "class": type(tokenizer).__qualname__,
        "vocabulary": tokenizer.get_vocab(),
        "vocabulary_file": _file_digest(vocabulary_file) if vocabulary_file else None,
        "added": added,
        "options": options,
    }


def _file_digest(path: str) -> str | None:
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
