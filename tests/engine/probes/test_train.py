"""Training from a store: the examples it takes, the probes it makes, the figures it gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.engine.probes.config import ProbeTrainConfig
from pairtrace.engine.probes.examples import Block
from pairtrace.engine.probes.grouping import held_out_prompts
from pairtrace.engine.probes.probe_file import load_probes, trained_prompts
from pairtrace.engine.probes.store_examples import StoreExamples
from pairtrace.engine.probes.train import ProbeTraining, train_probes
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import ConfigError, DataMismatchError, DirectionError, ExamplesError, LayerError
from tests.engine.probes.cases import PRINTS, SidedStore, make_sided_store
from tests.engine.small_store import reference_cosine

STRENGTHS = (1e-2, 1.0)


def train(store: SidedStore, folder: Path, **changed: Any) -> ProbeTraining:
    given: dict[str, Any] = {"store": store.path, "out": str(folder / "harm.safetensors"), "strengths": STRENGTHS}
    return train_probes(ProbeTrainConfig(**{**given, **changed}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SidedStore:
    return make_sided_store(tmp_path_factory.mktemp("store"))


def in_order(store: SidedStore) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and prompts numbered as they appear among the chosen sides and then the rejected ones."""
    _, labels, prompts = store.labelled(2)
    numbers: dict[int, int] = {}
    return labels, np.array([numbers.setdefault(one, len(numbers)) for one in prompts.tolist()])


