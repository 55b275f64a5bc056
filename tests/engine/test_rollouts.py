from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine import sampling
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.engine.sampling import Request, Sampler
from pairtrace.errors import ConfigError, DataMismatchError, ModelError
from tests.models import make_model, make_tokenizer

PROMPTS = [
    {"id": "a", "prompt": "Hello", "distractor": "Answer in three words."},
    {"id": "b", "prompt": "How do I clean a car that has been in the mud for a week?", "distractor": "Be brief."},
    {"id": "c", "prompt": "Why?", "distractor": "Use JSON, and explain every single step that you took."},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        make_model("llama", root / name, seed=seed)
        make_tokenizer(root / name)
    return str(root / "base"), str(root / "tuned")


@pytest.fixture(scope="module")
def encoder(models: tuple[str, str]) -> PromptEncoder:
    return PromptEncoder.load(models[0])


@pytest.fixture(scope="module")
def sampler(encoder: PromptEncoder) -> Sampler:
    return Sampler.load(encoder, device="cpu")


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in PROMPTS))
    return str(path)


def requests(sampler: Sampler, count: int = 1) -> list[Request]:
    prompts = [
        sampler.tokenizer.apply_chat_template(
            [{"role": "user", "content": entry["prompt"]}], add_generation_prompt=True
        )
        for entry in PROMPTS
    ]
    return [
        Request(name=f"{i}.{j}", prompt=prompt["input_ids"], seed=1000 * i + j)
        for i, prompt in enumerate(prompts)
        for j in range(count)
    ]


def greedy_by_hand(sampler: Sampler, ids: list[int], steps: int) -> list[int]:
    """One sequence, no cache, no padding, no `generate`."""
    generated: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = sampler.model(torch.tensor([ids + generated])).logits[0, -1]
        generated.append(int(logits.argmax()))
        if generated[-1] in sampler.end_tokens:
            break
    return generated


def batched_greedy_matches(sampler: Sampler) -> bool:
    sampled = sampler.sample(requests(sampler), temperature=0, max_new_tokens=12, batch_size=3)
    for request, answer in zip(requests(sampler), sampled, strict=True):
        expected = greedy_by_hand(sampler, list(request.prompt), 12)
        finished = expected[-1] in sampler.end_tokens
        text = sampler.tokenizer.decode(expected[:-1] if finished else expected, skip_special_tokens=True)
        if (answer.response, answer.tokens, answer.finished) != (text, len(expected), finished):
            return False
    return True


def test_batched_greedy_equals_one_by_one(sampler: Sampler) -> None:
    lengths = {len(request.prompt) for request in requests(sampler)}
    assert len(lengths) == 3, "the test needs prompts of different lengths"
    assert batched_greedy_matches(sampler)


