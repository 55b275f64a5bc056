from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pairtrace.engine import decoding
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.sampling import Request, Sampler
from tests.models import FAMILY_SETTINGS, make_model, make_tokenizer

STEPS = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sampler_of(family: str, folder: Path, tokenizer: Path, ends: int = 60) -> Sampler:
    """A random model for which a tenth of the vocabulary ends a response, so that rows end at different steps."""
    model = make_model(family, folder, num_hidden_layers=2)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(5, 5 + ends))}))
    return Sampler.load(PromptEncoder.load(str(model)), device="cpu", dtype="float32")


def sampled(sampler: Sampler, temperature: float, batch_size: int = 12) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 30, 7, 18, 5, 26, 11, 4, 9, 40, 14, 6]
    prompts = [torch.randint(70, 600, (length,), generator=generator).tolist() for length in lengths]
    requests = [Request(name=str(n), prompt=prompt, seed=n) for n, prompt in enumerate(prompts)]
    return sampler.sample(requests, temperature=temperature, max_new_tokens=STEPS, batch_size=batch_size)


@pytest.mark.parametrize("family", sorted(FAMILY_SETTINGS))
def test_rows_that_leave_change_nothing(
    family: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(family, tmp_path / "m", tokenizer)
    fast = sampled(sampler, 1.0)
    monkeypatch.setattr(Sampler, "_generate_fast", Sampler._generate)
    assert fast == sampled(sampler, 1.0)
    lengths = [answer.tokens for answer in fast]
    assert len(set(lengths)) > 3, "the test needs rows that end at different steps"


def test_rows_taken_out_wrongly_would_be_noticed(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DynamicCache

    sampler = sampler_of("llama", tmp_path / "m", tokenizer)
    expected = sampled(sampler, 1.0)
    honest = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, kept: honest(self, kept.flip(0)))
    assert sampled(sampler, 1.0) != expected


def test_finished_rows_cost_no_more_passes(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of("llama", tmp_path / "m", tokenizer)
    honest, widths = sampler.model.forward, []

    def counted(*given: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        widths.append(len(input_ids))
        return honest(*given, input_ids=input_ids, **options)

    monkeypatch.setattr(sampler.model, "forward", counted)
    lengths = [answer.tokens for answer in sampled(sampler, 1.0)]
    assert len(widths) == max(lengths)
    # At most a tenth of the rows of a pass has ended.
    assert sum(widths) <= sum(lengths) / (1 - decoding._ENDED_SHARE) + len(widths)


def test_a_model_without_end_tokens_runs_to_the_limit(tmp_path: Path, tokenizer: Path) -> None:
    sampler = sampler_of("llama", tmp_path / "m", tokenizer)
    sampler.end_tokens = ()
    assert {(answer.tokens, answer.finished) for answer in sampled(sampler, 0)} == {(STEPS, False)}
