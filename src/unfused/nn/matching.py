"""Clusters against classes: the one-to-one matching that makes the most points right (Hungarian algorithm).

For scoring only: which cluster stands for which class is read off the labels of the points that are scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["clustering_accuracy", "match_clusters"]


def match_clusters(
    labels: Any, clusters: Any, n_classes: int | None = None, n_clusters: int | None = None
) -> np.ndarray:
    """The class of each cluster, no class twice.

    Parameters
    ----------
    labels, clusters : array of int, shape (n,)
        From 0 on.
    n_classes, n_clusters : int, optional
        Where some may be without a point. By default the largest number seen, plus 1.

    Returns
    -------
    ndarray of int, shape (n_clusters,)
        -1 for a cluster that is left over, where there are more clusters than classes.

    Examples
    --------
    >>> match_clusters([0, 0, 1, 1, 1], [2, 2, 0, 0, 1]).tolist()
    [1, -1, 0]
    """
    from scipy.optimize import linear_sum_assignment

    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.shape != clusters.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"clusters has the shape {clusters.shape}, labels {labels.shape}: give one of each for every point"
        )
    classes, groups = n_classes or int(labels.max()) + 1, n_clusters or int(clusters.max()) + 1
    counts = np.bincount(clusters * classes + labels, minlength=groups * classes).reshape(groups, classes)
    of_cluster = np.full(groups, -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    of_cluster[rows] = columns
    return of_cluster


def clustering_accuracy(labels: Any, clusters: Any) -> float:
    """The share of points whose cluster is matched to their class.

    Parameters
    ----------
    labels, clusters : array of shape (n,)
        Of any kind that can be sorted.

    Examples
    --------
    >>> clustering_accuracy(["a", "a", "b", "b", "b"], [2, 2, 0, 0, 1])
    0.8
    """
    labels, clusters = (
        np.unique(np.asarray(values), return_inverse=True)[1] for values in (labels, clusters)
    )
    return float((match_clusters(labels, clusters)[clusters] == labels).mean())
