"""Evaluating probes on other activations, and comparing probes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.engine.baselines.store_pairs import open_store_data
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.probes import evaluate as module
from pairtrace.engine.probes.compare import ProbeCompareConfig, compare_probes
from pairtrace.engine.probes.config import ProbeEvalConfig
from pairtrace.engine.probes.evaluate import ProbeEvaluation, evaluate_probes
from pairtrace.engine.probes.figures import area_of
from pairtrace.engine.probes.probe_file import load_probes, save_probes
from pairtrace.engine.probes.store_examples import StoreExamples
from pairtrace.errors import ConfigError, DirectionError, ExamplesError, ProbeMismatchError
from tests.engine.probes.cases import SidedStore, make_probe, make_sided_store
from tests.engine.probes.test_train import train
from tests.engine.small_store import reference_cosine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SidedStore:
    return make_sided_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def probe(store: SidedStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train(store, tmp_path_factory.mktemp("probe"), members=2, hold_out=1).out


def evaluate(store: SidedStore, probe: str, **changed: Any) -> ProbeEvaluation:
    return evaluate_probes(ProbeEvalConfig(**{"probe": probe, "store": store.path, **changed}))


def test_prompts_of_the_training_are_left_out(store: SidedStore, probe: str, tmp_path: Path) -> None:
    found = evaluate(store, probe, out=str(tmp_path / "report.json"))
    training = train(store, tmp_path, members=2, hold_out=1)
    assert found.same_model and found.examples == training.held_out_examples
    assert found.trained_on == training.training_examples
    for one in training.probes:
        assert found.find(one.name, one.layer) == one.figures
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    everything = evaluate(store, probe, include_training=True)
    assert (everything.examples, everything.trained_on) == (596, 0)
    assert everything.find("harm", 2).roc_auc.value > found.find("harm", 2).roc_auc.value - 0.1


def test_figures_on_another_store(store: SidedStore, probe: str, tmp_path: Path) -> None:
    """Another model's activations, against the definition; and the mean over layers."""
    other = make_sided_store(tmp_path / "other", seed=9, prompt_count=50)
    opened = StoreExamples.open(other.path)
    opened.origin = replace(opened.origin, model_fingerprint="7" * 64)
    config = ProbeEvalConfig(probe=probe, store=other.path, include_training=True)
    found = evaluate_probes(config, examples=opened)
    assert not found.same_model
    shares = []
    for layer in (2, 5):
        features, labels, prompts = other.labelled(layer)
        loaded = load_probes(probe, layers=(layer,), names=("harm",))[0]
        logits = features.astype(np.float64) @ loaded.weight.T.astype(np.float64) + loaded.bias
        shares.append((1 / (1 + np.exp(-logits))).mean(axis=1))
        area = area_of(shares[-1], labels, prompts)
        assert found.find("harm", layer).roc_auc.value == pytest.approx(area.value, abs=1e-9)
        assert found.find("harm", layer).roc_auc.low == pytest.approx(area.low, abs=1e-9)
    both = area_of((shares[0] + shares[1]) / 2, labels, prompts)
    assert found.find("harm", None).roc_auc.value == pytest.approx(both.value, abs=1e-9)
    with pytest.raises(KeyError):
        found.find("harm", 3)


def test_roles_and_layers(store: SidedStore, probe: str) -> None:
    found = evaluate(store, probe, roles=("held-out",), layers=(5,))
    assert [(one.name, one.role, one.layer) for one in found.probes] == [("harm-held-out-1", "held-out", 5)]


def test_using_the_training_prompts_would_be_seen(
    store: SidedStore, probe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "examples_trained_on", lambda examples, digests: np.zeros(len(examples.labels), bool))
    with pytest.raises(AssertionError):
        test_prompts_of_the_training_are_left_out(store, probe, tmp_path)


