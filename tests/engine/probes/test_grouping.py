"""No prompt is on both sides of a split, and it shows when one is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pairtrace.engine.probes import grouping
from pairtrace.engine.probes.grouping import (
    cross_validate,
    folds_of,
    held_out_prompts,
    member_weights,
    require_examples,
)
from pairtrace.errors import ExamplesError

STRENGTHS = (1e-4, 1e-2, 1.0)


def memorable(seed: int = 0, count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts that can be told apart, six examples each of one class, and nothing else that tells the classes apart."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(count), 6)
    labels = rng.permutation(np.arange(count) % 2)[prompts]
    features = rng.normal(size=(count, 60))[prompts] + 0.1 * rng.normal(size=(len(prompts), 60))
    order = rng.permutation(len(prompts))
    return features[order].astype(np.float32), labels[order], prompts[order]


def folds_are_grouped(labels: np.ndarray, prompts: np.ndarray) -> bool:
    judged = []
    for train, judge in folds_of(labels, prompts, 5, 0):
        if set(prompts[train].tolist()) & set(prompts[judge].tolist()):
            return False
        judged += judge.tolist()
    return sorted(judged) == list(range(len(labels)))


def test_folds_never_share_a_prompt() -> None:
    _, labels, prompts = memorable()
    assert folds_are_grouped(labels, prompts)
    mixed = np.arange(len(labels)) % 2
    assert folds_are_grouped(mixed, prompts)


def ungrouped(
    labels: np.ndarray, prompts: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedKFold

    yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)


def test_what_is_only_memory_earns_a_strong_regularisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to learn, so the best loss is that of a coin; folds that share prompts seem to learn a lot."""
    features, labels, prompts = memorable()
    honest = cross_validate(features, labels, prompts, STRENGTHS, 5, 0)
    assert honest.strength < STRENGTHS[-1] and honest.losses[STRENGTHS[-1]] > np.log(2)
    assert min(honest.losses.values()) > 0.66
    monkeypatch.setattr(grouping, "folds_of", ungrouped)
    fooled = cross_validate(features, labels, prompts, STRENGTHS, 5, 0)
    assert fooled.strength == STRENGTHS[-1] and fooled.at_the_edge and min(fooled.losses.values()) < 0.2


def test_the_loss_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels, prompts = memorable(seed=2)
    features[:, 0] += labels
    found = cross_validate(features, labels, prompts, STRENGTHS, 4, 7)
    splits = list(StratifiedGroupKFold(4, shuffle=True, random_state=7).split(features, labels, prompts))
    for strength, loss in found.losses.items():
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=1000))
        total = 0.0
        for train, judge in splits:
            shares = pipeline.fit(features[train].astype(float), labels[train]).predict_proba(
                features[judge].astype(float)
            )
            total += log_loss(labels[judge], shares[:, 1], labels=[0, 1]) * len(judge)
        assert loss == pytest.approx(total / len(labels), rel=1e-3)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": list(STRENGTHS)},
        cv=splits,
        scoring="neg_log_loss",
    ).fit(features.astype(float), labels)
    assert search.best_params_["logisticregression__C"] == found.strength


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_held_out_prompts(share: float) -> None:
    prompts = np.repeat(np.arange(50), 4)
    labels = np.where(prompts < 10, 0, np.where(prompts < 20, 1, np.arange(200) % 2))
    out = held_out_prompts(labels, prompts, share, seed=3)
    chosen = np.unique(prompts[out])
    assert not set(chosen) & set(prompts[~out])
    counts = [int(((chosen >= low) & (chosen < high)).sum()) for low, high in ((0, 10), (10, 20), (20, 50))]
    assert counts == [10 * share, 10 * share, 30 * share]
    assert not np.array_equal(out, held_out_prompts(labels, prompts, share, seed=4))
    np.testing.assert_array_equal(out, held_out_prompts(labels, prompts, share, seed=3))


def test_members_draw_whole_prompts() -> None:
    prompts = np.repeat(np.arange(50), 4)
    labels = np.where(prompts < 10, 0, np.where(prompts < 20, 1, np.arange(200) % 2))
    bootstrap = member_weights(labels, prompts, "bootstrap", 1)
    seeds = member_weights(labels, prompts, "seeds", 1)
    for weights in (bootstrap, seeds):
        assert all(len(set(weights[prompts == one])) == 1 for one in range(50))
        assert not np.array_equal(weights, member_weights(labels, prompts, "bootstrap", 2))
    assert bootstrap.sum() == 200 and bootstrap.max() > 1
    assert seeds.sum() == 160 and set(seeds) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("labels", "needed", "message"),
    [
        ([1, 1, 1, 1], 1, "expected examples of the classes 0 and 1, found 4 examples of the class 1 alone"),
        ([0, 0, 0, 0], 1, "found 4 examples of the class 0 alone"),
        ([], 1, "found no example"),
        (
            [1, 0, 0, 0],
            2,
            "at least 2 prompts with an example of the class 0, and as many of the class 1, found 3 and 1",
        ),
    ],
)
def test_too_few_examples(labels: list[int], needed: int, message: str) -> None:
    with pytest.raises(ExamplesError, match=message):
        require_examples(np.array(labels), np.arange(len(labels)), needed, "store")
    require_examples(np.array([0, 1]), np.array([0, 0]), 1, "store")
