from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pairtrace.engine import sampling
from pairtrace.engine.judge import RuleJudge
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.rollout_table import RolloutTable, read_rollouts
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.engine.sampling import Request, Sampler
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError, ModelError
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
def sampler(models: tuple[str, str]) -> Sampler:
    return Sampler.load(models[0], device="cpu")


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in PROMPTS))
    return str(path)


def requests(count: int = 1) -> list[Request]:
    conversations = [[{"role": "user", "content": entry["prompt"]}] for entry in PROMPTS]
    return [
        Request(name=f"{i}.{j}", messages=messages, seed=1000 * i + j)
        for i, messages in enumerate(conversations)
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
    sampled = sampler.sample(requests(), temperature=0, max_new_tokens=12, batch_size=3)
    for request, answer in zip(requests(), sampled, strict=True):
        expected = greedy_by_hand(sampler, sampler.encode(request.messages), 12)
        finished = expected[-1] in sampler.end_tokens
        text = sampler.tokenizer.decode(expected[:-1] if finished else expected, skip_special_tokens=True)
        if (answer.response, answer.tokens, answer.finished) != (text, len(expected), finished):
            return False
    return True


def test_batched_greedy_equals_one_by_one(sampler: Sampler) -> None:
    lengths = {len(sampler.encode(request.messages)) for request in requests()}
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
    wanted = requests(4)
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


def test_generation_stops_at_every_end_token(models: tuple[str, str]) -> None:
    sampler = Sampler.load(models[0], device="cpu")
    wanted = requests()[:1]
    free = greedy_by_hand(sampler, sampler.encode(wanted[0].messages), 8)
    sampler.model.generation_config.eos_token_id = [free[3]]
    stopping = Sampler(sampler.model, sampler.tokenizer)
    assert stopping.end_tokens == tuple(sorted({free[3], sampler.tokenizer.eos_token_id}))
    answer = stopping.sample(wanted, temperature=0, max_new_tokens=8, batch_size=1)[0]
    assert answer.finished
    assert answer.tokens == free.index(free[3]) + 1


def test_running_out_of_memory_halves_the_batch(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = sampler.sample(requests(2), temperature=0.9, max_new_tokens=4, batch_size=6)
    honest, sizes = sampler.model.generate, []

    def small_memory(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("simulated")
        return honest(input_ids=input_ids, **options)

    monkeypatch.setattr(sampler.model, "generate", small_memory)
    assert sampler.sample(requests(2), temperature=0.9, max_new_tokens=4, batch_size=6) == reference
    assert sizes[:2] == [6, 3]
    monkeypatch.setattr(sampler.model, "generate", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(ModelError, match="alone"):
        sampler.sample(requests(), temperature=0, max_new_tokens=4, batch_size=2)


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
        request = Request(name="x", messages=json.loads(row["messages"]), seed=row["seed"])
        alone = Sampler.load(path, device="cpu").sample([request], temperature=0.7, max_new_tokens=6, batch_size=1)
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


def test_a_prompt_beyond_the_context_and_a_missing_template_are_refused(sampler: Sampler, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.0: the prompt has \d+ tokens.*context of 4096"):
        sampler.sample(requests()[:1], temperature=0, max_new_tokens=4090, batch_size=1)
    make_tokenizer(tmp_path / "bare", chat_template=None)
    make_model("llama", tmp_path / "bare")
    with pytest.raises(ModelError, match="--chat-template"):
        Sampler.load(str(tmp_path / "bare"), device="cpu")
    given = "{{ messages[-1]['content'] }}"
    templated = Sampler.load(str(tmp_path / "bare"), device="cpu", chat_template=given)
    assert templated.tokenizer.decode(templated.encode([{"role": "user", "content": "Hi there"}])) == "Hi there"


def test_judging_keeps_undecided_apart() -> None:
    table = pa.table({"model": ["base"] * 3, "prompt": ["p"] * 3, "response": ["Sure.", "", "Sorry"]})
    read = table_of(table)
    judged = read.judged(RuleJudge(label="t", refusal=("sorry",)))
    assert judged.verdicts().tolist() == [1, -1, 0]
    assert judged.table["verdict"].to_pylist() == [True, None, False]
    assert set(judged.table["judge"].to_pylist()) == {judged.manifest["judge"]}


def table_of(table: pa.Table, **options: Any) -> RolloutTable:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "user.parquet"
        pq.write_table(table, path)
        return read_rollouts(path, **options)


def test_a_users_own_file_is_read(tmp_path: Path, prompt_file: str) -> None:
    rows = [
        {"prompt_id": "a", "model": "M0", "response": "x", "condition": "plain", "harmful": 0},
        {"prompt_id": "a", "model": "tuned", "response": None, "condition": "distractor", "harmful": 1},
        {"prompt_id": "b", "model": "Base", "response": "z", "condition": "plain", "harmful": None},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(prompt_file)
    read = read_rollouts(path, prompts=prompts, label_column="harmful")
    assert read.strings("model").tolist() == ["base", "tuned", "base"]
    assert read.verdicts().tolist() == [0, 1, -1]
    assert read.strings("judge").tolist() == ["column:harmful", "column:harmful", ""]
    assert json.loads(read.strings("messages")[1]) == prompts.by_id()["a"].conversation("distractor")
    assert read.strings("response")[1] == ""
    unjudged = read_rollouts(path, prompts=prompts)
    assert not unjudged.has_verdicts
    with pytest.raises(DataFormatError, match="prompts are missing"):
        read_rollouts(path)


def test_messages_may_be_lists_and_ids_may_be_absent() -> None:
    conversation = [{"role": "user", "content": "p"}]
    both = pa.table({"model": ["M0", "M1"], "messages": [conversation] * 2, "response": ["a", "b"]})
    text = pa.table({"model": ["M0", "M1"], "messages": [json.dumps(conversation)] * 2, "response": ["a", "b"]})
    plain = pa.table({"model": ["M0", "M1"], "prompt": ["p", "p"], "response": ["a", "b"]})
    first, second, third = table_of(both), table_of(text), table_of(plain)
    assert first.table.equals(second.table)
    assert first.table.equals(third.table)
    assert len(set(first.strings("prompt_id"))) == 1


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"response": ["x"], "prompt": ["p"]}, {}, "no column 'model'; columns found: response, prompt"),
        ({"model": ["base"], "prompt": ["p"]}, {}, "no column 'response'"),
        ({"model": ["base"], "prompt": ["p"], "response": ["x"]}, {"label_column": "bad"}, "no column 'bad'"),
        ({"model": ["gpt"], "prompt": ["p"], "response": ["x"]}, {}, "row 0: model is 'gpt'"),
        (
            {"model": ["base"], "prompt": ["p"], "response": ["x"], "condition": ["hot"]},
            {},
            "row 0: condition is 'hot'",
        ),
        (
            {"model": ["base"], "prompt": ["p"], "response": ["x"], "label": [0.5]},
            {"label_column": "label"},
            "row 0: label is 0.5",
        ),
        ({"model": ["base"], "messages": ["not json"], "response": ["x"]}, {}, "row 0: 'messages' is neither"),
        (
            {"model": ["base"], "prompt": ["p"], "response": ["x"], "condition": ["distractor"]},
            {},
            "need a column 'prompt_id'",
        ),
    ],
)
def test_bad_rollout_files_are_refused(columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        table_of(pa.table(columns), **options)


def test_unknown_ids_broken_lines_and_empty_files_are_refused(tmp_path: Path, prompt_file: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt_id": "zzz", "model": "base", "response": "x"}\n')
    with pytest.raises(DataMismatchError, match="'zzz'"):
        read_rollouts(path, prompts=load_prompts(prompt_file))
    path.write_text('{"prompt": "a", "model": "base", "response": "x"}\n{"prompt\n')
    with pytest.raises(DataFormatError, match="line 2: invalid JSON"):
        read_rollouts(path)
    path.write_text("")
    with pytest.raises(DataFormatError, match="no rollouts"):
        read_rollouts(path)
    with pytest.raises(DataFormatError, match="cannot read"):
        read_rollouts(tmp_path / "absent.parquet")
