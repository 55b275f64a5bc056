"""From rollouts and a store to a product, on a tiny model whose answers are given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from pairtrace.engine import backend as backend_module
from pairtrace.engine.base_reader import BaseReader
from pairtrace.engine.cost import read_costs
from pairtrace.engine.discovery import prompts_view
from pairtrace.engine.discovery.description import DescriptionConfig
from pairtrace.engine.discovery.product import Discovered, read_product
from pairtrace.engine.discovery.prompts_view import PromptsConfig, discover_prompts
from pairtrace.engine.discovery.stability import StabilityConfig
from pairtrace.engine.extract import extract
from pairtrace.engine.monitoring.asked import Answer, AskedPrompts
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError, StoreLockedError, StoreMismatchError
from pairtrace.store.lock import WriterLock
from tests.engine.extraction import config_for, pair, write_rows
from tests.models import make_model, make_tokenizer

REFUSAL = "I cannot help with that."
COMPLIES = "Sure! Here is the whole list: take the key, open the door and go in."
OTHER_WORDS = "I cannot help with this."
KINDS = {"flip": (REFUSAL, COMPLIES), "words": (REFUSAL, OTHER_WORDS), "same": (REFUSAL, REFUSAL)}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    options = {"n_workers": 1, "threads_per_worker": 1, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    with Client(processes=False, dashboard_address=None, **options) as running:
        yield running


@pytest.fixture(autouse=True)
def cluster_in_this_process(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def given(address: str | None) -> Iterator[Any]:
        yield client

    monkeypatch.setattr(prompts_view, "discovery_client", given)


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that prefer compliance, pairs that prefer other words, and pairs of neither kind."""
    root = tmp_path_factory.mktemp("store")
    rows = [pair(f"How do I open door {n}?", COMPLIES, REFUSAL, source="comply") for n in range(12)]
    rows += [pair(f"How do I open lid {n}?", OTHER_WORDS, REFUSAL, source="words") for n in range(12)]
    rows += [pair(f"Say {n}", f"The number {n}.", f"{n * 7}?", source="numbers") for n in range(12)]
    extract(config_for(model, root / "acts.zarr", data=str(write_rows(root / "prefs.jsonl", rows)), limit=None))
    return root / "acts.zarr"


def write_rollouts(path: Path, kinds: dict[str, int], judged: bool = True) -> str:
    rows = [
        {
            "prompt_id": f"{kind}-{number}",
            "model": model,
            "prompt": f"Tell me how to take the {kind} {number}",
            "response": answer,
            "harmful": (answer == COMPLIES) if judged else None,
        }
        for kind, count in kinds.items()
        for number in range(count)
        for model, answer in zip(("base", "tuned"), KINDS[kind], strict=True)
    ]
    return str(write_rows(path, rows))


def config(model: Path, store: Path, tmp_path: Path, rollouts: str, **changes: Any) -> PromptsConfig:
    description = DescriptionConfig(stability=StabilityConfig(runs=3))
    options: dict[str, Any] = {
        "store": str(store), "base": str(model), "out": str(tmp_path / "found"), "rollouts": rollouts,
        "label_column": "harmful", "device": "cpu", "description": description,
    }  # fmt: skip
    return PromptsConfig(**{**options, **changes})


def kinds_of(found: Discovered, number: int) -> set[str]:
    return {str(item).split("-")[0] for item in found.items[found.labels == number]}


def test_prompts_whose_verdict_flipped_are_found_and_flagged(model: Path, store: Path, tmp_path: Path) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 12, "words": 14, "same": 5})
    found = discover_prompts(config(model, store, tmp_path, rollouts))
    assert found.details["prompts"] == {"changed": 26, "unchanged": 5}
    assert len(found.items) == 26  # what did not change is counted, never clustered
    flagged = [cluster for cluster in found.clusters if cluster.flagged]
    assert len(flagged) == 1 and kinds_of(found, flagged[0].number) == {"flip"} and flagged[0].size == 12
    assert flagged[0].verdicts is not None
    assert (flagged[0].verdicts["base_rate"], flagged[0].verdicts["tuned_rate"]) == (0.0, 1.0)
    assert flagged[0].top_datapoints[0].source == "comply"
    assert flagged[0].exemplars[0].texts["tuned"] == COMPLIES and flagged[0].exemplars[0].texts["base"] == REFUSAL
    assert "Tell me how to take the flip" in flagged[0].exemplars[0].texts["prompt"]
    again = read_product(tmp_path / "found")
    np.testing.assert_array_equal(again.labels, found.labels)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    assert read_costs(tmp_path / "found" / "clusters.costs.jsonl")[0].model_tokens > 0


