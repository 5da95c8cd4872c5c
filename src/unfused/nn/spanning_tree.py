"""The minimum spanning tree of rows, exactly, without the matrix of their distances."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["tree_edges"]

DENSE = 4096  # up to here the condensed distances (64 MB) and scipy's single linkage are quicker
NEIGHBOURS = 16
BLOCK_BYTES = 48 << 20  # of distances at a time


def tree_edges(X: np.ndarray, dense: int = DENSE) -> np.ndarray:
    """Lengths of the edges of the Euclidean minimum spanning tree of rows X (n, d), ascending, (n - 1,) in float64.

    They are the merge heights of single linkage, and the death times of H0 of the Vietoris-Rips filtration. Up to `dense`
    rows by scipy; above, by Boruvka's rounds: each tree is joined to its nearest other one. A row's nearest rows outside
    its tree are remembered, and it is compared with all rows again only where what it does not remember could still be
    nearest. Memory is about `n (d + 30)` numbers and a block.

    Parameters
    ----------
    X : array (n, d)
        Finite; rows that coincide give edges of length 0.
    dense : int, default=4096

    Examples
    --------
    >>> tree_edges(np.array([[0.0], [1], [1], [4]])).tolist()
    [0.0, 1.0, 3.0]
    """
    X = np.ascontiguousarray(X, np.float64)
    if X.ndim != 2 or not np.isfinite(X).all():
        raise ValueError(f"X of shape {X.shape}: give finite rows (n, d)")
    if len(X) < 2:
        return np.zeros(0)
    if len(X) <= dense:
        from scipy.cluster.hierarchy import single
        from scipy.spatial.distance import pdist

        return single(pdist(X))[:, 2]
    return _boruvka(X - X.mean(0))


def _boruvka(X: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(X)
    rows = torch.from_numpy(X)
    squares = (rows * rows).sum(1)
    labels = np.arange(n)
    k = min(NEIGHBOURS, n)
    distances, nearest = np.full((n, k), np.inf), np.zeros((n, k), np.int64)
    known = np.zeros(n)  # nothing outside its tree is nearer to a row than this, but for what it remembers
    step = max(1, BLOCK_BYTES // (8 * n))
    edges: list[np.ndarray] = []
    for start in range(0, n, step):
        some = np.arange(start, min(start + step, n))
        distances[some], nearest[some] = _outside(rows, squares, labels, some)
    known[:] = distances[:, -1]
    count = n
    while count > 1:
        outside = labels[nearest] != labels[:, None]
        outside &= np.isfinite(distances)
        first, has = outside.argmax(1), outside.any(1)
        length = np.where(has, distances[np.arange(n), first], np.inf)
        target = nearest[np.arange(n), first]
        best = np.full(count, np.inf)
        np.minimum.at(best, labels, length)
        # Every tree but the largest finds its shortest edge: enough to go on, and the largest would cost the most.
        largest = np.bincount(labels).argmax()
        open_ = np.flatnonzero(~has & (labels != largest) & (known < best[labels]))
        open_ = open_[np.argsort(known[open_], kind="stable")]
        while len(open_):
            some, open_ = open_[:step], open_[step:]
            distances[some], nearest[some] = _outside(rows, squares, labels, some)
            known[some] = distances[some, -1]
            length[some], target[some] = distances[some, 0], nearest[some, 0]
            np.minimum.at(best, labels[some], length[some])
            open_ = open_[known[open_] < best[labels[open_]]]
        order = np.lexsort((length, labels))
        order = order[np.r_[True, labels[order][1:] != labels[order][:-1]]]  # each tree's shortest edge
        order = order[np.isfinite(length[order]) & (labels[order] != largest)]
        order = order[np.argsort(length[order], kind="stable")]
        kept = _kruskal(labels[order], labels[target[order]], count)
        edges.append(np.stack([order[kept], target[order][kept]], 1))
        joined = coo_array(
            (np.ones(len(edges[-1])), (labels[edges[-1][:, 0]], labels[edges[-1][:, 1]])),
            shape=(count, count),
        )
        count, merged = connected_components(joined, directed=False)
        labels = merged[labels]
    pairs = np.concatenate(edges)
    # Differences, not `a^2 + b^2 - 2ab`: that loses the digits of short edges.
    return np.sort(np.linalg.norm(X[pairs[:, 0]] - X[pairs[:, 1]], axis=1))


def _kruskal(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """Which edges, shortest first, join what was apart: equal lengths could close a circle."""
    parent = np.arange(count)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    kept = np.zeros(len(a), bool)
    for k, (i, j) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        i, j = root(i), root(j)
        if i != j:
            parent[i], kept[k] = j, True
    return kept


def _outside(
    rows: torch.Tensor, squares: torch.Tensor, labels: np.ndarray, some: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest rows of other trees, ascending, and which they are; (len(some), NEIGHBOURS) each."""
    index, trees = torch.from_numpy(some), torch.from_numpy(labels)
    block = torch.addmm(squares, rows[index], rows.T, alpha=-2).add_(squares[index, None])
    block.masked_fill_(trees[index, None] == trees, float("inf"))
    found = block.topk(min(NEIGHBOURS, len(rows)), largest=False)
    return found.values.clamp_min_(0).sqrt_().numpy(), found.indices.numpy()
