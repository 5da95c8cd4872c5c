"""Mean silhouettes of many clusterings of the same points, by one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["silhouettes"]


def silhouettes(distances: np.ndarray, clusterings: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over points of (b - a) / max(a, b).

    a is a point's mean distance to the others of its cluster, b that to the nearest other cluster. A point alone in its
    cluster counts 0, as in scikit-learn; so does everything where there is one cluster.

    Parameters
    ----------
    distances : array of shape (n, n)
        Symmetric, zero diagonal.
    clusterings : sequence of int arrays of shape (n,)
        Clusters from 0 on.

    Returns
    -------
    ndarray of shape (len(clusterings),)

    Examples
    --------
    >>> x = np.array([0.0, 1, 10, 11])
    >>> silhouettes(np.abs(x[:, None] - x), [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])]).round(2)
    array([ 0.9 , -0.45])
    """
    points = np.arange(len(distances))
    ends = np.cumsum([int(labels.max()) + 1 for labels in clusterings])
    members = np.zeros((len(points), ends[-1]), dtype=distances.dtype)
    for labels, end in zip(clusterings, ends, strict=True):
        members[points, end - 1 - labels] = 1
    sums = distances @ members  # (n, clusters of all clusterings)
    counts, scores = members.sum(0), np.zeros(len(clusterings))
    for i, (labels, end) in enumerate(zip(clusterings, ends, strict=True)):
        own, start = end - 1 - labels, end - 1 - labels.max()
        count = counts[own]
        a = sums[points, own] / np.maximum(count - 1, 1)
        means = sums[:, start:end] / np.maximum(counts[start:end], 1)
        means[:, counts[start:end] == 0] = np.inf
        means[points, own - start] = np.inf
        b = means.min(1)
        counted = (count > 1) & np.isfinite(b) & (np.maximum(a, b) > 0)
        scores[i] = ((b - a)[counted] / np.maximum(a, b)[counted]).sum() / len(points)
    return scores
