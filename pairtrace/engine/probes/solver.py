"""L2 logistic regression on standardised activations, by scikit-learn's solver.

The minimised function is scikit-learn's: `|w|^2 / 2 + C * sum_i s_i log(1 + exp(-y_i (w @ z_i + b)))` with
z = (x - mean) / scale, y in {-1, 1}, weights s_i of the examples, and an intercept b without penalty.

The standardisation is folded into what comes out: `w @ z + b = (w / scale) @ x + (b - (w / scale) @ mean)`.
Legend: n examples, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pairtrace.errors import MissingDependencyError, ProbeError

# On the gradient; the default of scikit-learn, 1e-4, leaves errors of 1e-3, and larger ones in separable classes.
EXACT, ROUGH = 1e-10, 1e-5
_MOST_ITERATIONS = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardisation:
    """Mean and standard deviation of each column.

    Attributes:
        mean: float64 [D].
        scale: float64 [D], above 0; 1 for a column that does not vary, as in scikit-learn.
    """

    mean: np.ndarray
    scale: np.ndarray


class Moments:
    """Weighted mean and variance of rows that come in blocks, in one pass and without cancellation.

    Blocks are merged by the formulas of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for
    computing sample variances", 1979), in float64.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        self._total = 0.0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)  # sum of squared deviations

    def add(self, rows: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Take in float [n, D], with weights float [n] of at least 0 (1 each when None)."""
        wide = rows.astype(np.float64)
        given = np.ones(len(wide)) if weights is None else weights.astype(np.float64)
        total = float(given.sum())
        if total == 0:
            return
        mean = given @ wide / total
        deviations = wide - mean
        np.multiply(deviations, deviations, out=deviations)
        gap = mean - self._mean
        both = self._total + total
        self._squares += given @ deviations + gap * gap * (self._total * total / both)
        self._mean += gap * (total / both)
        self._total = both

    @property
    def total(self) -> float:
        """Sum of the weights so far."""
        return self._total

    @property
    def mean(self) -> np.ndarray:
        """float64 [D]."""
        return self._mean

    def standardisation(self) -> Standardisation:
        """Of all rows so far, at least one; the variance is that of the population, as in scikit-learn."""
        assert self._total > 0
        variance = self._squares / self._total
        # Rounding leaves a variance above zero in columns that are constant: up to n eps var + (n mean eps)^2, the
        # bound that scikit-learn's StandardScaler uses.
        rounding = np.finfo(np.float64).eps * self._total
        constant = variance <= rounding * variance + (self._mean * rounding) ** 2
        return Standardisation(mean=self._mean.copy(), scale=np.where(constant, 1.0, np.sqrt(variance)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A logistic regression, the standardisation folded in.

    Attributes:
        weight: float32 [D]: the logit of raw activations x is `weight @ x + bias`.
        bias: float64, for the weight as it was rounded: at the mean of the examples the logit is exact.
    """

    weight: np.ndarray
    bias: float


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    strength: float,
    standardisation: Standardisation,
    weights: np.ndarray | None = None,
    *,
    tolerance: float = EXACT,
) -> Fitted:
    """Fit a logistic regression.

    Args:
        features: float [n, D], finite.
        labels: [n], 0 or 1, both of them there.
        strength: C, the inverse of the regularisation.
        standardisation: of the columns.
        weights: float [n], at least 0: how often an example counts; 1 each when None.
        tolerance: of the solver; `ROUGH` is enough to compare strengths.

    Raises:
        ProbeError: the solver does not converge.
        MissingDependencyError: scikit-learn is not installed.
    """
    coefficients, intercept = _solve(standardised(features, standardisation), labels, strength, weights, tolerance)
    return folded(coefficients, intercept, standardisation)


def standardised(features: np.ndarray, standardisation: Standardisation) -> np.ndarray:
    """float64 [n, D]: (x - mean) / scale."""
    result = features.astype(np.float64)
    result -= standardisation.mean
    result /= standardisation.scale
    return result


def folded(coefficients: np.ndarray, intercept: float, standardisation: Standardisation) -> Fitted:
    """Coefficients of standardised columns, float64 [D], as those of the columns themselves.

    The weight is rounded to float32 first and the bias is made to fit it: what rounding moves at the mean of the
    examples, which may be far from zero, is taken back.
    """
    weight = (coefficients / standardisation.scale).astype(np.float32)
    return Fitted(weight=weight, bias=float(intercept - weight.astype(np.float64) @ standardisation.mean))


def _solve(
    columns: np.ndarray, labels: np.ndarray, strength: float, weights: np.ndarray | None, tolerance: float
) -> tuple[np.ndarray, float]:
    """Coefficients, float64 [D], and intercept for standardised columns, float64 [n, D]."""
    regression = _regression()(C=strength, solver="lbfgs", tol=tolerance, max_iter=_MOST_ITERATIONS)
    regression.fit(columns, labels, sample_weight=weights)
    iterations = int(regression.n_iter_[0])
    if iterations >= _MOST_ITERATIONS:
        raise ProbeError(
            f"the logistic regression did not converge at C = {strength:g}; leave this value out of --strengths",
            f"fewer than {_MOST_ITERATIONS} iterations",
            iterations,
        )
    return regression.coef_[0], float(regression.intercept_[0])


def require_solver() -> None:
    """Find out before long work whether the solver is installed.

    Raises:
        MissingDependencyError: it is not.
    """
    _regression()


def _regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "probe", "training a probe") from error
    return LogisticRegression
