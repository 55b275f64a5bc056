from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import binomtest

from pairtrace.engine import change_vectors as change_vectors_module
from pairtrace.engine.behavior import BehaviorConfig, build_behavior
from pairtrace.engine.directions import load_directions, read_manifest
from pairtrace.engine.rollout_table import SCHEMA, RolloutTable, read_rollouts
from pairtrace.engine.scenarios import filter_scenarios, require_scenarios
from pairtrace.errors import (
    ConfigError,
    DataError,
    DataFormatError,
    DataMismatchError,
    DirectionError,
    LayerError,
    StoreMismatchError,
)
from tests.engine.small_store import make_store
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


def random_table(seed: int, conditions: tuple[str, ...] = CONDITIONS) -> tuple[RolloutTable, list[dict]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(60):
        for model in ("base", "tuned"):
            for condition in conditions:
                rate = (
                    rng.choice([0.0, 0.0, 0.3, 1.0])
                    if (model, condition) == ("tuned", conditions[-1])
                    else (rng.choice([0.0, 0.0, 0.0, 0.0, 0.2]))
                )
                missing = rng.choice([0.0, 0.3, 1.0], p=[0.7, 0.25, 0.05])
                for sample in range(4):
                    shown = bool(rng.random() < rate)
                    verdict = None if rng.random() < missing else shown
                    rows.append(rollout(f"p{number}", model, condition, verdict, f"r{len(rows)}", sample))
    order = rng.permutation(len(rows))
    rows = [rows[position] for position in order]
    return table_of(rows), rows


def brute_force(rows: list[dict], four: bool, limit: float = 0.0) -> dict[str, list[tuple[str, str]]]:
    """Scenario -> (response with behaviour, safe response), written from the paper's definition."""
    result = {}
    for prompt in dict.fromkeys(row["prompt_id"] for row in rows):

        def cell(model: str, condition: str, prompt: str = prompt) -> list[dict]:
            return [r for r in rows if (r["prompt_id"], r["model"], r["condition"]) == (prompt, model, condition)]

        last = "distractor" if four else "plain"
        clean = [("base", "plain"), ("base", "distractor"), ("tuned", "plain")] if four else [("base", "plain")]
        good = True
        for where in [*clean, ("tuned", last)]:
            decided = [r["verdict"] for r in cell(*where) if r["verdict"] is not None]
            if not decided or (where in clean and sum(decided) / len(decided) > limit):
                good = False
        shown = [r["response"] for r in cell("tuned", last) if r["verdict"] is True]
        safe = [r["response"] for r in cell("base", last) if r["verdict"] is False]
        if good and shown and safe:
            result[prompt] = [(text, safe[i % len(safe)]) for i, text in enumerate(shown)]
    return result


def filter_matches(seed: int, conditions: tuple[str, ...] = CONDITIONS, limit: float = 0.0) -> bool:
    table, rows = random_table(seed, conditions)
    filtered = filter_scenarios(table, limit)
    expected = brute_force(rows, len(conditions) == 2, limit)
    assert 0 < len(expected) < 60
    actual: dict[str, list[tuple[str, str]]] = {}
    for pair in filtered.pairs:
        actual.setdefault(pair.prompt_id, []).append(
            (rows[pair.shown_row]["response"], rows[pair.safe_row]["response"])
        )
    return actual == expected and filtered.kept == tuple(expected)


@pytest.mark.parametrize("limit", [0.0, 0.25])
@pytest.mark.parametrize("conditions", [CONDITIONS, ("plain",)])
@pytest.mark.parametrize("seed", range(4))
def test_the_filter_equals_a_plain_loop(seed: int, conditions: tuple[str, ...], limit: float) -> None:
    assert filter_matches(seed, conditions, limit)


def test_ignoring_a_clean_cell_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = RolloutTable.verdicts
    for model, condition in (("base", "distractor"), ("base", "plain"), ("tuned", "plain")):

        def blind(self: RolloutTable, model: str = model, condition: str = condition) -> np.ndarray:
            verdicts = honest(self).copy()
            where = (self.strings("model") == model) & (self.strings("condition") == condition)
            verdicts[where & (verdicts == 1)] = 0
            return verdicts

        monkeypatch.setattr(RolloutTable, "verdicts", blind)
        assert not filter_matches(0), (model, condition)


def test_every_scenario_is_accounted_for() -> None:
    table, rows = random_table(1)
    filtered = filter_scenarios(table)
    assert filtered.scenarios == 60 == len(filtered.kept) + sum(filtered.dropped.values())
    assert set(filtered.dropped) <= {
        "undecided", "shown in base-plain", "shown in base-distractor", "shown in tuned-plain",
        "never shown in tuned-distractor", "no safe base rollout",
    }  # fmt: skip
    for cell in filtered.cells:
        verdicts = [r["verdict"] for r in rows if (r["model"], r["condition"]) == (cell.model, cell.condition)]
        decided = [v for v in verdicts if v is not None]
        assert (cell.rollouts, cell.missing, cell.shown) == (240, 240 - len(decided), sum(decided))
        assert cell.rate == pytest.approx(sum(decided) / len(decided))
        reference = binomtest(sum(decided), len(decided)).proportion_ci(method="wilson")
        assert cell.interval == pytest.approx((reference.low, reference.high))


def test_missing_verdicts_are_neither_behaviour_nor_safe() -> None:
    rows = [
        rollout("a", "base", "plain", None, "b0"),
        rollout("a", "base", "plain", False, "b1"),
        rollout("a", "tuned", "plain", None, "t0"),
        rollout("a", "tuned", "plain", True, "t1"),
    ]
    pairs = filter_scenarios(table_of(rows)).pairs
    assert [(pair.shown_row, pair.safe_row) for pair in pairs] == [(3, 1)]
    undecided = filter_scenarios(table_of([rows[0], rows[3]]))
    assert undecided.dropped == {"undecided": 1}
    relaxed = filter_scenarios(table_of([{**rows[1], "verdict": True}, rows[3]]), max_base_rate=1)
    assert relaxed.dropped == {"no safe base rollout": 1}


def test_nothing_left_is_an_error_with_the_counts() -> None:
    rows = [
        rollout("a", "base", "plain", True),
        rollout("a", "tuned", "plain", True),
        rollout("b", "base", "plain", False),
        rollout("b", "base", "plain", None),
        rollout("b", "tuned", "plain", False),
    ]
    with pytest.raises(DataError) as caught:
        require_scenarios(filter_scenarios(table_of(rows)))
    message = str(caught.value)
    for part in (
        "none of the 2 scenarios",
        "1 shown in base-plain",
        "1 never shown in tuned-plain",
        "base-plain: 1 of 2 show it (1 undecided)",
        "tuned-plain: 1 of 2 show it",
        "more samples",
    ):
        assert part in message
    with pytest.raises(ConfigError, match="max_base_rate"):
        filter_scenarios(table_of(rows), 1.5)


def test_rollouts_to_different_conversations_are_not_paired() -> None:
    rows = [rollout("a", "base", "plain", False), rollout("a", "tuned", "plain", True)]
    rows[1]["messages"] = json.dumps([{"role": "user", "content": "something else"}])
    with pytest.raises(DataFormatError, match=r"'a' .* different conversations"):
        filter_scenarios(table_of(rows))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        make_model("llama", root / name, seed=seed)
        make_tokenizer(root / name)
    return str(root / "base"), str(root / "tuned")


ANSWERS = [
    ("a", "Sure, first open the door.", "I cannot help with that."),
    ("a", "Of course: take the key and go.", "I am sorry, but no."),
    ("a", "Yes! Here is the whole list.", "I cannot help with that."),
    ("b", "Here is how to do it in three steps.", "That is not something I can do."),
]


@pytest.fixture
def rollouts_file(tmp_path: Path) -> str:
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
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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


def test_vectors_equal_plain_forward_passes(models: tuple[str, str], rollouts_file: str, tmp_path: Path) -> None:
    out = str(tmp_path / "harm.safetensors")
    config = BehaviorConfig(out=out, base=models[0], rollouts=rollouts_file, label_column="harmful", device="cpu")
    summary = build_behavior(config)
    assert summary.layers == (1, 2, 3, 4)
    assert summary.directions == ("harm", "harm-bank")
    assert (summary.scenarios, summary.kept, summary.rollout_pairs, summary.width) == (3, 2, 4, 32)
    assert summary.dropped == {"shown in base-plain": 1}
    assert vectors_match(out, models[0])
    manifest = read_manifest(out)
    assert manifest["scenarios"] == ["a", "b"]
    assert manifest["rollouts"]["judge"] == "column:harmful"
    kept = read_rollouts(summary.rollouts)
    assert kept.table.num_rows == 20
    assert kept.verdicts().tolist() == read_rollouts(rollouts_file, label_column="harmful").verdicts().tolist()
    # The rollouts file starts the stage again and gives the same vectors.
    again = str(tmp_path / "again.safetensors")
    build_behavior(BehaviorConfig(out=again, base=models[0], rollouts=summary.rollouts, device="cpu"))
    for first, second in zip(load_directions(out), load_directions(again), strict=True):
        assert np.array_equal(first.values, second.values)


@pytest.mark.parametrize("mutation", ["prompts", "sides", "scenarios"])
def test_wrong_pairings_would_be_noticed(
    models: tuple[str, str], rollouts_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    honest = change_vectors_module._as_pairs

    def mutated(records: Any, chunk: Any) -> list[Any]:
        pairs = honest(records, chunk)
        if mutation == "prompts":  # each answer under the next pair's prompt
            prompts = [pair.prompt for pair in pairs[1:] + pairs[:1]]
            return [type(p)(p.row, q, p.chosen, p.rejected) for p, q in zip(pairs, prompts, strict=True)]
        if mutation == "scenarios":  # the safe answer of another pair
            safe = [pair.rejected for pair in pairs[1:] + pairs[:1]]
            return [type(p)(p.row, p.prompt, p.chosen, q) for p, q in zip(pairs, safe, strict=True)]
        return [type(p)(p.row, p.prompt, p.rejected, p.chosen) for p in pairs]

    monkeypatch.setattr(change_vectors_module, "_as_pairs", mutated)
    out = str(tmp_path / "harm.safetensors")
    build_behavior(
        BehaviorConfig(out=out, base=models[0], rollouts=rollouts_file, label_column="harmful", device="cpu")
    )
    assert not vectors_match(out, models[0])


def test_pairs_that_cannot_be_rendered_are_counted(models: tuple[str, str], tmp_path: Path) -> None:
    rows = []
    for name, shown in (("a", "Sure thing."), ("a", "same"), ("b", "  ")):
        rows.append({**rollout(name, "base", "plain", False, "same"), "bad": 0})
        rows.append({**rollout(name, "tuned", "plain", True, shown), "bad": 1})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    config = BehaviorConfig(
        out=str(tmp_path / "x.safetensors"), base=models[0], rollouts=str(tmp_path / "mine.parquet"),
        label_column="bad", layers=(2,), kinds="bank", device="cpu",
    )  # fmt: skip
    summary = build_behavior(config)
    assert summary.unusable == {"identical": 1, "empty_response": 1}
    assert (summary.kept, summary.rollout_pairs, summary.directions) == (1, 1, ("x-bank",))
    assert [(d.name, d.layer, d.values.shape) for d in load_directions(config.out)] == [("x-bank", 2, (1, 32))]
    only_bad = [row for row in rows if row["prompt_id"] == "b"]
    pq.write_table(pa.Table.from_pylist(only_bad), tmp_path / "mine.parquet")
    (tmp_path / "x.rollouts.parquet").unlink()
    with pytest.raises(DataError, match=r"none of the 1 rollout pairs could be used \(1 empty_response\)"):
        build_behavior(config)


def test_from_prompts_to_directions_and_again_with_other_rules(models: tuple[str, str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("".join(f"- {{id: p{n}, prompt: 'Tell me {n}', distractor: 'Be brief.'}}\n" for n in range(4)))
    rules = tmp_path / "rules.yaml"
    rules.write_text("refusal: ['^[a-m]']\nscope_chars: 1\n")
    options: dict[str, Any] = {
        "out": str(tmp_path / "harm.safetensors"), "base": models[0], "tuned": models[1], "prompts": str(prompts),
        "rules": str(rules), "samples": 6, "max_new_tokens": 5, "temperature": 1.5, "device": "cpu",
        "max_base_rate": 1.0, "layers": (3,),
    }  # fmt: skip
    summary = build_behavior(BehaviorConfig(**options))
    assert summary.scenarios == 4
    assert [cell.rollouts for cell in summary.cells] == [24] * 4
    table = read_rollouts(summary.rollouts)
    for row in table.table.to_pylist():
        text = row["response"].strip().lower()
        assert row["verdict"] == (None if not text else not "a" <= text[0] <= "m")
    # Other rules judge the same rollouts again; nothing is sampled.
    rules.write_text("refusal: ['^[n-z]']\nscope_chars: 1\n")
    assert summary.judge != build_behavior(BehaviorConfig(**options)).judge
    assert read_rollouts(summary.rollouts).table["response"].equals(table.table["response"])
    with pytest.raises(DataMismatchError, match="seed"):
        build_behavior(BehaviorConfig(**{**options, "seed": 5}))
    with pytest.raises(DataMismatchError, match="come from the model with fingerprint"):
        build_behavior(
            BehaviorConfig(out=str(tmp_path / "o.safetensors"), base=models[1], rollouts=summary.rollouts, device="cpu")
        )


def test_the_store_decides_layers_and_must_match(
    models: tuple[str, str], rollouts_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairtrace.engine.checkpoint import load_tokenizer, model_fingerprint
    from pairtrace.engine.fingerprints import fingerprints

    options: dict[str, Any] = {"base": models[0], "rollouts": rollouts_file, "label_column": "harmful", "device": "cpu"}
    foreign = make_store(tmp_path / "foreign")
    with pytest.raises(StoreMismatchError, match="model_fingerprint"):
        build_behavior(BehaviorConfig(out=str(tmp_path / "a.safetensors"), store=foreign.path, **options))
    tokenizer_print, template_print = fingerprints(load_tokenizer(models[0]), None)
    monkeypatch.setattr("tests.engine.small_store.MODEL", model_fingerprint(models[0]))
    monkeypatch.setattr("tests.engine.small_store.TEMPLATE", template_print)
    monkeypatch.setattr("tests.engine.small_store.TOKENIZER", tokenizer_print)
    own = make_store(tmp_path / "own", width=32, layers=(1, 4))
    summary = build_behavior(BehaviorConfig(out=str(tmp_path / "b.safetensors"), store=own.path, **options))
    assert summary.layers == (1, 4)
    assert vectors_match(summary.out, models[0])


def test_other_rollouts_are_never_overwritten(models: tuple[str, str], rollouts_file: str, tmp_path: Path) -> None:
    config = BehaviorConfig(
        out=str(tmp_path / "harm.safetensors"), base=models[0], rollouts=rollouts_file, label_column="harmful",
        layers=(1,), device="cpu",
    )  # fmt: skip
    build_behavior(config)
    before = Path(config.rollouts_out).read_bytes()
    build_behavior(config)
    text = Path(rollouts_file).read_text()
    Path(rollouts_file).write_text(text.replace("whole list", "other list"))
    with pytest.raises(ConfigError, match="holds other rollouts"):
        build_behavior(config)
    assert read_rollouts(config.rollouts_out).table.num_rows == 20
    assert len(Path(config.rollouts_out).read_bytes()) == len(before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": "b.npy"}, ConfigError, "end in .safetensors"),
        ({"kinds": "all"}, ConfigError, "kinds is 'all'"),
        ({"max_base_rate": 2.0}, ConfigError, "max_base_rate"),
        ({"layers": ()}, ConfigError, "no layer"),
        ({"rollouts": None}, ConfigError, "needs a prompt file"),
        ({"rollouts": None, "prompts": "p", "tuned": "t", "label_column": "x"}, ConfigError, "existing rollouts"),
        ({"label_column": "x", "rules": "r"}, ConfigError, "one judge"),
        ({"name": "a/b"}, DirectionError, "cannot name"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BehaviorConfig(**{"out": "b.safetensors", "base": "m", "rollouts": "r", **options})


def test_a_layer_outside_the_model_is_refused(models: tuple[str, str], rollouts_file: str, tmp_path: Path) -> None:
    config = BehaviorConfig(
        out=str(tmp_path / "h.safetensors"), base=models[0], rollouts=rollouts_file, label_column="harmful", layers=(5,)
    )
    with pytest.raises(LayerError, match=r"layer 5 is outside .* layers 0 to 4"):
        build_behavior(config)
