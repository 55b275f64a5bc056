"""What clusters are described with, against plain NumPy."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pairtrace.engine.discovery import store_passes
from pairtrace.engine.discovery.clustering import Clustering
from pairtrace.engine.discovery.columns import Column
from pairtrace.engine.discovery.description import (
    ClusteredItems,
    Description,
    DescriptionConfig,
    describe,
    store_inputs,
)
from pairtrace.engine.discovery.exemplars import TEXT_CHARACTERS, plain_text
from pairtrace.engine.discovery.naming import NamingConfig
from pairtrace.engine.discovery.stability import StabilityConfig
from pairtrace.errors import ConfigError, DataError, DataMismatchError
from pairtrace.store.reader import ActivationStore
from tests.engine.baselines.judge_server import Question, Reply, judge_server
from tests.engine.small_store import SmallStore, make_store, reference_cosine

LAYER = 5
UNUSABLE = [7, 11, 130]
ROWS = np.setdiff1d(np.arange(300), UNUSABLE)


@pytest.fixture(scope="module", params=["float16", "bfloat16", "int8", "float32"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"), dtype=request.param)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("half"))


def clustering_of(labels: np.ndarray, probabilities: np.ndarray | None = None) -> Clustering:
    count = int(labels.max(initial=-1)) + 1
    given = (labels >= 0) if probabilities is None else np.where(labels >= 0, probabilities, 0)
    return Clustering(
        labels=labels.astype(np.int32),
        probabilities=given.astype(np.float32),
        persistence=np.linspace(0.5, 0.1, count, dtype=np.float32),
        method="exact",
        details={},
    )


def some_clusters() -> Clustering:
    rng = np.random.default_rng(1)
    labels = np.where(ROWS % 3 == 0, 0, rng.integers(-1, 3, len(ROWS)))
    return clustering_of(labels, rng.choice([0.5, 1.0], len(ROWS)))


def describe_pairs(store: SmallStore, clustering: Clustering, out: Path, **changes: Any) -> Description:
    options = {"client": changes.pop("client", None)}
    return describe(
        ClusteredItems(view="pairs", items=ROWS),
        clustering,
        changes.pop("recluster", None),
        ActivationStore.open(store.path),
        LAYER,
        DescriptionConfig(**changes),
        out=out,
        **options,
    )


def test_pairs(made: SmallStore, tmp_path: Path) -> None:
    clustering, rows = some_clusters(), made.rows[LAYER].astype(np.float64)
    found = describe_pairs(made, clustering, tmp_path, exemplars=4, top_datapoints=6)
    unit = rows[ROWS] / np.linalg.norm(rows[ROWS], axis=1, keepdims=True)
    for number, cluster in enumerate(found.clusters):
        members = np.flatnonzero(clustering.labels == number)
        direction = unit[members].mean(axis=0)
        np.testing.assert_allclose(found.directions[number], direction, atol=1e-6)
        cosines = reference_cosine(rows, direction)
        own = cosines[ROWS[members]]
        np.testing.assert_allclose(found.cosines[members], own, atol=1e-5)
        assert (cluster.number, cluster.size, cluster.direction) == (number, len(members), f"cluster-{number}")
        assert cluster.persistence == clustering.persistence[number]
        assert cluster.cosine_median == pytest.approx(float(np.median(own)), abs=1e-5)
        assert cluster.cosine_low == pytest.approx(float(np.quantile(own, 0.05)), abs=1e-5)
        order = np.lexsort((-own, -clustering.probabilities[members]))[:4]
        assert [one.item for one in cluster.exemplars] == ROWS[members[order]].tolist()
        best = np.argsort(-np.where(np.isnan(cosines), -2, cosines))[:6]
        assert [one.row for one in cluster.top_datapoints] == best.tolist()
        for one in cluster.top_datapoints:
            assert one.cosine == pytest.approx(cosines[one.row], abs=1e-5)
            assert one.source == made.sources[one.row]
            assert one.texts["prompt"] == f"question {one.row}"
        for shown in cluster.exemplars:
            row = shown.item
            assert shown.texts == {"prompt": f"question {row}", "chosen": f" yes {row}", "rejected": f" no {row}"}
    assert np.isnan(found.cosines[clustering.labels < 0]).all()


def test_members_are_enriched_in_their_sources(half: SmallStore, tmp_path: Path) -> None:
    found = describe_pairs(half, some_clusters(), tmp_path)
    (best,) = found.clusters[0].enrichment
    inside = int((some_clusters().labels == 0).sum())
    # All 98 usable rows from the web (row % 3 == 0) are members.
    assert (best.among, best.column, best.value) == ("members", "source", "web")
    assert (best.inside, best.inside_total, best.outside, best.outside_total) == (100, inside, 0, 297 - inside)
    assert best.p_value == pytest.approx(float(stats.hypergeom.sf(99, 297, 100, inside)), rel=1e-9)
    assert found.details["enrichment_tests"] == 9


def test_any_division_into_tasks_gives_the_same_bits(
    half: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    monkeypatch.setattr(store_passes, "_SHARDS_PER_TASK", 2)
    here = describe_pairs(half, some_clusters(), tmp_path)
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        there = describe_pairs(half, some_clusters(), tmp_path, client=client)
    for name in ("directions", "cosines"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    assert here.clusters == there.clusters


def test_finished_rows_of_an_incomplete_store(tmp_path: Path) -> None:
    made = make_store(tmp_path, skip_shards=(1,))
    rows = np.setdiff1d(ROWS, np.arange(64, 128))
    labels = rows % 2
    found = describe(
        ClusteredItems(view="pairs", items=rows),
        clustering_of(labels),
        None,
        ActivationStore.open(made.path, allow_incomplete=True),
        LAYER,
        DescriptionConfig(top_datapoints=300),
        out=tmp_path,
    )
    members = made.rows[LAYER][rows[labels == 1]].astype(np.float64)
    direction = (members / np.linalg.norm(members, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(found.directions[1], direction, atol=1e-6)
    assert sorted(one.row for one in found.clusters[1].top_datapoints) == rows.tolist()


def test_stability_is_that_of_the_reclustering(half: SmallStore, tmp_path: Path) -> None:
    clustering = some_clusters()
    found = describe_pairs(
        half,
        clustering,
        tmp_path,
        recluster=lambda positions, _: np.where(clustering.labels[positions] == 1, 0, -1),
        stability=StabilityConfig(runs=3),
    )
    grades = [cluster.stability.grade if cluster.stability else None for cluster in found.clusters]
    assert grades == ["unstable", "highly stable", "unstable"]
    assert (found.details["stability_runs"], found.details["stability_items"]) == (3, 297)


def test_names_come_from_the_judge(half: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(question: Question) -> Reply:
        examples = json.loads(question.body["messages"][1]["content"])["examples"]
        return Reply(json.dumps({"name": " and ".join(one["prompt"] for one in examples[:2])}))

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server(answer) as server:
        naming = NamingConfig(base_url=server.url, model="m")
        found = describe_pairs(half, some_clusters(), tmp_path / "out", naming=naming)
    for cluster in found.clusters:
        assert cluster.name == " and ".join(one.texts["prompt"] for one in cluster.exemplars[:2])
    assert (tmp_path / "out" / "names.judge.jsonl").exists()
    assert found.details["naming"]["asked"] == 3


def test_noise_only(half: SmallStore, tmp_path: Path) -> None:
    found = describe_pairs(half, clustering_of(np.full(len(ROWS), -1)), tmp_path, recluster=lambda rows, _: rows)
    assert found.clusters == ()
    assert found.directions.shape == (0, 24)
    assert np.isnan(found.cosines).all()


def prompts(store: SmallStore, out: Path, vectors: np.ndarray, labels: np.ndarray, **changes: Any) -> Description:
    return describe(
        ClusteredItems(
            view="prompts",
            items=np.array([f"p{number}" for number in range(len(labels))], object),
            vectors=vectors,
            columns=(Column.of("topic", ["law" if label == 0 else "art" for label in labels.tolist()]),),
            texts=lambda positions: [{"prompt": f"ask {number}"} for number in positions.tolist()],
        ),
        clustering_of(labels),
        None,
        ActivationStore.open(store.path),
        LAYER,
        DescriptionConfig(**changes),
        out=out,
    )


def test_prompts(half: SmallStore, tmp_path: Path) -> None:
    # The first cluster leans on rows from one source.
    sources = ["plant" if row[0] > 1 else "rest" for row in half.rows[LAYER]]
    planted = np.array([source == "plant" for source in sources])
    store = make_store(tmp_path / "planted", sources=sources)
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, -1], [20, 10, 5])
    vectors = rng.normal(size=(35, 24)).astype(np.float32)
    vectors[:20, 0] += 9
    vectors *= rng.uniform(0.1, 10, size=(35, 1)).astype(np.float32)
    found = prompts(store, tmp_path, vectors, labels)
    first, second = found.clusters
    for number, (start, stop) in enumerate([(0, 20), (20, 30)]):
        # Of the vectors as they are: what moved an answer far counts for more.
        direction = vectors[start:stop].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found.directions[number], direction, rtol=1e-5, atol=1e-6)
        own = reference_cosine(vectors[start:stop], direction)
        np.testing.assert_allclose(found.cosines[start:stop], own, atol=1e-6)
    assert np.isnan(found.cosines[30:]).all()
    cosines = reference_cosine(store.rows[LAYER], found.directions[0])
    best = np.argsort(-np.where(np.isnan(cosines), -2, cosines))[:20]
    assert [one.row for one in first.top_datapoints] == best[:10].tolist()
    typical = int(np.nanargmax(found.cosines[:20]))
    assert (first.exemplars[0].item, first.exemplars[0].texts) == (f"p{typical}", {"prompt": f"ask {typical}"})
    members, datapoints = sorted(first.enrichment, key=lambda one: one.among != "members")
    assert (members.column, members.value, members.inside, members.outside_total) == ("topic", "law", 20, 15)
    inside = int(planted[best].sum())
    assert (datapoints.among, datapoints.column, datapoints.value) == ("datapoints", "source", "plant")
    assert (datapoints.inside, datapoints.inside_total, datapoints.outside_total) == (inside, 20, 278)
    # Quarantined rows could not be chosen: 298 are left.
    assert datapoints.p_value == pytest.approx(float(stats.hypergeom.sf(inside - 1, 298, planted.sum(), 20)), rel=1e-9)
    assert found.details["datapoints_tested"] == 20
    assert [(one.among, one.value) for one in second.enrichment] == [("members", "art")]


def test_a_cluster_whose_vectors_cancel_has_no_direction(half: SmallStore, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    vectors[1] = vectors[2] = -vectors[0] / 3  # and rounding
    vectors[3] = vectors[1]
    found = prompts(half, tmp_path, vectors, np.repeat([0, 1], 4))
    first, second = found.clusters
    assert (first.direction, first.cosine_median, first.top_datapoints) == (None, None, ())
    assert [one.cosine for one in first.exemplars] == [None] * 4
    assert second.direction == "cluster-1"
    assert not found.directions[0].any()


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[SmallStore]:
    made = make_store(tmp_path / "moved")
    Path(made.data).rename(tmp_path / "there.jsonl")
    yield made


def test_without_the_data_there_are_no_texts(
    moved: SmallStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = describe_pairs(moved, some_clusters(), tmp_path / "out")
    assert "described without texts and metadata: the data cannot be opened where the store recorded it" in caplog.text
    assert found.clusters[0].exemplars[0].texts == {}
    assert found.clusters[0].top_datapoints[0].source in ("web", "code", "chat")
    assert found.clusters[0].enrichment[0].value == "web"  # the store knows the sources
    assert found.details["texts"] is False
    again = describe_pairs(moved, some_clusters(), tmp_path / "out", data=str(tmp_path / "there.jsonl"))
    assert again.clusters[0].exemplars[0].texts["prompt"].startswith("question")


def test_other_data_is_refused(moved: SmallStore, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tmp_path / "there.jsonl").read_text().splitlines()]
    lines[3]["chosen"] = "something else"
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataMismatchError, match="is not the data behind"):
        describe_pairs(moved, some_clusters(), tmp_path, data=str(tmp_path / "other.jsonl"))
    with pytest.raises(DataError, match="there is no file"):
        describe_pairs(moved, some_clusters(), tmp_path, data=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ConfigError, match="the columns kind of the data are asked for"):
        describe_pairs(moved, some_clusters(), tmp_path, metadata=("kind",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exemplars": 0}, "--exemplars is 0"),
        ({"top_datapoints": 0}, "--top-datapoints is 0"),
        ({"false_discovery_rate": 1.0}, "--fdr is 1.0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DescriptionConfig(**changes)


def test_texts_are_plain_and_short() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert plain_text(messages) == "[user] hi\n[assistant] yes"
    assert plain_text(None) == ""
    assert plain_text("x" * TEXT_CHARACTERS) == "x" * TEXT_CHARACTERS
    assert plain_text("x" * 3000) == "x" * (TEXT_CHARACTERS - 1) + "…"


def test_inputs_name_the_store(half: SmallStore) -> None:
    inputs = store_inputs(ActivationStore.open(half.path))
    assert (inputs["store"], inputs["store_rows"], inputs["model_fingerprint"]) == (half.path, 300, "1" * 64)