def equals_scikit_learn(store: SidedStore, found: ProbeTraining) -> bool:
    """Weights, probabilities and figures against a pipeline of scikit-learn on the arrays behind the store."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import brier_score_loss, roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, numbers = in_order(store)
    out = held_out_prompts(labels, numbers, 0.2, 0)
    same = found.held_out_examples == out.sum()
    for probe in load_probes(found.out, roles=("training",)):
        features = store.labelled(probe.layer)[0].astype(np.float64)
        result = next(one for one in found.probes if (one.name, one.layer) == (probe.name, probe.layer))
        regression = LogisticRegression(C=result.strength, solver="newton-cholesky", tol=1e-12, max_iter=1000)
        pipeline = make_pipeline(StandardScaler(), regression).fit(features[~out], labels[~out])
        expected = regression.coef_[0] / pipeline[0].scale_
        same &= bool(np.abs(probe.weight[0] - expected).max() <= 1e-4 * np.abs(expected).max())
        shares = pipeline.predict_proba(features)[:, 1]
        same &= bool(np.abs(probe.probabilities(features.astype(np.float32)) - shares).max() < 1e-4)
        figures = result.figures
        same &= abs(figures.roc_auc.value - roc_auc_score(labels[out], shares[out])) < 1e-3
        same &= abs(figures.brier - brier_score_loss(labels[out], shares[out])) < 1e-4
    return bool(same)


def test_probes_are_those_of_scikit_learn(store: SidedStore, tmp_path: Path) -> None:
    found = train(store, tmp_path)
    assert found.layers == (2, 5) and found.best_layer == 5
    assert (found.examples, found.positives) == (2 * 298, 298) and found.left_out == {"quarantined": 2}
    assert found.training_examples + found.held_out_examples == found.examples
    assert equals_scikit_learn(store, found)
    assert json.loads(json.dumps(found.to_dict()))["probes"][0]["figures"]["roc_auc"]["value"] > 0.55


@pytest.mark.parametrize("mutation", ["layer", "sides", "training"])
def test_other_examples_are_caught(
    store: SidedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    real = StoreExamples.blocks

    def other(self: StoreExamples, layer: int) -> Iterator[Block]:
        for positions, rows in real(self, 7 - layer if mutation == "layer" else layer):
            yield (len(self.labels) - 1 - positions)[::-1] if mutation == "sides" else positions, rows

    monkeypatch.setattr(StoreExamples, "blocks", other)
    if mutation == "training":
        from pairtrace.engine.probes import train as module

        monkeypatch.setattr(StoreExamples, "blocks", real)
        monkeypatch.setattr(module, "_drawn", lambda positions, most, seed: np.arange(596))
    assert not equals_scikit_learn(store, train(store, tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes(store: SidedStore, tmp_path: Path, dtype: str) -> None:
    """A converted store gives nearly the same probe; the blocks of the store are decoded by the store itself."""
    from pairtrace.engine.convert import ConvertConfig, convert

    convert(ConvertConfig(source=store.path, out=str(tmp_path / "b.zarr"), dtype=dtype, fsync=False))
    weights = []
    for path in (store.path, str(tmp_path / "b.zarr")):
        out = str(tmp_path / f"{len(weights)}.safetensors")
        train_probes(ProbeTrainConfig(store=path, out=out, strengths=(0.01,), layers=(5,)))
        weights.append(load_probes(out, roles=("training",))[0].weight[0].astype(np.float64))
    cosine = weights[0] @ weights[1] / (np.linalg.norm(weights[0]) * np.linalg.norm(weights[1]))
    assert 0.99 < cosine < 1 - 1e-12


def test_score_takes_the_file_as_it_is(store: SidedStore, tmp_path: Path) -> None:
    found = train(store, tmp_path, members=3, hold_out=1)
    score(ScoreConfig(store=store.path, directions=(found.out,), out=str(tmp_path / "s.parquet")))
    table = ScoresTable.open(tmp_path / "s.parquet")
    assert table.behaviors == ("harm", "harm-held-out-1", "harm-mean-difference")
    probes = {probe.name: probe for probe in load_probes(found.out, layers=(5,))}
    differences = store.sides[5]["chosen"] - store.sides[5]["rejected"]
    members = probes["harm"].weight.astype(np.float64)
    mean = sum(one / np.linalg.norm(one) for one in members) / 3
    for name, direction in (("harm", mean), ("harm-mean-difference", probes["harm-mean-difference"].weight[0])):
        scores = np.array(table.read([f"score:{name}"]).column(0).to_pylist(), float)
        expected = reference_cosine(differences.astype(np.float16).astype(np.float32), direction)
        np.testing.assert_allclose(scores[store.usable], expected[store.usable], atol=1e-5)
    best = np.max([reference_cosine(differences, one) for one in members], axis=0)
    scores = np.array(table.read(["score:harm"]).column(0).to_pylist(), float)
    assert np.abs(scores - best)[store.usable].max() > 1e-3  # the maximum would be something else


def test_ensembles_held_out_probes_and_the_baseline(store: SidedStore, tmp_path: Path) -> None:
    found = train(store, tmp_path, members=3, hold_out=2, vary="seeds", layers=(5,))
    probes = load_probes(found.out)
    assert [(probe.name, probe.role, probe.members) for probe in probes] == [
        ("harm", "training", 3),
        ("harm-held-out-1", "held-out", 1),
        ("harm-held-out-2", "held-out", 1),
        ("harm-mean-difference", "baseline", 1),
    ]
    assert {name: getattr(probes[0], name) for name in PRINTS} == PRINTS
    weights = [*probes[0].weight, probes[1].weight[0], probes[2].weight[0]]
    assert len({one.tobytes() for one in weights}) == 5  # no draw twice
    features, _, _ = store.labelled(5)
    labels, numbers = in_order(store)
    inside = ~held_out_prompts(labels, numbers, 0.2, 0)
    wide = features.astype(np.float64)
    difference = wide[inside & (labels == 1)].mean(axis=0) - wide[inside & (labels == 0)].mean(axis=0)
    baseline = probes[3]
    ratio = baseline.weight[0] / difference
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    assert ratio.mean() > 0
    shares = baseline.probabilities(features)[inside]
    assert shares.mean() == pytest.approx(labels[inside].mean(), abs=1e-5)  # what a fitted intercept guarantees
    again = train(store, tmp_path, members=3, hold_out=2, vary="seeds", layers=(5,))
    assert [one.figures for one in again.probes] == [one.figures for one in found.probes]


def test_figures_are_of_prompts_that_were_kept_out(store: SidedStore, tmp_path: Path) -> None:
    found = train(store, tmp_path)
    seen = set(trained_prompts(found.out).tolist())
    examples = StoreExamples.open(store.path)
    assert 0 < len(seen) < examples.prompts.max() + 1
    of_training = np.isin(examples.contents, list(seen))
    assert of_training.sum() == found.training_examples
    assert not set(examples.prompts[of_training].tolist()) & set(examples.prompts[~of_training].tolist())


def test_a_label_column_takes_one_side(store: SidedStore, tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        found = train(store, tmp_path, label_column="good", side=side, layers=(5,))
        known = store.usable.copy()
        known[5] = False  # its label is null
        assert (found.examples, found.positives) == (297, int((store.good & known).sum()))
        assert found.left_out == {"quarantined": 2, "without_label": 1}
        probe = load_probes(found.out, roles=("training",))[0]
        scores = probe.logits(store.sides[5][side][known])[:, 0]
        assert np.corrcoef(scores, store.good[known])[0, 1] > 0.8
        other = probe.logits(store.sides[5]["chosen"][known] - store.sides[5]["rejected"][known])[:, 0]
        assert abs(np.corrcoef(other, store.good[known])[0, 1]) < 0.3


def test_past_max_rows_the_solver_sees_some_and_the_statistics_all(store: SidedStore, tmp_path: Path) -> None:
    found = train(store, tmp_path, max_rows=200, layers=(5,))
    full = train(store, tmp_path, out=str(tmp_path / "full.safetensors"), layers=(5,))
    assert (found.solved_examples, full.solved_examples) == (200, full.training_examples)
    assert found.training_examples == full.training_examples
    some, every = (load_probes(path, layers=(5,)) for path in (found.out, full.out))
    assert not np.allclose(some[0].weight, every[0].weight)
    # The class means are those of all examples.
    lines = [one[1].weight[0] / np.linalg.norm(one[1].weight[0]) for one in (some, every)]
    np.testing.assert_allclose(*lines, atol=1e-6)


def test_refusals(tmp_path: Path, store: SidedStore) -> None:
    plain = make_sided_store(tmp_path / "plain", sides=False)
    with pytest.raises(ExamplesError, match="extract again with --sides: expected activations of both"):
        train(plain, tmp_path)
    broken = make_sided_store(tmp_path / "broken", broken=(20,))
    with pytest.raises(ExamplesError, match=r"row 20 \(chosen\) is not finite at layer 2, column 3: .*found nan"):
        train(broken, tmp_path)
    assert not (tmp_path / "harm.safetensors").exists()
    with pytest.raises(LayerError, match="layer 3 is not in"):
        train(store, tmp_path, layers=(3,))
    with pytest.raises(ExamplesError, match=r"row 2: rating is no label: expected true or 1.*found 2"):
        train(store, tmp_path, label_column="rating")
    with pytest.raises(ConfigError, match="no column 'nonsense' in the data; there is: prompt"):
        train(store, tmp_path, label_column="nonsense")
    few = make_sided_store(tmp_path / "few", rows=140, prompt_count=4)
    with pytest.raises(ExamplesError, match=r"at least 6 prompts with an example of the class 0.* found 4 and 4"):
        train(few, tmp_path)
    opened = StoreExamples.open(store.path)
    with pytest.raises(ExamplesError, match="the labels do not fit the rows: expected 300 labels, found 299"):
        StoreExamples(opened._store, _source(store), labels=[1] * 299)
    with pytest.raises(ExamplesError, match="found 298 examples of the class 1 alone"):
        examples = StoreExamples(opened._store, _source(store), labels=[1] * 300)
        train_probes(ProbeTrainConfig(store=store.path, out=str(tmp_path / "x.safetensors")), examples=examples)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(store.data).read_text().replace("yes", "sure"))
    with pytest.raises(DataMismatchError, match="is not the data behind"):
        train(store, tmp_path, data=str(other))


def _source(store: SidedStore) -> Any:
    from pairtrace.engine.pairs import open_pairs

    return open_pairs(store.data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"store": None}, "got neither"),
        ({"rollouts": "r.parquet", "model": "m"}, "got both"),
        ({"store": None, "rollouts": "r.parquet"}, "say with --model"),
        ({"model": "m"}, "belong to --rollouts"),
        ({"store": None, "rollouts": "r", "model": "m", "data": "d"}, "--data says where"),
        ({"side": "both"}, "--side is 'both'"),
        ({"layers": ()}, "--layers names no layer"),
        ({"max_rows": 1}, "--max-rows is 1"),
        ({"max_length": -1}, "--max-length is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"out": "p.npy"}, "end in .safetensors"),
        ({"strengths": (0.0,)}, "--strengths is"),
        ({"folds": 1}, "--folds is 1"),
        ({"test_share": 1.0}, "--test-share is 1.0"),
        ({"members": 0}, "--members is 0"),
        ({"vary": "luck"}, "--vary is 'luck'"),
        ({"confidence": 1.0}, "--confidence is 1.0"),
        ({"bins": 0}, "--bins is 0"),
    ],
)
def test_settings_out_of_range(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProbeTrainConfig(**{"store": "acts.zarr", "out": "p.safetensors", **changed})
    with pytest.raises(DirectionError, match="cannot name a behaviour"):
        ProbeTrainConfig(store="acts.zarr", out="p.safetensors", name="a b")