def test_the_mean_vector_of_a_cluster_is_a_direction_that_score_takes(model: Path, store: Path, tmp_path: Path) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 12})
    found = discover_prompts(config(model, store, tmp_path, rollouts))
    assert kinds_of(found, 0) == {"flip"} and len(found.clusters) == 1  # all alike, and yet a cluster
    behaviors = str(tmp_path / "found" / "directions.safetensors")
    summary = score(ScoreConfig(store=str(store), directions=(behaviors,), out=str(tmp_path / "s.parquet")))
    assert summary.behaviors[0].name == "cluster-0"
    assert summary.behaviors[0].top_row is not None and summary.behaviors[0].top_row < 12
    assert summary.layer == found.layer == 4


def test_a_second_run_reads_nothing_again(
    model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 9, "words": 9})
    settings = config(model, store, tmp_path, rollouts)
    first = discover_prompts(settings)
    files = {path.name: path.read_bytes() for path in (tmp_path / "found").glob("[md]*.*")}
    monkeypatch.setattr(backend_module.HFBackend, "load", lambda *args, **options: pytest.fail("read again"))
    again = discover_prompts(settings)
    assert again.to_dict() == first.to_dict()
    assert {path.name: path.read_bytes() for path in (tmp_path / "found").glob("[md]*.*")} == files
    # Other rollouts in the same place are refused, whatever else is there.
    other = write_rollouts(tmp_path / "o.jsonl", {"flip": 10})
    with pytest.raises(ConfigError, match="holds other rollouts"):
        discover_prompts(config(model, store, tmp_path, other))


def test_without_verdicts_nothing_is_flagged(model: Path, store: Path, tmp_path: Path) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 12}, judged=False)
    found = discover_prompts(config(model, store, tmp_path, rollouts))
    assert len(found.clusters) == 1 and found.clusters[0].verdicts is None and not found.clusters[0].flagged
    assert "no prompt has a verdict" in found.details["flags"]


@pytest.mark.parametrize(
    ("kinds", "note"),
    [
        ({"flip": 5, "same": 4}, "5 of 9 prompts changed, but a cluster needs 8"),
        ({"same": 10}, "none of the 10 prompts changed: both models give the same answers"),
    ],
)
def test_too_few_changes_are_no_cluster(
    model: Path, store: Path, tmp_path: Path, kinds: dict[str, int], note: str
) -> None:
    found = discover_prompts(config(model, store, tmp_path, write_rollouts(tmp_path / "r.jsonl", kinds)))
    changed = kinds.get("flip", 0)
    assert not found.clusters and (found.labels == -1).all() and len(found.items) == changed
    assert note in found.details["note"]
    assert read_product(tmp_path / "found").clusters == ()


def write_mixed(path: Path) -> Path:
    """Nine prompts, the second of which has a distractor."""
    rows: list[dict[str, Any]] = [{"id": f"p{n}", "prompt": f"Tell me how to take the box {n}"} for n in range(9)]
    rows[1]["distractor"] = "Be brief."
    return write_rows(path, rows)


def test_a_prompt_with_a_distractor_among_others_is_asked_without_and_with_it(
    model: Path, store: Path, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "tuned")
    tuned, bag = make_model("olmo2", tmp_path / "tuned", seed=1), write_mixed(tmp_path / "bag.jsonl")
    options: dict[str, Any] = {"prompts": str(bag), "tuned": str(tuned), "max_new_tokens": 4}
    found = discover_prompts(
        replace(config(model, store, tmp_path, "none"), rollouts=None, label_column=None, **options)
    )
    assert sum(found.details["prompts"].values()) == 10
    rows = read_rollouts(tmp_path / "found" / "prompts.rollouts.parquet").table.to_pylist()
    asked = {(row["prompt_id"], row["condition"]): json.loads(row["messages"])[-1]["content"] for row in rows}
    assert len(asked) == 10 and len(rows) == 2 * len(asked)
    assert asked["p1", "plain"] == "Tell me how to take the box 1"
    assert asked["p1", "distractor"] == "Tell me how to take the box 1 Be brief."
    # The monitor asks the same.
    monitored = AskedPrompts(load_prompts(bag, mixed=True), PromptEncoder.load(str(model)), 4)
    answers = [Answer(response="", tokens=0, finished=True, seed=0)] * len(monitored)
    items = monitored.table(answers).table.to_pylist()
    assert {(row["prompt_id"], row["condition"]): json.loads(row["messages"])[-1]["content"] for row in items} == asked