def test_refusals(store: SidedStore, probe: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeMismatchError, match="holds no layer 3: expected 3, found 2, 5"):
        evaluate(store, probe, layers=(3,))
    wide = make_sided_store(tmp_path / "wide", width=13)
    with pytest.raises(ProbeMismatchError, match=r"another width than .*: expected 13, found 12"):
        evaluate(wide, probe)
    opened = StoreExamples.open(store.path)
    opened.origin = replace(opened.origin, tokenizer_fingerprint="8" * 64)
    with pytest.raises(ProbeMismatchError, match="another tokenizer fingerprint than"):
        evaluate_probes(ProbeEvalConfig(probe=probe, store=store.path), examples=opened)
    everything = load_probes(probe)
    save_probes(tmp_path / "all.safetensors", everything, {}, trained_on=np.unique(opened.contents))
    with pytest.raises(ExamplesError, match="trained on the prompts of all 596 examples; --include-training"):
        evaluate(store, str(tmp_path / "all.safetensors"))
    source = open_store_data(opened._store, None)
    nothing = StoreExamples(opened._store, source, labels=[None] * 300)
    with pytest.raises(ExamplesError, match=r"nothing to evaluate probes on: .*298 without_label"):
        evaluate_probes(ProbeEvalConfig(probe=probe, store=store.path), examples=nothing)
    with pytest.raises(ConfigError, match="--roles names 'spare'"):
        evaluate(store, probe, roles=("spare",))
    with pytest.raises(ConfigError, match=r"reports end in \.json"):
        evaluate(store, probe, out="x.txt")


def test_comparison(store: SidedStore, tmp_path: Path) -> None:
    """Cosine, Spearman and overlap of the top against scipy and the definition."""
    from scipy.stats import spearmanr

    vectors = np.random.default_rng(3).normal(size=(2, 12)).astype(np.float32)
    vectors[1] += vectors[0]
    for number, name in enumerate(("one", "two")):
        probe = make_probe(name=name, weight=vectors[number : number + 1], layer=5, width=12)
        save_probes(tmp_path / f"{name}.safetensors", [probe], {})
    files = {"first": str(tmp_path / "one.safetensors"), "second": str(tmp_path / "two.safetensors")}
    (plain,) = compare_probes(ProbeCompareConfig(**files))
    wide = vectors.astype(np.float64)
    assert plain.cosine == pytest.approx(wide[0] @ wide[1] / np.prod(np.linalg.norm(wide, axis=1)), abs=1e-12)
    assert (plain.first, plain.second, plain.layer, plain.spearman, plain.same_model) == ("one", "two", 5, None, True)
    (found,) = compare_probes(ProbeCompareConfig(**files, store=store.path, top_share=0.1))
    differences = store.sides[5]["chosen"] - store.sides[5]["rejected"]
    scores = [reference_cosine(differences[store.usable], one) for one in vectors]
    assert found.spearman == pytest.approx(spearmanr(*scores).statistic, abs=1e-3)
    assert found.top == 30
    tops = [set(np.argsort(-one)[:30].tolist()) for one in scores]
    assert found.top_overlap == pytest.approx(len(tops[0] & tops[1]) / 30, abs=1 / 30)
    with pytest.raises(ProbeMismatchError, match="was given twice"):
        compare_probes(ProbeCompareConfig(first=files["first"], second=files["first"]))


def test_what_cannot_be_compared(store: SidedStore, probe: str, tmp_path: Path) -> None:
    names = [
        (one.first, one.second) for one in compare_probes(ProbeCompareConfig(first=probe, second=probe, layers=(2,)))
    ]
    assert names == [
        ("harm", "harm-held-out-1"),
        ("harm", "harm-mean-difference"),
        ("harm-held-out-1", "harm-mean-difference"),
    ]
    direction = Direction(name="d", layer=3, values=np.ones((1, 12), np.float32), kind="vector", origin="d")
    save_directions(tmp_path / "d.safetensors", [direction], {})
    other = str(tmp_path / "d.safetensors")
    with pytest.raises(ProbeMismatchError, match="no layer is common to all"):
        compare_probes(ProbeCompareConfig(first=probe, second=other))
    with pytest.raises(ProbeMismatchError, match="nothing to compare at this layer: expected 5"):
        compare_probes(ProbeCompareConfig(first=other, second=other, layers=(5,)))
    save_probes(tmp_path / "w.safetensors", [make_probe(width=13, layer=2)], {})
    with pytest.raises(ProbeMismatchError, match="different widths: expected 12, found 13"):
        compare_probes(ProbeCompareConfig(first=probe, second=str(tmp_path / "w.safetensors")))
    with pytest.raises(DirectionError, match="has width 13; expected 12"):
        compare_probes(ProbeCompareConfig(first=probe, second=str(tmp_path / "w.safetensors"), store=store.path))
    with pytest.raises(ConfigError, match="--top-share is 1"):
        ProbeCompareConfig(first="a", second="b", top_share=1)
