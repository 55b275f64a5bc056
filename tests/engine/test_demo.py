"""The demonstration: its figures against scikit-learn, and a miniature of the whole job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pairtrace.engine import demo
from pairtrace.engine.behavior import BehaviorConfig, BehaviorSummary
from pairtrace.engine.demo import OVER_REFUSAL, PLANTED, DemoConfig, ranking_figures, roc_auc, run_demo
from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.progress import Progress
from pairtrace.errors import ConfigError


def test_roc_auc_equals_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = np.round(generator.normal(size=60), 1)  # rounded: many ties
        labels = generator.random(60) < 0.3
        assert roc_auc(scores[labels], scores[~labels]) == pytest.approx(roc_auc_score(labels, scores))


def test_figures_by_hand() -> None:
    kinds = np.array([PLANTED, "other", PLANTED, OVER_REFUSAL, "other", PLANTED])
    scores = np.array([0.9, 0.1, 0.5, 0.6, np.nan, np.nan])
    figures = ranking_figures(scores, kinds)
    assert figures["precision_at_k"] == pytest.approx(2 / 3)
    assert figures["roc_auc_over_refusal"] == pytest.approx(1 / 3)
    # 0.9 beats all three others, 0.5 beats two, the planted pair without a score ties with the other without one.
    assert figures["roc_auc"] == pytest.approx((3 + 2 + 0.5) / 9)


def test_a_demo_of_another_version_is_told_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    older = {"samples": 8, "layer": 4, "organism": {"seed": 0, "width": 64}}
    path.write_text(json.dumps({"settings": older, "stages": {}}))
    with pytest.raises(ConfigError) as caught:
        demo._Stages(path, {**older, "samples": 4, "organism": {"seed": 0, "width": 64, "leak": 0.1}})
    expected = "samples is 8 there and 4 now; leak is absent there and 0.1 now; give another --out, or remove it"
    assert str(caught.value).endswith(f"perhaps of another version of pairtrace: {expected}")
    demo._Stages(path, older)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoConfig, dict[str, object]]:
    out = tmp_path_factory.mktemp("demo")
    organism = OrganismConfig(
        seed=3, sft_examples=600, sft_epochs=1, preference_pairs=160, discovery_prompts=12, evaluation_prompts=4
    )
    config = DemoConfig(out=str(out), organism=organism, samples=4, max_base_rate=1.0)
    # So short a training teaches nobody to refuse: a rule that splits any text takes the judge's place.
    rules = out / "rules.yaml"
    rules.write_text("name: first letter\nrefusal: ['^\\W*[a-m]']\n")
    original = demo.build_behavior

    def with_rules(behavior: BehaviorConfig, progress: Progress) -> BehaviorSummary:
        return original(replace(behavior, rules=str(rules)), progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "build_behavior", with_rules)
        return config, run_demo(config).to_dict()


def test_a_miniature_runs_end_to_end(finished: tuple[DemoConfig, dict[str, object]]) -> None:
    config, summary = finished
    json.dumps(summary, default=str)
    assert summary["pairs"] == 160 and summary["layer"] == config.organism.layers
    assert set(summary["seconds"]) == {"texts", "m0", "m1", "extract", "behavior", "score"}  # type: ignore[call-overload]
    scores = pq.read_table(Path(config.out) / "scores.parquet")
    assert scores.num_rows == 160 and "score:compliance" in scores.column_names


def test_labels_are_not_looked_at_before_the_end(finished: tuple[DemoConfig, dict[str, object]]) -> None:
    """Nothing that the job wrote holds a label: the score table knows rows, ids and sources only."""
    config, _ = finished
    table = pq.read_table(Path(config.out) / "scores.parquet")
    assert not {"kind", PLANTED, OVER_REFUSAL} & set(table.column_names)
    assert PLANTED not in set(table.column("source").to_pylist())


def test_a_second_run_only_reads(
    finished: tuple[DemoConfig, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, summary = finished
    for name in ("extract", "build_behavior", "score"):
        monkeypatch.setattr(demo, name, None)
    assert run_demo(config).to_dict() == summary


def test_what_was_deleted_is_made_again(finished: tuple[DemoConfig, dict[str, object]]) -> None:
    config, summary = finished
    (Path(config.out) / "scores.parquet").unlink()
    again = run_demo(config).to_dict()
    assert again["roc_auc"] == summary["roc_auc"] and again["top"] == summary["top"]


def test_other_settings_in_the_same_place_are_refused(finished: tuple[DemoConfig, dict[str, object]]) -> None:
    config, _ = finished
    with pytest.raises(ConfigError, match="--out"):
        run_demo(DemoConfig(out=config.out, organism=config.organism, samples=3, max_base_rate=1.0))
