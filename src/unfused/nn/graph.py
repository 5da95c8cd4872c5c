"""Nearest-neighbour graphs of feature arrays, and spreading values over them."""

from __future__ import annotations

from typing import Any

import numpy as np

from unfused.nn.kmeans import nearest

__all__ = ["cosine_graph", "spread"]


def cosine_graph(x: np.ndarray, neighbors: int, power: float = 1.0) -> Any:
    """The symmetric graph of each item's nearest neighbours, weighted by cosine similarity and normalised.

    Parameters
    ----------
    x : float32 array of shape (N, dim)
    neighbors : int
        An edge joins two items if either is among the `neighbors` most similar of the other. Negative
        similarities weigh nothing.
    power : float, default=1
        Of the similarities: the higher, the more the closest neighbours count.

    Returns
    -------
    scipy.sparse.csr_array of shape (N, N)
        `D^-1/2 W D^-1/2`; rows of isolated items are empty.

    Examples
    --------
    >>> cosine_graph(np.float32([[1, 0], [2, 0], [0, 1]]), neighbors=1).toarray().round(3).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    import scipy.sparse as sp

    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    distances, ids = nearest(x, x, min(neighbors + 1, len(x)))
    rows = np.arange(len(x))[:, None]
    length = (x.astype(np.float64) ** 2).sum(1)  # 1, or 0 for a row of zeros
    cosine = (length[:, None] + length[ids] - distances) / 2
    similarity = (
        np.where(cosine > 1e-6, cosine, 0) ** power
    )  # less is rounding, which normalising would amplify
    similarity[ids == rows] = 0  # no item is its own neighbour
    # Among many copies of an item the item itself may be missing: the farthest is then one too many.
    similarity[(ids != rows).all(1), -1] = 0
    edges = (similarity.ravel(), (np.repeat(rows, ids.shape[1]), ids.ravel()))
    graph = sp.csr_array(edges, shape=(len(x), len(x)))
    graph = graph.maximum(graph.T)
    graph.eliminate_zeros()
    degree = graph.sum(1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    return graph.multiply(scale[:, None]).multiply(scale).tocsr()


def spread(graph: Any, values: np.ndarray, alpha: float) -> np.ndarray:
    """`(1 - alpha) (I - alpha graph)^-1 values` by conjugate gradients, all columns at once.

    Parameters
    ----------
    graph : sparse array of shape (N, N)
        Symmetric, with eigenvalues in [-1, 1]: a normalised graph.
    values : array of shape (N, columns)
    alpha : float
        In [0, 1): how far values spread.

    Returns
    -------
    float64 array of shape (N, columns)

    Examples
    --------
    >>> graph = cosine_graph(np.float32([[1, 0], [2, 0], [0, 1]]), neighbors=1)
    >>> spread(graph, np.float64([[1], [0], [1]]), alpha=0.5).ravel().round(3).tolist()
    [0.667, 0.333, 0.5]
    """
    residual = np.asarray(values, np.float64)
    solution, direction, norm = np.zeros_like(residual), residual, (residual**2).sum(0)
    enough = 1e-20 * norm
    for _ in range(1000):  # about 12 sqrt((1 + alpha) / (1 - alpha)) are needed
        active = norm > enough  # the other columns are solved and stay as they are
        if not active.any():
            break
        product = direction - alpha * (graph @ direction)
        step = np.divide(norm, (direction * product).sum(0), out=np.zeros_like(norm), where=active)
        solution = solution + step * direction
        residual = residual - step * product
        before, norm = norm, (residual**2).sum(0)
        direction = residual + np.divide(norm, before, out=np.zeros_like(norm), where=active) * direction
    return (1 - alpha) * solution