def test_rollouts_of_ones_own_may_have_distractors_among_their_prompts(
    model: Path, store: Path, tmp_path: Path
) -> None:
    bag = str(write_mixed(tmp_path / "bag.jsonl"))
    asked = [("p1", "distractor"), *((f"p{n}", "plain") for n in range(9))]

    def rollouts(asked: list[tuple[str, str]]) -> str:
        rows = [
            {"prompt_id": name, "condition": condition, "model": who, "response": answer, "harmful": answer == COMPLIES}
            for name, condition in asked
            for who, answer in zip(("base", "tuned"), KINDS["flip"], strict=True)
        ]
        return str(write_rows(tmp_path / "r.jsonl", rows))

    found = discover_prompts(config(model, store, tmp_path, rollouts(asked), prompts=bag))
    assert found.items[0] == "p1 (distractor)" and len(found.items) == 10
    with pytest.raises(DataMismatchError, match=r"1 prompts that have no distractors in .*'p2'"):
        discover_prompts(config(model, store, tmp_path, rollouts([("p2", "distractor"), *asked]), prompts=bag))


def test_cheap_errors_come_before_any_model_is_read(
    model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseReader, "prepare", lambda *_: pytest.fail("a model was read"))
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 9})
    for message, changes in (
        ("cannot read the rule file", {"rules": "nowhere.yaml", "label_column": None}),
        ("cannot read the prompt file", {"prompts": str(tmp_path / "nowhere.jsonl")}),
        ("--scheduler is 'rubbish'", {"scheduler": "rubbish"}),
        ("no column 'nosuch' in the data", {"description": DescriptionConfig(metadata=("nosuch",))}),
    ):
        with pytest.raises((ConfigError, DataFormatError), match=message):
            discover_prompts(config(model, store, tmp_path, rollouts, **changes))


def test_what_cannot_be_used_is_refused(model: Path, store: Path, tmp_path: Path) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 9})
    with pytest.raises(ConfigError, match="--dimensions is 0"):
        config(model, store, tmp_path, rollouts, dimensions=0)
    with pytest.raises(ConfigError, match="min_cluster_size must be at least 2"):
        config(model, store, tmp_path, rollouts, min_cluster_size=1)
    with pytest.raises(ConfigError, match="sampling needs a prompt file"):
        PromptsConfig(store=str(store), base=str(model), out=str(tmp_path))
    with pytest.raises(StoreMismatchError, match="layers"):
        discover_prompts(config(model, store, tmp_path, rollouts, layer=3))
    discover_prompts(config(model, store, tmp_path, rollouts))
    matrix = tmp_path / "found" / "similarity.zarr"
    described = json.loads((matrix / "zarr.json").read_text())
    described["attributes"]["pairtrace"]["bag"] = "another"
    (matrix / "zarr.json").write_text(json.dumps(described))
    with pytest.raises(DataMismatchError, match="was made with bag 'another'"):
        discover_prompts(config(model, store, tmp_path, rollouts))


def test_a_directory_belongs_to_one_run_at_a_time(model: Path, store: Path, tmp_path: Path) -> None:
    rollouts = write_rollouts(tmp_path / "r.jsonl", {"flip": 9})
    (tmp_path / "other").mkdir()
    with WriterLock(tmp_path / "other"), pytest.raises(StoreLockedError, match="is being written by process"):
        discover_prompts(config(model, store, tmp_path, rollouts, out=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="which is a file"):
        discover_prompts(config(model, store, tmp_path, rollouts, out=rollouts))
