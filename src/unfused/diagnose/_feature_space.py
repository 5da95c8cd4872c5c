"""Parts of SUFO on arrays: similarity of two feature spaces, scatter of classes, components taken away, cells on two axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "AxisClusters",
    "PCCurves",
    "aligned_axes",
    "axis_clusters",
    "explained_variance",
    "fisher_ratio",
    "kmeans_1d",
    "linear_cka",
    "macro_f1",
    "pc_ablation",
    "per_class_accuracy",
    "rsa",
]


def _features(H: Any, name: str = "H") -> np.ndarray:
    found = np.asarray(H, dtype=np.float64)
    if found.ndim != 2 or len(found) < 3:
        raise ValueError(f"{name} has shape {found.shape}: give (N, d) with at least 3 samples")
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name} holds values that are not finite: the model diverged, or an input is damaged"
        )
    return found


# -- similarity --------------------------------------------------------------------------------------------------------


def rsa(H_pre: Any, H_ft: Any) -> float:
    """Spearman's correlation of the two matrices of Euclidean distances between the same samples.

    Parameters
    ----------
    H_pre, H_ft : array (N, d), (N, d')
        The same N samples. There are N (N - 1) / 2 distances: about a thousand samples is enough.

    Returns
    -------
    float
        1: no distance changed its rank. NaN where all distances of one side are equal.

    Examples
    --------
    >>> H = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(rsa(H, 3 * H[:, ::-1]), 6)
    1.0
    """
    from scipy.spatial.distance import pdist
    from scipy.stats import rankdata

    a, b = _features(H_pre, "H_pre"), _features(H_ft, "H_ft")
    if len(a) != len(b):
        raise ValueError(f"H_pre has {len(a)} samples and H_ft {len(b)}: give features of the same samples")
    ranks = [rankdata(pdist(H)) for H in (a, b)]
    if min(r.std() for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def linear_cka(H_pre: Any, H_ft: Any) -> float:
    """Linear centred kernel alignment of features of the same samples; unlike `rsa` it weighs by variance."""
    a, b = (H - H.mean(0) for H in (_features(H_pre, "H_pre"), _features(H_ft, "H_ft")))
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / norms) if norms else float("nan")


# -- scatter and components --------------------------------------------------------------------------------------------


def fisher_ratio(H: Any, labels: Any) -> float:
    """`trace(S_B) / trace(S_W)`: scatter between classes over scatter within them.

    Examples
    --------
    >>> fisher_ratio([[0.0], [2.0], [10.0], [12.0]], [0, 0, 1, 1])
    25.0
    """
    H, labels = _features(H), np.asarray(labels)
    means = {c: H[labels == c].mean(0) for c in np.unique(labels)}
    counts = {c: int((labels == c).sum()) for c in means}
    between = sum(counts[c] * ((m - H.mean(0)) ** 2).sum() for c, m in means.items())
    within = sum(((H[labels == c] - m) ** 2).sum() for c, m in means.items())
    return float(between / within) if within else float("inf")


def explained_variance(H: Any, components: int = 5) -> np.ndarray:
    """Share of the variance in the first components, cumulative."""
    H = _features(H)
    squares = np.linalg.svd(H - H.mean(0), compute_uv=False) ** 2
    total = squares.sum()
    return np.cumsum(squares)[:components] / total if total else np.zeros(min(components, len(squares)))


def aligned_axes(H: Any, previous: np.ndarray | None = None) -> np.ndarray:
    """Centred features on their first two principal components, (N, 2), turned to lie on those of the epoch before.

    Components have no sign and may change places from epoch to epoch; a rotation (Procrustes) changes no distance.
    """
    from scipy.linalg import orthogonal_procrustes

    H = _features(H)
    U, S, _ = np.linalg.svd(H - H.mean(0), full_matrices=False)
    P = np.zeros((len(H), 2))
    width = min(2, len(S))
    P[:, :width] = U[:, :width] * S[:width]
    if previous is None:
        return P
    return P @ orthogonal_procrustes(P, previous)[0]


def macro_f1(labels: Any, predicted: Any, classes: Sequence[Any]) -> float:
    """Mean of the classes' F1, those that do not occur included."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, labels=list(classes), average="macro", zero_division=0))


def per_class_accuracy(labels: Any, predicted: Any, classes: Sequence[Any]) -> dict[str, float]:
    """Share of each class that is found; NaN where the class has no sample."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    return {
        str(c): float((predicted[labels == c] == c).mean()) if (labels == c).any() else float("nan")
        for c in classes
    }


@dataclass(frozen=True)
class PCCurves:
    """What the head makes of features without, or with nothing but, their first components.

    Attributes
    ----------
    removed : ndarray (K + 1,)
        Macro-F1 without the first 0, 1, ..., K components.
    kept : dict
        "PC1", "PC2", "PC1-2" -> macro_f1, accuracy per class, and how many samples each class was predicted for.
    full_f1 : float
        Of the features as they are.
    """

    removed: np.ndarray
    kept: dict[str, dict[str, Any]]
    full_f1: float


def pc_ablation(
    H: Any,
    head: Callable[[np.ndarray], Any],
    labels: Any,
    H_test: Any = None,
    test_labels: Any = None,
    max_removed: int = 10,
    num_classes: int | None = None,
) -> PCCurves:
    """Send features without some of their principal components through the head.

    The components and the mean are of `H`; the mean is added again, so that the head sees no shifted input.

    Parameters
    ----------
    H : array (N, d)
        Features that the components are computed on.
    head : callable (n, d) -> logits (n, C)
    labels : array (N,) of int
        From 0 on.
    H_test, test_labels : arrays, optional
        What is classified; held-out samples. By default `H` and `labels` themselves.
    max_removed : int, default=10
    num_classes : int, optional
        By default as many as the logits have.
    """
    given = np.asarray(H).dtype
    kind = given if given in (np.float32, np.float64) else np.float64  # what the head is used to
    H, labels = _features(H), np.asarray(labels)
    X, y = (H, labels) if H_test is None else (_features(H_test, "H_test"), np.asarray(test_labels))
    mean = H.mean(0)
    V = np.linalg.svd(H - mean, full_matrices=False)[2]  # (min(N, d), d)
    P = (X - mean) @ V.T
    full = _predictions(head(X.astype(kind)))
    classes = range(num_classes or full[1])

    def without(first: int) -> np.ndarray:
        return X - P[:, :first] @ V[:first]

    removed = [
        macro_f1(y, _predictions(head(without(k).astype(kind)))[0], classes)
        for k in range(min(max_removed, len(V)) + 1)
    ]
    kept = {}
    for name, some in (("PC1", [0]), ("PC2", [1]), ("PC1-2", [0, 1])):
        chosen = [k for k in some if k < len(V)]
        said = _predictions(head((mean + P[:, chosen] @ V[chosen]).astype(kind)))[0]
        kept[name] = {
            "macro_f1": macro_f1(y, said, classes),
            "accuracy": per_class_accuracy(y, said, classes),
            "predicted": {str(c): int((said == c).sum()) for c in classes},
        }
    return PCCurves(np.array(removed), kept, macro_f1(y, full[0], classes))


def _predictions(logits: Any) -> tuple[np.ndarray, int]:
    found = logits.detach().float().cpu().numpy() if hasattr(logits, "detach") else np.asarray(logits)
    if found.ndim != 2:
        raise ValueError(f"head gave shape {found.shape}: it must give logits (n, classes)")
    return found.argmax(1), found.shape[1]


# -- cells -------------------------------------------------------------------------------------------------------------


def kmeans_1d(x: Any, groups: int) -> np.ndarray:
    """The exact k-means of numbers, by dynamic programming: group of each, from 0 (smallest) on.

    Examples
    --------
    >>> kmeans_1d([0.0, 10.0, 0.1, 5.0, 9.0], 3)
    array([0, 2, 0, 1, 2])
    """
    x = np.asarray(x, dtype=np.float64)
    if groups < 1:
        raise ValueError(f"groups={groups}: at least 1")
    if x.ndim != 1 or not len(x):
        raise ValueError(f"x has shape {x.shape}: give numbers, (N,)")
    values, inverse, counts = np.unique(
        x, return_inverse=True, return_counts=True
    )  # equal numbers stay together
    n, groups = len(values), min(groups, len(values))
    shifted = values - values.mean()
    count = np.concatenate([[0], np.cumsum(counts)])
    first = np.concatenate([[0], np.cumsum(counts * shifted)])
    second = np.concatenate([[0], np.cumsum(counts * shifted**2)])
    cost = second[1:] - first[1:] ** 2 / count[1:]  # of the first 1 .. n values as one group
    cuts = np.zeros((groups, n), dtype=np.int64)
    for k in range(1, groups):
        new = np.full(n, np.inf)
        for j in range(k, n):
            i = np.arange(k, j + 1)  # the last group is i .. j
            last = second[j + 1] - second[i] - (first[j + 1] - first[i]) ** 2 / (count[j + 1] - count[i])
            sums = cost[i - 1] + last
            best = int(sums.argmin())
            new[j], cuts[k, j] = sums[best], i[best]
        cost = new
    found = np.zeros(n, dtype=np.int64)
    end = n - 1
    for k in range(groups - 1, 0, -1):
        begin = cuts[k, end]
        found[begin : end + 1] = k
        end = begin - 1
    return found[inverse]


@dataclass(frozen=True)
class AxisClusters:
    """Cells on two axes.

    Attributes
    ----------
    code : ndarray (N,) of int
        `groups * (group on axis 1) + (group on axis 2)`.
    cells : tuple of int
        Codes of the largest cells: the clusters.
    outlier : ndarray (N,) of bool
        All that lies elsewhere; nothing where fewer than `groups` cells have members.
    distance : ndarray (N,)
        To the nearest cluster's mean, axes divided by their deviations.
    """

    code: np.ndarray
    cells: tuple[int, ...]
    outlier: np.ndarray
    distance: np.ndarray


def axis_clusters(P: Any, groups: int) -> AxisClusters:
    """Group each of two axes by itself; the `groups` largest of all pairs are the clusters.

    Parameters
    ----------
    P : array (N, 2)
        Coordinates on two components. Their scales differ, so that clustering both together would ignore the second.
    groups : int
        As many as classes are expected.

    Examples
    --------
    >>> P = [[0, 0], [0, 0.1], [9, 5], [9.1, 5], [0.1, 5.0]]
    >>> found = axis_clusters(P, 2)
    >>> found.cells, found.outlier
    ((0, 3), array([False, False, False, False,  True]))
    """
    P = np.asarray(P, dtype=np.float64)
    if P.ndim != 2 or P.shape[1] != 2:
        raise ValueError(f"P has shape {P.shape}: give two coordinates a sample, (N, 2)")
    code = groups * kmeans_1d(P[:, 0], groups) + kmeans_1d(P[:, 1], groups)
    present, counts = np.unique(code, return_counts=True)
    largest = present[np.lexsort((present, -counts))][:groups]
    scaled = P / np.maximum(P.std(0), 1e-12)
    centres = np.stack([scaled[code == c].mean(0) for c in largest])
    distance = np.linalg.norm(scaled[:, None] - centres, axis=2).min(1)
    outlier = ~np.isin(code, largest) if len(present) >= groups else np.zeros(len(P), dtype=bool)
    return AxisClusters(code, tuple(int(c) for c in largest), outlier, distance)
