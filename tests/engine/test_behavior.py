from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import change_vectors as change_vectors_module
from pairtrace.engine.behavior import BehaviorConfig, build_behavior, judged_rollouts
from pairtrace.engine.checkpoint import model_fingerprint
from pairtrace.engine.directions import load_directions, read_manifest
from pairtrace.engine.progress import NULL_PROGRESS
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.rollouts import RolloutConfig, sample_rollouts
from pairtrace.errors import (
    ConfigError,
    DataError,
    DataMismatchError,
    DirectionError,
    LayerError,
    UnsupportedModelError,
)
from tests.engine.behavior_cases import rollout, two_models, vectors_match, write_rollouts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def rollouts_file(tmp_path: Path) -> str:
    return write_rollouts(tmp_path / "mine.jsonl")


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
        ({"kinds": "all"}, ConfigError, "--kind is 'all'"),
        ({"max_base_rate": 2.0}, ConfigError, "--max-base-rate is 2"),
        ({"layers": ()}, ConfigError, "--layers names no layer"),
        ({"rollouts": None}, ConfigError, "needs a prompt file"),
        ({"rollouts": None, "prompts": "p", "tuned": "t", "label_column": "x"}, ConfigError, "existing rollouts"),
        ({"label_column": "x", "rules": "r"}, ConfigError, "one judge"),
        ({"name": "a/b"}, DirectionError, "cannot name"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BehaviorConfig(**{"out": "b.safetensors", "base": "m", "rollouts": "r", **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": (5,)}, LayerError, "layer 5"),
        ({"max_length": 1}, ConfigError, "max_length is 1"),
        ({"truncation": "middle"}, ConfigError, "truncation is 'middle'"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"device": "tpu"}, ConfigError, "unknown device"),
        ({"dtype": "int4"}, ConfigError, "unknown compute dtype"),
    ],
)
def test_bad_settings_are_found_before_anything_is_sampled(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any], error: type[Exception], message: str,
) -> None:  # fmt: skip
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("sampling began")

    monkeypatch.setattr("pairtrace.engine.behavior.sample_rollouts", forbidden)
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- {id: a, prompt: Hello}\n")
    given = {"out": str(tmp_path / "h.safetensors"), "base": models[0], "tuned": models[1], "prompts": str(prompts)}
    with pytest.raises(error, match=message):
        build_behavior(BehaviorConfig(**{"device": "cpu", **given, **options}))
    with pytest.raises(AssertionError, match="sampling began"):
        build_behavior(BehaviorConfig(**given))


def test_an_architecture_that_cannot_be_read_is_found_before_anything_is_sampled(
    models: tuple[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "gpt2"
    shutil.copytree(models[0], base)
    configuration = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 600}
    (base / "config.json").write_text(json.dumps(configuration))
    (tmp_path / "prompts.yaml").write_text("- {id: a, prompt: Hello}\n")
    config = BehaviorConfig(
        out=str(tmp_path / "h.safetensors"), base=str(base), tuned=models[1],
        prompts=str(tmp_path / "prompts.yaml"), device="cpu",
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported"):
        build_behavior(config)
    assert not Path(config.rollouts_out).exists()


def test_settings_of_the_sampling_are_checked_with_the_others(tmp_path: Path) -> None:
    given = {"out": "h.safetensors", "base": "m0", "tuned": "m1", "prompts": "p.yaml"}
    for options, message in (
        ({"samples": 0}, "--samples is 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"token_budget": 0}, "--token-budget is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            BehaviorConfig(**given, **options)  # type: ignore[arg-type]


def test_rollouts_of_other_checkpoints_or_prompts_are_refused(models: tuple[str, str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- {id: a, prompt: Hello}\n")
    made = sample_rollouts(
        RolloutConfig(
            prompts=str(prompts), base=models[0], tuned=models[1], out=str(tmp_path / "r.parquet"),
            samples=1, max_new_tokens=2, device="cpu",
        )
    )  # fmt: skip
    labelled = made.table.append_column("label", pa.array([0, 1]))
    manifest = json.dumps(made.manifest).encode()
    pq.write_table(labelled.replace_schema_metadata({b"pairtrace": manifest}), tmp_path / "r.parquet")
    given = {
        "out": str(tmp_path / "h.safetensors"), "rollouts": str(tmp_path / "r.parquet"), "label_column": "label",
        "base": models[0], "device": "cpu", "layers": (1,),
    }  # fmt: skip

    def judged(**options: Any) -> None:
        config = BehaviorConfig(**{**given, **options})
        judged_rollouts(config, model_fingerprint(config.base), NULL_PROGRESS)

    judged(tuned=models[1], prompts=str(prompts))
    # The label column does not switch these checks off.
    with pytest.raises(DataMismatchError, match=r"come from the model .* but --base"):
        judged(base=models[1])
    with pytest.raises(DataMismatchError, match=r"come from the model .* but --tuned"):
        judged(tuned=models[0])
    prompts.write_text("- {id: a, prompt: Goodbye}\n")
    with pytest.raises(DataMismatchError, match=r"come from the prompts .* but .*prompts\.yaml"):
        judged(prompts=str(prompts))


def test_a_layer_outside_the_model_is_refused(models: tuple[str, str], rollouts_file: str, tmp_path: Path) -> None:
    config = BehaviorConfig(
        out=str(tmp_path / "h.safetensors"), base=models[0], rollouts=rollouts_file, label_column="harmful", layers=(5,)
    )
    with pytest.raises(LayerError, match=r"layer 5 is outside .* to 4"):
        build_behavior(config)
