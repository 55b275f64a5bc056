"""The solver against scikit-learn's own pipeline and against Newton's method; the folding of the standardisation."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from pairtrace.engine.probes import solver
from pairtrace.engine.probes.solver import Fitted, Moments, Standardisation, fit, folded
from pairtrace.errors import MissingDependencyError, ProbeError


def examples(seed: int = 0, count: int = 240, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Columns of very different scale and far from zero, as in a residual stream with outlier dimensions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    columns = rng.normal(size=(count, width)) + 0.8 * labels[:, None] * (np.arange(width) < 3)
    scale, offset = 10.0 ** rng.uniform(-2, 2, width), rng.normal(size=width) * 50
    return (columns * scale + offset).astype(np.float32), labels


def plain_standardisation(features: np.ndarray) -> Standardisation:
    wide = features.astype(np.float64)
    return Standardisation(mean=wide.mean(axis=0), scale=wide.std(axis=0))


def newton(features: np.ndarray, labels: np.ndarray, strength: float, weights: np.ndarray) -> np.ndarray:
    """Coefficients of the standardised columns and intercept, float64 [D + 1], from the definition."""
    wide = features.astype(np.float64)
    design = np.hstack([(wide - wide.mean(axis=0)) / wide.std(axis=0), np.ones((len(wide), 1))])
    penalty = np.diag([1.0] * wide.shape[1] + [0.0])
    solution = np.zeros(design.shape[1])
    for _ in range(100):
        shares = 1 / (1 + np.exp(-design @ solution))
        gradient = penalty @ solution + strength * design.T @ (weights * (shares - labels))
        curvature = penalty + strength * (design.T * (weights * shares * (1 - shares))) @ design
        solution -= np.linalg.solve(curvature, gradient)
    assert np.abs(gradient).max() < 1e-9
    return solution


def close(found: Fitted, features: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> bool:
    given = plain_standardisation(features)
    back = np.append(found.weight * given.scale, found.bias + found.weight.astype(np.float64) @ given.mean)
    return bool(np.abs(back - expected).max() <= tolerance * np.abs(expected).max())


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_equals_scikit_learn_and_newton(strength: float) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = examples()
    found = fit(features, labels, strength, plain_standardisation(features))
    regression = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), regression).fit(features.astype(np.float64), labels)
    theirs = np.append(regression.coef_[0], regression.intercept_[0])
    assert close(found, features, theirs)
    assert close(found, features, newton(features, labels, strength, np.ones(len(labels))))
    logits = features.astype(np.float64) @ found.weight.astype(np.float64) + found.bias
    np.testing.assert_allclose(logits, pipeline.decision_function(features.astype(np.float64)), rtol=1e-4, atol=1e-4)


def test_weights_count_examples() -> None:
    features, labels = examples()
    weights = np.random.default_rng(1).integers(0, 4, len(labels)).astype(np.float64)
    found = fit(features, labels, 0.3, plain_standardisation(features), weights)
    assert close(found, features, newton(features, labels, 0.3, weights))
    assert not close(found, features, newton(features, labels, 0.3, np.ones(len(labels))))


@pytest.mark.parametrize("mutation", ["unstandardised", "strength", "rough"])
def test_the_comparison_catches_another_problem(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    real = solver._solve
    features, labels = examples(width=200, count=210)
    expected = newton(features, labels, 1e2, np.ones(len(labels)))
    assert close(fit(features, labels, 1e2, plain_standardisation(features)), features, expected)

    def other(columns, labels, strength, weights, tolerance):  # type: ignore[no-untyped-def]
        if mutation == "unstandardised":
            columns = columns * np.linspace(0.5, 2, columns.shape[1])
        return real(
            columns,
            labels,
            strength * (2 if mutation == "strength" else 1),
            weights,
            1e-4 if mutation == "rough" else tolerance,
        )

    monkeypatch.setattr(solver, "_solve", other)
    assert not close(fit(features, labels, 1e2, plain_standardisation(features)), features, expected)


def folding_is_exact(found: Fitted, features: np.ndarray, expected: np.ndarray) -> bool:
    logits = features.astype(np.float64) @ found.weight.astype(np.float64) + found.bias
    return bool(np.abs(logits - expected).max() < 2e-6 * np.abs(expected).max())


def test_folding_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw activations times the folded weight give the logits of the standardised ones, far from zero as well."""
    features, _ = examples(seed=3)
    rng = np.random.default_rng(4)
    given = plain_standardisation(features)
    # A mean of 5000 deviations: a bias that ignores the rounding of the weight is off by far more than the tolerance.
    features = (features + 5000 * given.scale).astype(np.float32)
    given = plain_standardisation(features)
    coefficients, intercept = rng.normal(size=12), 0.7
    expected = ((features.astype(np.float64) - given.mean) / given.scale) @ coefficients + intercept
    assert folding_is_exact(folded(coefficients, intercept, given), features, expected)
    exact = coefficients / given.scale
    for bias in (intercept - exact @ given.mean, intercept):
        wrong = Fitted(weight=exact.astype(np.float32), bias=float(bias))
        assert not folding_is_exact(wrong, features, expected)
    assert not folding_is_exact(Fitted(weight=coefficients.astype(np.float32), bias=intercept), features, expected)


def test_moments_of_blocks_are_those_of_the_whole() -> None:
    features, _ = examples(seed=5, count=1000)
    features[:, 3] = 7.25  # constant
    weights = np.random.default_rng(6).integers(0, 3, 1000)
    for given, rows in ((None, features), (weights, np.repeat(features, weights, axis=0))):
        moments = Moments(12)
        for start in (*range(0, 1000, 130),):
            span = slice(start, start + 130)
            moments.add(features[span], None if given is None else given[span])
        found, wide = moments.standardisation(), rows.astype(np.float64)
        assert moments.total == len(wide)
        np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-12)
        expected = wide.std(axis=0)
        assert expected[3] == 0 and found.scale[3] == 1
        np.testing.assert_allclose(np.delete(found.scale, 3), np.delete(expected, 3), rtol=1e-9)


def test_no_solution_and_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = examples()
    monkeypatch.setattr(solver, "_MOST_ITERATIONS", 2)
    with pytest.raises(ProbeError, match="did not converge at C = 1000"), pytest.warns(match="failed to converge"):
        fit(features, labels, 1e3, plain_standardisation(features))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependencyError, match=r"pairtrace\[probe\]"):
        solver.require_solver()
