"""Rollouts through vLLM against those of transformers: the same tokens at temperature 0, adapters included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.evaluate import evaluate
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.engine.sampling import Request, Sampled, Sampler
from pairtrace.engine.vllm.adapters import Adapter, find_adapter
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.engine.vllm.sampler import VLLMSampler
from pairtrace.errors import ConfigError, DataMismatchError
from tests.engine.evaluation.cases import settings
from tests.engine.test_rollouts import PROMPTS
from tests.models import HH
from tests.vllm.engines import CACHE_GIB, needs_vllm, vllm_model

pytestmark = [needs_vllm, pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data")]

OPTIONS = VLLMOptions(cache_gib=CACHE_GIB, engine={"max_num_seqs": 32})
TOKENS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Path]:
    """A LoRA adapter, and the same merged into a checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(3)
    plan = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(root / "adapter")
    model.merge_and_unload().save_pretrained(root / "merged")
    for file in base.glob("tokenizer*"):
        (root / "merged" / file.name).write_bytes(file.read_bytes())
    (root / "merged" / "chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    return root / "adapter", root / "merged"


def adapter_of(path: Path) -> Adapter:
    found = find_adapter(str(path))
    assert found is not None
    return found


def requests_for(encoder: PromptEncoder, copies: int = 1) -> list[Request]:
    messages = [[{"role": "user", "content": entry["prompt"]}] for entry in PROMPTS]
    return [
        Request(name=f"{i}.{j}", prompt=encoder.encode("prompt", message), seed=100 * i + j)
        for i, message in enumerate(messages)
        for j in range(copies)
    ]


def greedy(sampler: Any, requests: list[Request]) -> list[Sampled]:
    answers: list[Sampled] = sampler.sample(requests, temperature=0, max_new_tokens=TOKENS, batch_size=2)
    return answers


def test_greedy_tokens_are_those_of_transformers_with_and_without_an_adapter(
    base: Path, tuned: tuple[Path, Path]
) -> None:
    """And seeds decide samples: the same twice, whatever is sampled beside them."""
    adapter, merged = tuned
    encoder = PromptEncoder.load(str(base))
    # Every token that may come ends the answers of some: ends are found as transformers finds them.
    encoder = replace(encoder, end_tokens=(*encoder.end_tokens, *range(300, 330)))
    plain = requests_for(encoder)
    adapted = [replace(request, adapter=str(adapter)) for request in plain]
    sampler = VLLMSampler(encoder, adapters=(adapter_of(adapter),), options=OPTIONS)
    seen: list[tuple[int, Sampled]] = []
    try:
        mixed = sampler.sample(
            [*plain, *adapted], temperature=0, max_new_tokens=TOKENS, batch_size=2, on_batch=seen.extend
        )
        many = requests_for(encoder, copies=6)
        first, again = (
            sampler.sample(asked, temperature=0.9, max_new_tokens=TOKENS, batch_size=64) for asked in (many, many[::-1])
        )
    finally:
        sampler.close()
    for model, found in ((base, mixed[: len(plain)]), (merged, mixed[len(plain) :])):
        wanted = greedy(Sampler.load(replace(encoder, model=str(model)), device="cpu"), plain)
        assert found == wanted
    assert mixed[: len(plain)] != mixed[len(plain) :], "the adapter changes nothing"
    assert any(answer.finished for answer in mixed) and not all(answer.finished for answer in mixed)
    assert sorted(position for position, _ in seen) == list(range(len(mixed)))
    assert all(answer == mixed[position] for position, answer in seen)
    assert first == again[::-1]
    assert len({answer.token_ids for answer in first}) > len(PROMPTS)


def test_long_prompts_are_sampled_with_seeds_whatever_the_steps_and_the_cache_hold(base: Path) -> None:
    """On a CPU the engine would die where a step computes a part of a seeded prompt, also of a preempted one."""
    encoder = PromptEncoder.load(str(base))
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(5, 200, size=size).tolist()) for size in (150, 170, 190, 140, 160, 30, 180, 90)]
    requests = [Request(name=str(i), prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
    silent = replace(encoder, end_tokens=())

    def sampled(cache_gib: float, **engine: Any) -> list[Sampled]:
        sampler = VLLMSampler(silent, options=VLLMOptions(cache_gib=cache_gib, engine={"max_num_seqs": 8, **engine}))
        try:
            return sampler.sample(requests, temperature=0.9, max_new_tokens=60, batch_size=8)
        finally:
            sampler.close()

    found = sampled(CACHE_GIB, max_num_batched_tokens=256)
    # Room for three of the eight sequences; a token's keys and values in 4 blocks are 4 * 2 * 32 numbers of 4 bytes.
    assert sampled(700 * 4 * 2 * 32 * 4 / 2**30) == found
    with pytest.raises(ConfigError, match="enable_chunked_prefill"):
        sampled(CACHE_GIB, enable_chunked_prefill=True)
    with pytest.raises(ConfigError, match="a sequence of 250 tokens has to fit into one step"):
        sampled(CACHE_GIB, max_num_batched_tokens=200)


@pytest.mark.parametrize("option", [{"long_prefill_token_threshold": 64}, {"max_num_scheduled_tokens": 128}])
def test_options_that_split_prompts_are_refused_on_a_cpu(option: dict[str, int], base: Path) -> None:
    """The first kills the engine; with the second a prompt that is longer would wait for ever."""
    sampler = VLLMSampler(PromptEncoder.load(str(base)), options=VLLMOptions(cache_gib=CACHE_GIB, engine=option))
    with pytest.raises(ConfigError, match=rf"{next(iter(option))}=.*on a CPU vLLM cannot split prompts"):
        sampler.sample([Request(name="a", prompt=(5, 6, 7), seed=1)], temperature=0.9, max_new_tokens=200, batch_size=1)


def test_where_bfloat16_rounds_two_tokens_to_a_tie_either_may_come(tmp_path: Path) -> None:
    """Greedy tokens of a bfloat16 model: the same up to the first place where the best two are a rounding apart."""
    model = vllm_model("qwen3", tmp_path / "model", dtype=torch.bfloat16)
    encoder = PromptEncoder.load(str(model))
    requests = requests_for(encoder)
    sampler = VLLMSampler(encoder, options=OPTIONS)
    try:
        found = greedy(sampler, requests)
    finally:
        sampler.close()
    hf = Sampler.load(encoder, device="cpu")
    agreed = 0
    for request, one, other in zip(requests, found, greedy(hf, requests), strict=True):
        differs = np.flatnonzero(np.array(one.token_ids[: other.tokens]) != np.array(other.token_ids[: one.tokens]))
        if not len(differs):
            assert one == other
            agreed += one.tokens
            continue
        place = int(differs[0])
        agreed += place
        with torch.no_grad():
            logits = hf.model(torch.tensor([[*request.prompt, *other.token_ids[:place]]])).logits[0, -1].float()
        gap = float((logits[other.token_ids[place]] - logits[one.token_ids[place]]).abs())
        # Rounding of a whole forward pass: some units in the last of 8 bits.
        assert gap <= 8 * 2**-8 * float(logits.abs().max()), "no tie"
    assert agreed >= TOKENS


def test_rollouts_of_an_adapter_are_one_batch_with_those_of_its_base(
    base: Path, tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in PROMPTS))
    stages: list[str] = []

    class Stages:
        def start(self, stage: str, total: int | None, unit: str) -> None:
            stages.append(stage)

        def advance(self, done: int, **figures: float) -> None:
            pass

        def finish(self) -> None:
            pass

    config = RolloutConfig(
        prompts=str(prompts),
        base=str(base),
        tuned=str(tuned[0]),
        out=str(tmp_path / "rollouts.parquet"),
        temperature=0,
        samples=1,
        max_new_tokens=TOKENS,
        backend="vllm",
        vllm=OPTIONS,
    )
    table = sample_rollouts(config, Stages())
    assert stages == ["rollouts of base and tuned"]
    assert table.manifest["identity"]["backend"] == "vllm"
    plain = replace(
        config, tuned=str(tuned[1]), out=str(tmp_path / "hf.parquet"), backend="hf", vllm=None, device="cpu"
    )
    wanted = sample_rollouts(plain)
    assert "backend" not in wanted.manifest["identity"]
    assert table.table.drop_columns(["seed"]).equals(wanted.table.drop_columns(["seed"]))
    # Finished rollouts are read; those of another back end are not taken for them.
    assert sample_rollouts(config).table.equals(table.table)
    with pytest.raises(DataMismatchError, match="backend"):
        sample_rollouts(replace(plain, backend="vllm", vllm=OPTIONS, device="auto"))


def test_evaluation_through_vllm(base: Path, tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """The model of an adapter answers as its merged checkpoint does through transformers."""

    def report(folder: str, model: Path, **changes: Any) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        config: EvaluateConfig = settings(tmp_path / folder, (str(model),), **changes)
        found = evaluate(config).to_dict()["models"][0]
        return {name: value for name, value in found.items() if name not in ("model", "fingerprint")}

    through = report("vllm", tuned[0], backend="vllm", vllm=OPTIONS)
    assert through == report("hf", tuned[1])
