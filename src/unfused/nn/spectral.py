"""Spectral graphs of rows: a bandwidth from the spanning tree, the leading eigenvectors of a similarity."""

from __future__ import annotations

import numpy as np

__all__ = ["longest_tree_edge", "top_eigenvectors"]


def longest_tree_edge(X: np.ndarray) -> float:
    """Length of the longest edge of the minimum spanning tree of rows X (n, d), n >= 2.

    Examples
    --------
    >>> longest_tree_edge(np.array([[0.0], [1], [1], [4]]))
    3.0
    """
    from scipy.cluster.hierarchy import single
    from scipy.spatial.distance import pdist

    return float(
        single(pdist(X))[-1, 2]
    )  # single linkage merges along the tree; rows that coincide are no trouble


def top_eigenvectors(matrix: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues of a symmetric matrix, descending, and their eigenvectors in columns.

    The largest entry of each is positive. Large matrices are iterated on, from a start drawn by `seed`.

    Examples
    --------
    >>> values, vectors = top_eigenvectors(np.diag([1.0, 3, 2]), 2, seed=0)
    >>> values.round(6).tolist(), np.abs(vectors).round(6).tolist()
    ([3.0, 2.0], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    n, found = len(matrix), None
    if n > 500 and count < n // 10:
        try:
            found = eigsh(matrix, k=count, which="LA", v0=np.random.RandomState(seed).standard_normal(n))
        except ArpackNoConvergence:
            pass
    values, vectors = found or eigh(matrix, subset_by_index=[n - count, n - 1])
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    return values, vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
