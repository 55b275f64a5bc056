"""The implicit reward margin against a plain loop over single sequences, and its resumption."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pairtrace.engine.baselines import log_probabilities, margin
from pairtrace.engine.baselines.log_probabilities import ResponseScorer
from pairtrace.engine.baselines.margin import MarginConfig, score_margin
from pairtrace.engine.cost import costs_path, read_costs
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.errors import ConfigError, DataMismatchError, ModelError, StoreMismatchError
from pairtrace.store.reader import ActivationStore
from tests.engine.extraction import pair, write_rows
from tests.models import make_model, make_tokenizer

ROWS = [
    pair("How do I fix a bike?", "I can help: take the wheel off.", "I can not help with that."),  # a shared beginning
    pair("Say yes.", "Yes", "No, never in my life."),
    pair("", "Words without any question at all", "Other words"),
    pair("What is an atom?", "", "empty chosen: quarantined"),
    pair("Tell me a story " * 2, "Once upon a time there was a cat. " * 3, "Once upon a time there was a dog."),
    pair("Same start", "It is long and goes on", "It is long and goes on and on"),
]
MAX_LENGTH = 60


class Checkpoints:
    """M0, M1 and a store of M0 over the rows above."""

    def __init__(self, root: Path, model_type: str, **options: Any) -> None:
        self.m0, self.m1 = str(root / "m0"), str(root / "m1")
        for seed, path in enumerate((self.m0, self.m1)):
            make_tokenizer(Path(path))
            make_model(model_type, Path(path), seed=seed)
        self.data = str(write_rows(root / "pairs.jsonl", ROWS))
        self.store = str(root / "acts.zarr")
        config = {"layers": (1,), "device": "cpu", "fsync": False, "max_length": MAX_LENGTH, **options}
        extract(ExtractConfig(data=self.data, model=self.m0, store=self.store, **config))

    def config(self, out: Path, **changes: Any) -> MarginConfig:
        return MarginConfig(**{"store": self.store, "tuned": self.m1, "out": str(out), "device": "cpu", **changes})


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("olmo"), "olmo2")


def plain_margins(checkpoints: Checkpoints, beta: float, keep_end: bool = False) -> list[float | None]:
    """Each response by itself through transformers' own forward pass, float64 sums: nothing of pairtrace."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints.m0)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (checkpoints.m0, checkpoints.m1)]

    def tokens(messages: list[dict[str, str]], **options: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def log_probability(model: Any, ids: list[int], start: int) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double()
        return sum(float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in range(start, len(ids)))

    margins: list[float | None] = []
    for row in ROWS:
        if not all(side[0]["content"] for side in (row["chosen"], row["rejected"])):
            margins.append(None)
            continue
        start = len(tokens(row["prompt"], add_generation_prompt=True))
        moved = []
        for side in ("chosen", "rejected"):
            ids = tokens(row["prompt"] + row[side])
            cut = max(0, len(ids) - MAX_LENGTH) if keep_end else 0
            ids, first = ids[cut : cut + MAX_LENGTH], max(1, start - cut)
            before, after = (log_probability(model, ids, first) for model in models)
            moved.append(after - before)
        margins.append(beta * (moved[0] - moved[1]))
    return margins


def margins_of(path: str | Path, name: str = "margin") -> list[float | None]:
    return pq.read_table(path, columns=[f"score:{name}"]).column(0).to_pylist()


def agree(actual: list[float | None], expected: list[float | None]) -> bool:
    assert [value is None for value in actual] == [value is None for value in expected]
    pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if a is not None and b is not None]
    return bool(np.allclose(*np.array(pairs).T, rtol=1e-4, atol=1e-3))


# Scaled logits, capped logits and attention windows are parts of a head that a reimplementation would forget.
@pytest.mark.parametrize(
    ("model_type", "options"),
    [("olmo2", {"truncation": "keep_end"}), ("gemma2", {}), ("granite", {})],
    ids=["olmo2-keep_end", "gemma2", "granite"],
)
def test_it_is_the_margin_of_a_plain_loop(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, model_type, **options)
    out = tmp_path / "margin.parquet"
    summary = score_margin(checkpoints.config(out, beta=0.3))
    assert (summary.scored, summary.quarantined) == (5, 1)
    assert agree(margins_of(out), plain_margins(checkpoints, 0.3, keep_end="truncation" in options))


