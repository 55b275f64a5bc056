"""What is clustered of a bag of prompts: rows of its cosine matrix, the length of the change, and mirror images.

Letters: P items, r reduced width, C clusters.

- **Rows of unit length.** Prompts that lean on the same pairs have rows that point alike.
- **The length of the change.** A cosine forgets how much an answer changed: a refusal in other words points as firmly
  as a refusal that became compliance, but its vector is several times shorter. So a row u gets one more coordinate,
  as if s, the length of a typical pair's difference, stood at a right angle to the change v:
  `(|v| u, s) / sqrt(|v|^2 + s^2)`. Small changes come to lie together whatever their direction, large ones apart.
- **Mirror images.** Were the two models exchanged, every vector would change its sign: chance would produce `-v` as
  often as `v`. So every point is clustered together with its image. There is always something to stand out from then,
  even where all prompts changed alike (a density hierarchy finds no cluster in a single group); and the mean of all is
  zero, so that nothing has to be centred, which would hide a behaviour that most of the prompts show. A cluster in
  which most of the items meet their own images has no direction: it is noise.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np

from pairtrace.engine.discovery.clustering import ClusterConfig, Clustering, cluster
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import DataError, MissingDependencyError


def default_size(items: int) -> int:
    """min_cluster_size for P items: 8 up to 128, 17 for 500, 75 for 10,000.

    The square root lies between a fixed share, which loses rare behaviours in large bags, and a fixed number, which
    calls every coincidence in them a cluster.
    """
    return max(8, round(0.75 * sqrt(items)))


def reduced_rows(gram: np.ndarray, dimensions: int) -> np.ndarray:
    """The rows of a matrix in its leading axes, from their Gram matrix: exact, without the matrix.

    Args:
        gram: float64 [P, P] of rows that are first made unit length.
        dimensions: r, at most P.

    Returns:
        float64 [P, r], made unit length again; NaN for a row that is zero.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    try:
        from scipy.linalg import eigh
    except ImportError as error:
        raise MissingDependencyError("scipy", "discover", "the reduction of a cosine matrix") from error

    lengths = np.sqrt(np.diagonal(gram))
    rows = np.flatnonzero(lengths > 0)
    reduced = np.full((len(gram), dimensions), np.nan)
    if not rows.size:
        return reduced
    cosines = gram[np.ix_(rows, rows)] / np.outer(lengths[rows], lengths[rows])
    kept = min(dimensions, len(rows))
    values, vectors = eigh(cosines, subset_by_index=[len(rows) - kept, len(rows) - 1])
    # The sign of an axis is left open by algebra.
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)])
    axes = np.zeros((len(rows), dimensions))
    axes[:, :kept] = (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1]
    norms = np.linalg.norm(axes, axis=1, keepdims=True)
    reduced[rows] = np.divide(axes, norms, out=np.full_like(axes, np.nan), where=norms > 0)
    return reduced


def points_with_length(rows: np.ndarray, lengths: np.ndarray, scale: float) -> np.ndarray:
    """Join unit rows with the length of the change.

    Args:
        rows: float64 [P, r] of unit length.
        lengths: float [P], lengths |v| of the behaviour-change vectors.
        scale: s, the length at which direction and length count alike; above 0.

    Returns:
        float32 [P, r + 1], of unit length; the last coordinate is `s / sqrt(|v|^2 + s^2)`.
    """
    whole = np.hypot(lengths, scale)
    points = np.column_stack([rows * (lengths / whole)[:, None], scale / whole])
    return points.astype(np.float32)


def cluster_with_images(points: np.ndarray, config: ClusterConfig, progress: Progress = NULL_PROGRESS) -> Clustering:
    """Cluster points together with their mirror images, and keep what it says of the points.

    Args:
        points: float32 [P, r + 1] as `points_with_length` makes them; rows with NaN are noise.
        config: how.
        progress: receives the stages.

    Returns:
        Of the P points. `details` also says how many of them lie in clusters without direction ("undirected").

    Raises:
        DataError: fewer points than `min_cluster_size`.
        ConfigError, MissingDependencyError: as for `cluster`.
    """
    count = len(points)
    if count < config.min_cluster_size:
        raise DataError(
            f"{count} prompts changed, but a cluster needs min_cluster_size = {config.min_cluster_size}; give more "
            "prompts or a lower --min-cluster-size"
        )
    images = points.copy()
    images[:, :-1] *= -1
    both = cluster(np.concatenate([points, images]), config, progress)
    own, image = both.labels[:count], both.labels[count:]
    numbers = np.arange(len(both.persistence))
    sizes = np.bincount(own[own >= 0], minlength=len(numbers))
    met = np.bincount(own[(own >= 0) & (own == image)], minlength=len(numbers))
    undirected = 2 * met > sizes
    kept = numbers[(sizes >= config.min_cluster_size) & ~undirected]
    first = np.array([np.flatnonzero(own == number)[0] for number in kept], np.int64)
    order = kept[np.lexsort((first, -sizes[kept]))]
    places = np.full(len(numbers) + 1, -1, np.int32)  # the last one answers for -1
    places[order] = np.arange(len(order))
    labels = places[own]
    return replace(
        both,
        labels=labels,
        probabilities=np.where(labels >= 0, both.probabilities[:count], np.float32(0)),
        persistence=both.persistence[order],
        details={**both.details, "images": True, "undirected": int(sizes[undirected].sum())},
    )
