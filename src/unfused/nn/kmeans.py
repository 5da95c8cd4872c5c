"""Feature arrays: standardisation within groups, exact PCA whitening, k-means (faiss computes the distances).

Everything is a function of its arguments and the seed; the number of threads changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_features", "group_numbers", "kmeans", "nearest", "standardize_groups", "whiten"]

Array = np.ndarray
SMALL_GROUP = 10
START, SAMPLE = (
    (4096, 16),
    (16384, 64),
)  # items, and items per cluster, that k-means is seeded and warmed up on
TOLERANCE = 5e-4  # relative fall of the inertia per iteration below which k-means has converged


def as_features(features: Any, name: str = "features") -> Array:
    """`features` as a finite float32 array of shape (items, dim), C-contiguous.

    Raises
    ------
    ValueError
        If it is not two-dimensional, empty, or holds NaN or infinity.
    """
    x = np.ascontiguousarray(features, dtype=np.float32)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must have the shape (items, dim), got {x.shape}")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(1).sum())
        raise ValueError(f"{name} holds NaN or infinity in {bad} of {len(x)} rows")
    return x


def standardize_groups(features: Any, groups: Any = None) -> Array:
    """Zero mean and unit deviation of every dimension within each group: what marks the group is gone.

    Parameters
    ----------
    features : array of shape (items, dim)
    groups : sequence of length items, optional
        Speaker, site or device of each item; None where it is unknown. Those items, and the items of groups
        of fewer than 10, are standardised together: statistics of so few would erase what sets them apart.
        By default all items are one group.

    Returns
    -------
    float32 array of shape (items, dim)
        A dimension that is constant within a group is 0 there.

    Examples
    --------
    >>> x = np.arange(40.0).reshape(20, 2)
    >>> y = standardize_groups(x, ["a"] * 10 + ["b"] * 10)
    >>> bool(np.allclose(y[:10], y[10:], atol=1e-6)), float(abs(y[:10].mean()).round(6))
    (True, 0.0)
    """
    import scipy.sparse as sp

    x = as_features(features)
    number = group_numbers(groups, len(x))
    number = np.where(np.bincount(number)[number] >= SMALL_GROUP, number, 0)
    counts = np.bincount(number)
    members = sp.csr_matrix((1 / counts[number], (number, np.arange(len(x)))))  # (groups, items), averages
    centred = x - (members @ x.astype(np.float64))[number]
    deviation = np.sqrt(members @ centred**2)
    # Rounding leaves a tiny deviation where a dimension is constant.
    scale = np.where(deviation > 1e-6 * np.abs(x).max(0), deviation, np.inf)
    return (centred / scale[number]).astype(np.float32)


def group_numbers(groups: Any, items: int) -> Array:
    """Groups as numbers from 1 on, 0 for None (without `groups`: for all); shape (items,)."""
    if groups is None:
        return np.zeros(items, np.int64)
    names = list(groups.tolist() if hasattr(groups, "tolist") else groups)
    if len(names) != items:
        raise ValueError(f"groups has {len(names)} entries for {items} items")
    order = {name: number for number, name in enumerate(sorted({str(n) for n in names if n is not None}), 1)}
    return np.array([0 if name is None else order[str(name)] for name in names])


def whiten(features: Any, dims: int, power: float = -0.5) -> Array:
    """Exact PCA to `dims` dimensions, each component multiplied by its variance to the `power`.

    Parameters
    ----------
    features : array of shape (items, dim)
    dims : int
        Components kept; fewer where there are fewer (variances under 1e-6 of the largest are rounding).
    power : float, default=-0.5
        -0.5 whitens (unit variances), 0 only rotates.

    Returns
    -------
    float32 array of shape (items, components)

    Raises
    ------
    ValueError
        If all items are the same.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(500, 3)) * [1, 10, 100]
    >>> np.abs(np.cov(whiten(x, 2).T)).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    from scipy.linalg import eigh

    x = as_features(features)
    items, dim = x.shape
    mean = x.mean(0, dtype=np.float64)
    if wide := items < dim:  # the Gram matrix has the covariance's eigenvalues, and is smaller
        centred = x - mean
        matrix = centred @ centred.T
    else:
        matrix = np.zeros((dim, dim))
        for start in range(0, items, 4096):  # double precision, but never of the whole array
            centred = x[start : start + 4096] - mean
            matrix += centred.T @ centred
    side = len(matrix)
    variances, vectors = eigh(matrix / max(items - 1, 1), subset_by_index=[max(side - dims, 0), side - 1])
    kept = np.flatnonzero(variances > max(1e-6 * variances[-1], np.finfo(np.float64).tiny))[::-1]
    if not len(kept):
        raise ValueError(f"the features of all {items} items are the same: nothing tells them apart")
    variances, vectors = variances[kept], vectors[:, kept]
    if wide:
        return (vectors * (np.sqrt(items - 1) * variances ** (power + 0.5))).astype(np.float32)
    return (x - mean.astype(np.float32)) @ (vectors * variances**power).astype(np.float32)