def test_budget_and_mutations(olmo: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of one pair and of all give the same; reading one token later, or the other side's start, does not."""
    expected = plain_margins(olmo, 0.1)
    for name, budget in (("one", 1), ("all", 4096)):
        out = tmp_path / name / "margin.parquet"
        score_margin(olmo.config(out, token_budget=budget))
        assert agree(margins_of(out), expected)
    original = log_probabilities._predictions

    def late(pairs: Any) -> Any:
        predictors, targets, sides = original(pairs)
        return np.minimum(predictors + 1, predictors.max()), targets, sides

    def crossed(pairs: Any) -> Any:
        predictors, targets, sides = original(pairs)
        return predictors, targets, sides ^ 1

    for name, mutant in (("late", late), ("crossed", crossed)):
        monkeypatch.setattr(log_probabilities, "_predictions", mutant)
        out = tmp_path / name / "margin.parquet"
        score_margin(olmo.config(out))
        assert not agree(margins_of(out), expected), name


def test_an_interrupted_run_goes_on(
    olmo: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(margin, "_BLOCK_ROWS", 2)
    whole, out = tmp_path / "whole" / "margin.parquet", tmp_path / "parts" / "margin.parquet"
    score_margin(olmo.config(whole))
    original: Callable[..., np.ndarray] = ResponseScorer.log_probabilities
    asked: list[list[int]] = []

    def failing_at(call: int | None) -> None:
        asked.clear()

        def scores(self: ResponseScorer, pairs: Any, on_pack: Any = None) -> np.ndarray:
            asked.append([pair.row for pair in pairs])
            if len(asked) - 1 == call:
                raise KeyboardInterrupt
            return original(self, pairs, on_pack)

        monkeypatch.setattr(ResponseScorer, "log_probabilities", scores)

    failing_at(4)  # three blocks of M0, one of M1
    with pytest.raises(KeyboardInterrupt):
        score_margin(olmo.config(out))
    assert not out.exists()
    failing_at(None)
    score_margin(olmo.config(out))
    assert asked == [[2], [4, 5]]
    assert margins_of(out) == margins_of(whole)
    costs = read_costs(costs_path(out))
    stages = [("m0 log-probabilities"), *["m1 log-probabilities"] * 2]
    assert [cost.stage for cost in costs] == stages
    uninterrupted = read_costs(costs_path(whole))
    assert costs[1].model_tokens + costs[2].model_tokens == uninterrupted[1].model_tokens > 0
    assert costs[1].flops + costs[2].flops == pytest.approx(uninterrupted[1].flops)
    # Another M1 in the same place finds the log-probabilities of M0.
    failing_at(None)
    again = tmp_path / "parts" / "other.parquet"
    with caplog.at_level(logging.INFO, "pairtrace"):
        score_margin(olmo.config(again, beta=0.2, name="wide"))
    assert asked == []
    assert "there already" in caplog.text
    expected = [None if value is None else 2 * value for value in margins_of(out)]
    assert margins_of(again, "wide") == pytest.approx(expected)


def test_what_does_not_fit_is_refused(olmo: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "margin.parquet"
    with pytest.raises(ConfigError, match="every margin would be 0"):
        score_margin(olmo.config(out, tuned=olmo.m0))
    with pytest.raises(StoreMismatchError, match="model_fingerprint"):
        score_margin(olmo.config(out, base=olmo.m1, tuned=olmo.m0))
    other = write_rows(tmp_path / "other.jsonl", [*ROWS[:-1], pair("New", "One", "Two")])
    with pytest.raises(DataMismatchError, match="is not the data behind"):
        score_margin(olmo.config(out, data=str(other)))
    shallow = tmp_path / "shallow"
    make_tokenizer(shallow)
    make_model("olmo2", shallow, num_hidden_layers=2)
    with pytest.raises(ModelError, match="no further training"):
        score_margin(olmo.config(out, tuned=str(shallow)))
    for wrong in (0.0, float("nan")):
        with pytest.raises(ConfigError, match="--beta"):
            olmo.config(out, beta=wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl", "shallow"]


def test_a_model_that_says_nan_leaves_pairs_without_score(olmo: Checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    make_tokenizer(broken)
    make_model("olmo2", broken, seed=1)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "margin.parquet"
    summary = score_margin(olmo.config(out, tuned=str(broken)))
    assert (summary.scored, summary.unscored) == (0, 5)
    assert margins_of(out) == [None] * 6
    journals = sorted(tmp_path.glob("log-probabilities-*.jsonl"))
    assert len(journals) == 2
    assert all("NaN" not in path.read_text() for path in journals), "strict JSON has no NaN"
    assert (
        ActivationStore.open(olmo.store).rows == json.loads(journals[0].read_text().splitlines()[0])["identity"]["rows"]
    )