def test_right_padding_would_be_noticed(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def right_padded(sequences: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(ids) for ids in sequences)
        ids = torch.tensor([list(s) + [pad] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        return ids, mask

    monkeypatch.setattr(sampling, "left_padded", right_padded)
    assert not batched_greedy_matches(sampler)


def test_a_missing_attention_mask_would_be_noticed(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sampling.left_padded

    def unmasked(sequences: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = honest(sequences, pad)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(sampling, "left_padded", unmasked)
    assert not batched_greedy_matches(sampler)


def test_sampling_does_not_depend_on_the_batch_or_the_order(sampler: Sampler) -> None:
    wanted = requests(sampler, 4)
    reference = sampler.sample(wanted, temperature=0.9, max_new_tokens=10, batch_size=1)
    assert sampler.sample(wanted, temperature=0.9, max_new_tokens=10, batch_size=5) == reference
    assert sampler.sample(wanted[::-1], temperature=0.9, max_new_tokens=10, batch_size=12) == reference[::-1]
    # Samples of one prompt differ from one another.
    assert len({answer.response for answer in reference[:4]}) > 1


def test_draws_follow_the_distribution_at_the_temperature() -> None:
    rng = np.random.default_rng(0)
    logits, draws = rng.normal(size=40) * 2, 20000
    uniforms = torch.from_numpy(rng.random((draws, 1)))
    processor = sampling._InverseCdf(uniforms, 2.0, 1)
    scores = torch.from_numpy(logits).expand(draws, -1)
    picked = processor(torch.zeros(draws, 1, dtype=torch.int64), scores).argmax(dim=-1).numpy()

    def worst_z(temperature: float) -> float:
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        errors = np.bincount(picked, minlength=40) / draws - expected
        return float(np.abs(errors / np.sqrt(expected * (1 - expected) / draws)).max())

    assert worst_z(2.0) < 4
    assert worst_z(1.6) > 6, "a wrong temperature must be noticed"


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 3)
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    scores = sampling._InverseCdf(uniforms, 1.0, 1)(torch.zeros(3, 1, dtype=torch.int64), logits)
    assert scores.argmax(dim=-1).tolist() == [1, 3, 3]


def test_generation_stops_at_every_end_token(models: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "base"
    shutil.copytree(models[0], path)
    sampler = Sampler.load(PromptEncoder.load(str(path)), device="cpu")
    wanted = requests(sampler)[:1]
    free = greedy_by_hand(sampler, list(wanted[0].prompt), 8)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[3]]}))
    stopping = Sampler.load(PromptEncoder.load(str(path)), device="cpu")
    assert stopping.end_tokens == tuple(sorted({free[3], sampler.tokenizer.eos_token_id}))
    answer = stopping.sample(wanted, temperature=0, max_new_tokens=8, batch_size=1)[0]
    assert answer.finished
    assert answer.tokens == free.index(free[3]) + 1


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 12 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_running_out_of_memory_halves_the_batch(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    reference = sampler.sample(requests(sampler, 2), temperature=0.9, max_new_tokens=4, batch_size=6)
    honest, sizes = sampling.decode_batch, []

    def small_memory(model: Any, ids: torch.Tensor, *given: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise error
        return honest(model, ids, *given, **options)

    monkeypatch.setattr(sampling, "decode_batch", small_memory)
    assert sampler.sample(requests(sampler, 2), temperature=0.9, max_new_tokens=4, batch_size=6) == reference
    assert sizes[:2] == [6, 3]
    monkeypatch.setattr(sampling, "decode_batch", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ModelError, match="alone"):
        sampler.sample(requests(sampler), temperature=0, max_new_tokens=4, batch_size=2)


def test_other_failures_are_not_taken_for_a_full_memory(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sampling, "decode_batch", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        sampler.sample(requests(sampler), temperature=0, max_new_tokens=4, batch_size=2)


def config(models: tuple[str, str], prompts: str, out: Path, **options: Any) -> RolloutConfig:
    given = {"samples": 2, "max_new_tokens": 6, "batch_size": 4, "device": "cpu", **options}
    return RolloutConfig(prompts=prompts, base=models[0], tuned=models[1], out=str(out), **given)


def test_the_table_holds_every_cell_and_reads_back(models: tuple[str, str], prompt_file: str, tmp_path: Path) -> None:
    out = tmp_path / "rollouts.parquet"
    table = sample_rollouts(config(models, prompt_file, out))
    rows = table.table.to_pylist()
    keys = {(r["prompt_id"], r["condition"], r["model"], r["sample"]) for r in rows}
    assert len(rows) == len(keys) == 3 * 2 * 2 * 2
    prompts = load_prompts(prompt_file).by_id()
    for row in rows:
        assert json.loads(row["messages"]) == prompts[row["prompt_id"]].conversation(row["condition"])
    # Each row's text is what its own model says to its own conversation with its own seed.
    for row in rows[::5]:
        path = models[0] if row["model"] == "base" else models[1]
        encoder = PromptEncoder.load(path)
        request = Request(name="x", prompt=encoder.encode("x", json.loads(row["messages"])), seed=row["seed"])
        alone = Sampler.load(encoder, device="cpu").sample([request], temperature=0.7, max_new_tokens=6, batch_size=1)
        assert (alone[0].response, alone[0].tokens) == (row["response"], row["tokens"])
    again = read_rollouts(out)
    assert again.table.equals(table.table)
    assert again.manifest["identity"]["temperature"] == 0.7
    assert not list(tmp_path.glob("*partial*"))


def test_an_interrupted_run_goes_on_and_gives_the_same_table(
    models: tuple[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample_rollouts(config(models, prompt_file, tmp_path / "whole.parquet"))
    out = tmp_path / "torn.parquet"
    honest, calls = Sampler._generate_or_none, []

    def dies(self: Sampler, *arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    monkeypatch.setattr(Sampler, "_generate_or_none", dies)
    with pytest.raises(KeyboardInterrupt):
        sample_rollouts(config(models, prompt_file, out))
    journal = tmp_path / "torn.parquet.partial.jsonl"
    kept = journal.read_bytes()
    assert kept.count(b"\n") == 1 + 16
    journal.write_bytes(kept + b'{"key": ["tuned", "pl')  # a line that a kill cut short
    # Another batch size does not matter; another seed does.
    with pytest.raises(DataMismatchError, match="made with seed 0, but this run asks for 1"):
        sample_rollouts(config(models, prompt_file, out, seed=1))
    calls[:] = [0] * 10
    resumed = sample_rollouts(config(models, prompt_file, out, batch_size=3))
    assert sum(calls[10:]) == 24 - 16
    assert resumed.table.equals(whole.table)
    assert not journal.exists()
    # A finished file is used as it is, and never overwritten by other settings.
    calls[:] = [0] * 10
    assert sample_rollouts(config(models, prompt_file, out)).table.equals(whole.table)
    assert len(calls) == 10
    with pytest.raises(DataMismatchError, match="temperature"):
        sample_rollouts(config(models, prompt_file, out, temperature=1.0))


def test_a_damaged_tuned_model_is_found_before_the_base_answers(
    models: tuple[str, str], prompt_file: str, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(models[1], tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or half written"):
        sample_rollouts(config((models[0], str(damaged)), prompt_file, tmp_path / "r.parquet"))
    assert not list(tmp_path.glob("r.parquet*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.0, "samples": 2}, "same response"),
        ({"conditions": ("distractor",)}, "conditions"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutConfig(prompts="p", base="a", tuned="b", out="o", **options)


def test_tokens_are_reported_as_running_totals(models: tuple[str, str], prompt_file: str, tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.stages: dict[str, list[tuple[int, float]]] = {}

        def start(self, stage: str, total: int | None, unit: str) -> None:
            self.reports = self.stages.setdefault(stage, [])

        def advance(self, done: int, **figures: float) -> None:
            self.reports.append((done, figures["tokens"]))

        def finish(self) -> None: ...

    recorder = Recorder()
    table = sample_rollouts(config(models, prompt_file, tmp_path / "r.parquet"), recorder).table.to_pylist()
    for model in ("base", "tuned"):
        reports = recorder.stages[f"rollouts of {model}"]
        assert len(reports) == 3
        assert sum(done for done, _ in reports) == 12
        assert reports[-1][1] == sum(row["tokens"] for row in table if row["model"] == model)
        assert [tokens for _, tokens in reports] == sorted({tokens for _, tokens in reports})