def nearest(x: Array, centroids: Array, k: int = 1) -> tuple[Array, Array]:
    """Squared distances to and ids of the `k` nearest centroids, nearest first: two arrays (items, k)."""
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    distances, ids = index.search(x, k)
    return np.maximum(distances, 0), ids


def kmeans(
    features: Any, k: int, iterations: int = 20, seed: int = 0, balanced: bool = False
) -> tuple[Array, Array, Array]:
    """k-means with a greedy k-means++ start; clusters that lose their members are re-seeded from the largest.

    With more than 16,384 items (or 64 per cluster), the start is found and improved on a sample of so many.
    The iterations then run over all items, until one lowers the inertia by less than 0.05 %.

    Parameters
    ----------
    features : array of shape (items, dim)
    k : int
    iterations : int, default=20
        At most.
    seed : int, default=0
    balanced : bool, default=False
        Clusters of about equal size: items are assigned by entropic optimal transport (Sinkhorn), as in SwAV.

    Returns
    -------
    centroids : float32 array of shape (k, dim)
    ids : int64 array of shape (items,)
        The nearest centroid (with `balanced`, the one that the transport assigns).
    distances : float32 array of shape (items,)
        Squared distance to that centroid.

    Raises
    ------
    ValueError
        If there are fewer items than clusters.

    Examples
    --------
    >>> centroids, ids, distances = kmeans([[0.0], [1.0], [5.0], [6.0]], k=2)
    >>> bool(ids[0] == ids[1] != ids[2] == ids[3]), sorted(centroids.ravel().tolist())
    (True, [0.5, 5.5])
    """
    x = as_features(features)
    if not 1 <= k <= len(x):
        raise ValueError(f"k={k} clusters cannot be made of {len(x)} items: choose between 1 and {len(x)}")
    rng = np.random.default_rng(seed)
    sample = x[rng.permutation(len(x))[: max(SAMPLE[0], SAMPLE[1] * k)]]
    centroids = _start(sample[: max(START[0], START[1] * k)], k, rng)
    if len(sample) < len(x):
        centroids = _lloyd(sample, centroids, iterations)
    centroids = _lloyd(x, centroids, iterations)
    if balanced:
        return _balance(x, centroids, iterations)
    return _fill(x, centroids)


def _fill(x: Array, centroids: Array) -> tuple[Array, Array, Array]:
    """Assign; a centroid that is left without members moves to the item that lies farthest from its own."""
    for _ in range(len(centroids)):
        distances, ids = (found[:, 0] for found in nearest(x, centroids))
        sizes = np.bincount(ids, minlength=len(centroids))
        movable = np.where(sizes[ids] > 1, distances, -1)
        if sizes.all() or movable.max() <= 0:  # or nothing but copies of the centroids is left
            break
        centroids = centroids.copy()
        centroids[sizes.argmin()] = x[movable.argmax()]
    return centroids, ids, distances


