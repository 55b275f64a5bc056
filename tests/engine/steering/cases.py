"""A tiny model that is steered, and a judge of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.steering.config import SteerConfig
from tests.engine.evaluation.cases import PROMPTS, write_rows
from tests.models import make_model, make_tokenizer

WIDTH, BLOCKS, NEW_TOKENS = 16, 3, 8


def make_checkpoint(root: Path) -> str:
    make_model("llama", root, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=BLOCKS)
    make_tokenizer(root)
    return str(root)


def vectors() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(4)
    return {layer: rng.normal(size=WIDTH).astype(np.float32) * 7 for layer in range(BLOCKS + 1)}


def write_directions(path: Path, **changed: Any) -> str:
    made = [
        Direction(name="harm", layer=layer, values=values[None], kind="vector", origin="test", **changed)
        for layer, values in vectors().items()
    ]
    bank = Direction(
        name="harm-bank", layer=1, values=np.eye(2, WIDTH, dtype=np.float32), kind="bank", origin="test", **changed
    )
    states = {f"base:{layer}": state for layer, state in base_states().items()}
    save_directions(path, [*made, bank], {}, tensors=states)
    return str(path)


def base_states() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(5)
    return {layer: rng.normal(size=WIDTH) * 9 for layer in range(BLOCKS + 1)}


def settings(folder: Path, model: str, **changed: Any) -> SteerConfig:
    given: dict[str, Any] = {
        "prompts": write_rows(folder / "prompts.jsonl", PROMPTS),
        "model": model,
        "directions": write_directions(folder / "b.safetensors"),
        "out": str(folder / "steer.json"),
        "max_new_tokens": NEW_TOKENS,
        "batch_size": 4,
        "device": "cpu",
        "replicates": 200,
        "layers": (2,),
        "scales": (0.5,),
    }
    return SteerConfig(**{**given, **changed})


class LengthJudge:
    """Says true where a response has an even number of characters: any rule will do."""

    name = "test:even"

    def verdicts(self, conversations: Sequence[Any], responses: Sequence[str]) -> list[bool | None]:
        return [len(text) % 2 == 0 for text in responses]


def load(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def prompt_ids(tokenizer: Any) -> dict[str, list[int]]:
    """By prompt id, as the requests put them: with the distractor where there is one."""
    found = {}
    for prompt in PROMPTS:
        text = prompt["prompt"] + (f" {prompt['distractor']}" if "distractor" in prompt else "")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        found[prompt["id"]] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return found


class Wrapped(torch.nn.Module):
    """A module followed by a change of what it gives, at some positions."""

    def __init__(self, module: torch.nn.Module, change: Any) -> None:
        super().__init__()
        self.module, self.change, self.where = module, change, slice(None)

    def forward(self, states: torch.Tensor, **keywords: Any) -> torch.Tensor:
        given = self.module(states, **keywords).clone()
        given[:, self.where] = self.change(given[:, self.where])
        return given


def wrap(model: Any, layer: int, change: Any) -> list[Wrapped]:
    """Change the residual stream at one layer."""
    wrapped = Wrapped(model.model.layers[layer - 1], change)
    model.model.layers[layer - 1] = wrapped
    return [wrapped]


def wrap_writers(model: Any, change: Any) -> list[Wrapped]:
    """Change all that is ever written to the residual stream of a llama."""
    model.model.embed_tokens = Wrapped(model.model.embed_tokens, change)
    wrapped = [model.model.embed_tokens]
    for block in model.model.layers:
        block.self_attn.o_proj = Wrapped(block.self_attn.o_proj, change)
        block.mlp.down_proj = Wrapped(block.mlp.down_proj, change)
        wrapped += [block.self_attn.o_proj, block.mlp.down_proj]
    return wrapped


def plain_answer(model: Any, ids: list[int], end: int, wrapped: Sequence[Wrapped], positions: str) -> list[int]:
    """Greedy decoding without cache or batch: the whole sequence again for every token."""
    last = len(ids) - 1
    for one in wrapped:
        one.where = {"all": slice(None), "generated": slice(last, None), "prompt_end": slice(last, last + 1)}[positions]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < NEW_TOKENS:
            answer.append(int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax()))
            if answer[-1] == end:
                break
    return answer


def answers_in(out: str, arm: str) -> dict[str, list[int]]:
    """Generated tokens by prompt id."""
    import pyarrow.parquet as pq

    rows = pq.read_table(Path(out).with_suffix(".responses.parquet")).to_pylist()
    return {row["prompt_id"]: row["token_ids"] for row in rows if row["model"] == arm}


def report(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(out).read_text())
    return found
