"""Cache models: keys with classes that vote for what is like them, on top of zero-shot logits.

What Tip-Adapter, Tip-X, TFUP and M-Adapter share. Keys lie class by class, so that a vote is a sum over neighbouring
columns and no one-hot matrix is needed; the divergence of class distributions is a matrix product (`divergence`); the
weights that enter logits linearly are searched at once (`linear_grid`). NumPy only; callers cut rows into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unfused.nn.zero_shot import log_softmax, row_blocks

__all__ = [
    "Keys",
    "confident_and_central",
    "divergence",
    "linear_grid",
    "multi_level_affinity",
    "tip_adapter",
]


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys in the order of their classes.

    Attributes
    ----------
    features : ndarray of shape (n_keys, n_features)
    index : ndarray of int, shape (n_keys,)
        Class of each key, ascending.
    n_classes : int
    """

    features: np.ndarray
    index: np.ndarray
    n_classes: int

    @classmethod
    def sort(cls, features: np.ndarray, index: np.ndarray, n_classes: int) -> tuple[Keys, np.ndarray]:
        """The keys, and the order that they were brought into."""
        order = np.argsort(index, kind="stable")
        return cls(features[order], index[order], n_classes), order

    def votes(self, affinity: np.ndarray) -> np.ndarray:
        """The sum over each class's keys: (n, n_keys) to (n, n_classes); 0 for a class that has none.

        Examples
        --------
        >>> keys = Keys(np.eye(3), np.array([0, 0, 2]), n_classes=3)
        >>> keys.votes(np.array([[1.0, 2.0, 4.0]])).tolist()
        [[3.0, 0.0, 4.0]]
        """
        n, m = affinity.shape
        if m == self.n_classes:  # one key each, unless a class has none
            if np.array_equal(self.index, np.arange(m)):
                return affinity.copy()
        elif m % self.n_classes == 0 and (self.index == np.arange(m) // (m // self.n_classes)).all():
            return affinity.reshape(n, self.n_classes, -1).sum(axis=2)
        present, first = np.unique(self.index, return_index=True)
        found = np.zeros((n, self.n_classes), affinity.dtype)
        found[:, present] = np.add.reduceat(affinity, first, axis=1)
        return found


def divergence(x: np.ndarray, keys: np.ndarray, text: np.ndarray | None, scale: float) -> np.ndarray:
    """`KL(p(x) || p(key))` of class distributions `p(z) = softmax(scale z W')`, for all pairs; (n, n_keys).

    `log p(key)` is linear in the key up to its normaliser, so that the cross term is `scale (p(x) W) key' - lse(key)`: it
    costs n x n_keys x n_features, whatever the number of classes.

    Parameters
    ----------
    x : ndarray of shape (n, n_features)
    keys : ndarray of shape (n_keys, n_features)
    text : ndarray of shape (n_classes, n_features) or None
        W. None: the softmax of the feature itself.
    scale : float

    Examples
    --------
    >>> x, keys, W = np.eye(2), np.array([[0.6, 0.8]]), np.eye(2)
    >>> p, q = (np.exp(log_softmax(10 * z @ W.T)) for z in (x, keys))
    >>> np.allclose(divergence(x, keys, W, 10.0)[:, 0], (p * np.log(p / q)).sum(1))
    True
    """
    ours, theirs = (scale * (z if text is None else z @ text.T) for z in (x, keys))
    log_p = log_softmax(ours)
    p = np.exp(log_p)
    entropy = np.einsum("nc,nc->n", p, log_p)  # negative
    largest = theirs.max(axis=1)
    normaliser = largest + np.log(np.exp(theirs - largest[:, None]).sum(axis=1))
    apart = (
        scale * (p if text is None else p @ text)
    ) @ keys.T  # the cross term, turned into the result in place
    np.subtract(normaliser, apart, out=apart)
    apart += entropy[:, None]
    return np.maximum(apart, 0, out=apart)


def multi_level_affinity(
    x: np.ndarray, keys: np.ndarray, text: np.ndarray, scale: float, beta: float
) -> np.ndarray:
    """TFUP's affinity `exp(-beta (1 - a b))`: cosine a, and b in [0, 2] that falls with the divergence; (n, n_keys).

    b is scaled between the nearest and the farthest key of each row; where all are equally near it is 2.
    """
    apart = divergence(x, keys, text, scale)
    apart -= apart.min(axis=1, keepdims=True)
    widest = apart.max(axis=1, keepdims=True)
    apart /= np.where(widest > 0, widest, 1)
    affinity = x @ keys.T
    affinity *= 2 - 2 * apart
    affinity -= 1
    affinity *= beta
    return np.exp(affinity, out=affinity)


def tip_adapter(
    x: np.ndarray, keys: Keys, text: np.ndarray | None, alpha: float, beta: float, logit_scale: float = 100.0
) -> np.ndarray:
    """The baseline, Tip-Adapter: `logit_scale x W' + alpha exp(-beta (1 - x keys')) V`; (n, n_classes)."""
    affinity = x @ keys.features.T.astype(x.dtype)
    affinity -= 1
    affinity *= beta
    logits = alpha * keys.votes(np.exp(affinity, out=affinity))
    return logits if text is None else logits + logit_scale * (x @ text.T.astype(x.dtype))


def confident_and_central(x: np.ndarray, text: np.ndarray, scale: float, shots: int) -> np.ndarray:
    """For each class the rows that TFUP caches: of the `2 shots` most confident, the `shots` most central.

    Central is who has the smallest sum of `KL(p_j || p_k)` over the others k; that sum is `2K sum_c p_j log p_j - p_j' sum_k
    log p_k`, so that no pair is formed.

    Returns
    -------
    ndarray of int, shape (n_classes, min(shots, n))
    """
    n, classes = len(x), len(text)
    pool, kept = min(2 * shots, n), min(shots, n)
    normaliser = np.empty(n, x.dtype)
    for rows in row_blocks(n, classes):
        logits = scale * (x[rows] @ text.T)
        largest = logits.max(axis=1)
        normaliser[rows] = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    found = np.empty((classes, kept), np.intp)
    for some in row_blocks(classes, 2 * n + 3 * pool * classes):
        confidence = scale * (text[some] @ x.T) - normaliser  # log p_c, (classes, n)
        top = np.argpartition(-confidence, pool - 1, axis=1)[:, :pool]
        log_p = scale * (x[top] @ text.T) - normaliser[top][..., None]  # (classes, pool, n_classes)
        p = np.exp(log_p)
        apart = pool * np.einsum("bjc,bjc->bj", p, log_p) - np.einsum("bjc,bc->bj", p, log_p.sum(axis=1))
        nearest = np.argsort(apart, axis=1, kind="stable")[:, :kept]
        found[some] = np.take_along_axis(top, nearest, axis=1)
    return found


def linear_grid(
    base: np.ndarray,
    first: np.ndarray,
    second: np.ndarray | None,
    index: np.ndarray,
    alphas: np.ndarray,
    gammas: np.ndarray = np.zeros(1),  # never written to
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Accuracy of `base + alpha first + gamma second` for every pair of weights; (n_alphas, n_gammas).

    For a fixed gamma a sample is right for an interval of alphas, found in one pass over the classes: all alphas together
    cost no more than one. A tie is counted as wrong.

    Parameters
    ----------
    base, first, second : ndarray of shape (n, n_classes)
        `second` may be None.
    index : ndarray of int, shape (n,)
        The right classes.
    alphas, gammas : ndarray
        In any order.
    weight : ndarray of shape (n,), optional

    Examples
    --------
    >>> base, vote = np.array([[2.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> linear_grid(base, vote, None, np.array([1]), np.array([1.0, 3.0])).ravel().tolist()
    [0.0, 1.0]
    """
    alphas, gammas = np.asarray(alphas, np.float64), np.asarray(gammas, np.float64)
    weight = np.ones(len(base)) if weight is None else weight
    order = np.argsort(alphas, kind="stable")
    changes = np.zeros((len(gammas), len(alphas) + 1))
    for rows in row_blocks(len(base), 6 * base.shape[1]):
        y = index[rows, None]

        def lead(scores: np.ndarray, rows: slice = rows, y: np.ndarray = y) -> np.ndarray:
            """By how much the right class is ahead of each class."""
            return np.take_along_axis(scores[rows], y, axis=1) - scores[rows]

        start, slope = lead(base), lead(first)
        np.put_along_axis(start, y, np.inf, axis=1)  # ahead of itself whatever the weights
        np.put_along_axis(slope, y, 0, axis=1)
        more = None if second is None else lead(second)
        rising, falling = slope > 0, slope < 0
        steps = np.where(slope == 0, 1, slope)
        for column, gamma in enumerate(gammas):
            ahead = start if more is None or not gamma else start + gamma * more
            zero = -ahead / steps  # the alpha at which the two are level
            low = np.where(rising, zero, -np.inf).max(axis=1)
            high = np.where(falling, zero, np.inf).min(axis=1)
            never = ((slope == 0) & (ahead <= 0)).any(axis=1)
            begin = np.searchsorted(alphas[order], low, "right")
            end = np.where(never, begin, np.maximum(np.searchsorted(alphas[order], high, "left"), begin))
            size = len(alphas) + 1
            counted = weight[rows]
            changes[column] += np.bincount(begin, counted, size) - np.bincount(end, counted, size)
    right = np.cumsum(changes, axis=1)[:, :-1] / weight.sum()
    found = np.empty((len(alphas), len(gammas)))
    found[order] = right.T
    return found