def _start(x: Array, k: int, rng: np.random.Generator) -> Array:
    """Greedy k-means++: of a few items drawn by squared distance, the one that lowers the inertia most."""
    trials = 2 + int(np.log(k))
    norms = np.einsum("nd,nd->n", x, x)
    chosen = [int(rng.integers(len(x)))]
    closest = np.maximum(norms + norms[chosen[0]] - 2 * x @ x[chosen[0]], 0)
    while len(chosen) < k:
        cumulative = np.cumsum(closest, dtype=np.float64)
        draws = np.searchsorted(cumulative, rng.random(trials) * cumulative[-1]).clip(max=len(x) - 1)
        distances = norms[:, None] + norms[draws] - 2 * x @ x[draws].T  # (items, trials)
        distances = np.minimum(np.maximum(distances, 0), closest[:, None])
        best = int(distances.sum(0, dtype=np.float64).argmin())
        chosen.append(int(draws[best]))
        closest = distances[:, best]
    return x[chosen]


def _lloyd(x: Array, centroids: Array, iterations: int) -> Array:
    inertia = np.inf
    for _ in range(iterations):
        distances, ids = nearest(x, centroids)
        before, inertia = inertia, float(distances.sum(dtype=np.float64))
        centroids, reseeded = _means(x, ids[:, 0], distances[:, 0], len(centroids))
        if not reseeded and before - inertia <= TOLERANCE * inertia:
            break
    return centroids


def _means(x: Array, ids: Array, distances: Array, k: int) -> tuple[Array, bool]:
    """Each cluster's mean; an empty cluster, or one of a single item, takes half of the largest instead."""
    import scipy.sparse as sp

    counts = np.bincount(ids, minlength=k)
    members = sp.csr_matrix((np.ones(len(x), np.float32), (ids, np.arange(len(x)))), shape=(k, len(x)))
    means = members @ x / np.maximum(counts, 1)[:, None].astype(np.float32)
    lost = np.flatnonzero(counts < 2) if len(x) >= 2 * k else np.flatnonzero(counts == 0)
    distances = distances.copy()
    reseeded = False
    for cluster in lost:
        largest = int(counts.argmax())
        inside = np.flatnonzero(ids == largest)
        farthest = inside[distances[inside].argmax()]
        if distances[farthest] <= 0:  # its items are all alike: no way to split it
            break
        # Two centroids a little apart on the line to the farthest item split the cluster about in half.
        step = 0.1 * (x[farthest] - means[largest])
        means[cluster], means[largest] = means[largest] + step, means[largest] - step
        distances[farthest] = 0
        counts[largest] //= 2
        counts[cluster] = 0  # its items are still listed under the other half, which may be split again
        reseeded = True
    return means, reseeded


def _balance(x: Array, centroids: Array, iterations: int) -> tuple[Array, Array, Array]:
    """Iterations whose assignment gives every cluster about the same share of the items."""
    from scipy.special import logsumexp

    k = len(centroids)
    bias = np.zeros(k)  # of each cluster; what makes the shares equal
    for _ in range(iterations):
        distances = (x**2).sum(1)[:, None] + (centroids**2).sum(1) - 2 * x @ centroids.T  # (items, k)
        scores = -distances / (0.05 * float(distances.mean()) + 1e-30)
        for _ in range(10):  # Sinkhorn
            items = logsumexp(scores + bias, axis=1, keepdims=True)
            bias = np.log(len(x) / k) - logsumexp(scores - items, axis=0)
        ids = (scores + bias).argmax(1)
        centroids, _ = _means(x, ids, np.zeros(len(x)), k)
    return centroids, ids, ((x - centroids[ids]) ** 2).sum(1)
