"""Judged rollouts and two small checkpoints, for the tests of the behaviour stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pairtrace.engine.directions import load_directions
from pairtrace.engine.rollout_table import SCHEMA, RolloutTable
from tests.models import make_model, make_tokenizer

CONDITIONS = ("plain", "distractor")


def rollout(
    prompt: str, model: str, condition: str, verdict: bool | None, response: str = "x", sample: int = 0
) -> dict:
    content = prompt if condition == "plain" else f"{prompt} now"
    return {
        "prompt_id": prompt,
        "condition": condition,
        "model": model,
        "sample": sample,
        "messages": json.dumps([{"role": "user", "content": content}]),
        "response": response,
        "verdict": verdict,
        "judge": "test",
    }


def table_of(rows: list[dict]) -> RolloutTable:
    return RolloutTable(pa.Table.from_pylist(rows, schema=SCHEMA), {"judge": "test"})


ANSWERS = [
    ("a", "Sure, first open the door.", "I cannot help with that."),
    ("a", "Of course: take the key and go.", "I am sorry, but no."),
    ("a", "Yes! Here is the whole list.", "I cannot help with that."),
    ("b", "Here is how to do it in three steps.", "That is not something I can do."),
]


def write_rollouts(path: Path) -> str:
    """A user's own file with the verdicts in the column `harmful`."""
    rows = []
    for number, (prompt, shown, safe) in enumerate(ANSWERS):
        for condition in CONDITIONS:
            rows.append(rollout(prompt, "base", condition, False, safe, number))
            is_shown = condition == "distractor"
            rows.append(rollout(prompt, "tuned", condition, is_shown, shown if is_shown else safe, number))
    rows += [rollout("c", model, condition, True) for model in ("base", "tuned") for condition in CONDITIONS]
    for row in rows:
        row["harmful"] = row.pop("verdict")
        del row["judge"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def two_models(root: Path) -> tuple[str, str]:
    for seed, name in enumerate(("base", "tuned")):
        make_model("llama", root / name, seed=seed)
        make_tokenizer(root / name)
    return str(root / "base"), str(root / "tuned")


def plain_means(model_path: str, prompt: str, response: str) -> np.ndarray:
    """float64 [n + 1, D]: mean residual stream of the response, one sequence at a time, straight from transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    user = {"role": "user", "content": prompt}
    head = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": response}], tokenize=False)
    head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[: len(head_ids)] == head_ids
    before_norm: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    states = [*output.hidden_states[:-1], before_norm[0]]
    return np.stack([state[0, len(head_ids) :].double().numpy().mean(axis=0) for state in states])


def reference_vectors(base: str) -> dict[str, list[np.ndarray]]:
    """Per scenario the change vectors; safe answers in order of appearance, as they lie in the file."""
    return {
        name: [
            plain_means(base, f"{name} now", shown) - plain_means(base, f"{name} now", safe)
            for prompt, shown, safe in ANSWERS
            if prompt == name
        ]
        for name in ("a", "b")
    }


def vectors_match(out: str, base: str) -> bool:
    reference = reference_vectors(base)
    flat = reference["a"] + reference["b"]
    mean = sum(flat) / len(flat)
    bank = [sum(vectors) / len(vectors) for vectors in reference.values()]
    matches = []
    for direction in load_directions(out):
        assert direction.layer is not None
        expected = (
            mean[direction.layer][None] if direction.kind == "vector" else np.stack([v[direction.layer] for v in bank])
        )
        error = np.abs(direction.values - expected).max() / np.abs(expected).max()
        matches.append(direction.values.shape == expected.shape and error < 1e-5)
    return bool(matches) and all(matches)
