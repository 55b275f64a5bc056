"""Tiny random checkpoints and tokenizers, made on the spot: nothing is downloaded."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HH = SHARED_DATA / "hh-rlhf-harmless-test.jsonl.gz"
SHAREGPT = SHARED_DATA / "dpo-en-demo.json.gz"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2}
# A window far shorter than the sequences, so that ignoring it shows.
WINDOW = {"sliding_window": 16}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, **WINDOW, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_neox": {"rotary_pct": 0.25},
    "granite": {**GROUPED, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "llama": GROUPED,
    "mistral": {**GROUPED, **WINDOW},
    "mixtral": {**GROUPED, **WINDOW, **MOE},
    "olmo": {**GROUPED, "clip_qkv": 0.5},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, **WINDOW},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {**GROUPED, **WINDOW},
    "qwen2": {**GROUPED, **WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**GROUPED, "head_dim": 8},
    "qwen3_moe": {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "starcoder2": {**GROUPED, **WINDOW},
}


def make_config(model_type: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**COMMON, **FAMILY_SETTINGS[model_type], **overrides})


def make_model(
    model_type: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 0.25,
    **overrides: Any,
) -> Path:
    """Save a random causal language model, scaled up so that attention patterns and outliers matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(model_type, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 if "embed" in name else scale)
    model.to(dtype).save_pretrained(path)
    return path


@cache
def texts() -> list[str]:
    """A few hundred lines of real text to train a tokenizer on."""
    with gzip.open(HH, "rt", encoding="utf-8") as stream:
        return [json.loads(line)["chosen"] for _, line in zip(range(300), stream, strict=False)]


def make_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE, vocabulary: int = 600) -> Path:
    """Save a byte-level BPE tokenizer with `<pad>`, `<bos>`, `<eos>` and the chat markers of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not HH.is_file():
        pytest.skip(f"{HH} is not there")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    fast.save_pretrained(path)
    return path
