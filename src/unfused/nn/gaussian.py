"""Classes as Gaussians with one covariance: moments that can be merged, Bayes' rule, and leaving samples out exactly.

With scatter `A = sum_i w_i (x_i - mu_y)(x_i - mu_y)'` over N samples of D features, the precision that Kubokawa and
Srivastava's estimator gives is `P = D (A + tr(A)/(N - 1) I)^-1`, and Bayes' rule is linear:
`score_c(x) = x'P mu_c - mu_c'P mu_c / 2 + log pi_c`. NumPy and SciPy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse

from unfused.nn.zero_shot import row_blocks

__all__ = [
    "Moments",
    "class_moments",
    "discriminant",
    "ks_discriminant",
    "leave_one_out",
    "surrogate_precision",
]


@dataclass(frozen=True)
class Moments:
    """What a shared-covariance Gaussian model knows of the data.

    Attributes
    ----------
    counts : ndarray of shape (n_classes,)
        Samples (sum of weights) of each class.
    means : ndarray of shape (n_classes, n_features)
        0 where a class has no sample.
    scatter : ndarray of shape (n_features, n_features)
        Sum over samples of the outer products of their residuals.
    """

    counts: np.ndarray
    means: np.ndarray
    scatter: np.ndarray

    def merge(self, other: Moments) -> Moments:
        """The moments of both data sets together; no sample is needed again."""
        counts = self.counts + other.counts
        share = np.divide(other.counts, counts, out=np.zeros_like(counts), where=counts > 0)[:, None]
        apart = other.means - self.means
        between = apart * np.sqrt(self.counts[:, None] * share)
        return Moments(counts, self.means + share * apart, self.scatter + other.scatter + between.T @ between)


def class_moments(
    X: np.ndarray, index: np.ndarray, n_classes: int, weight: np.ndarray | None = None
) -> Moments:
    """Counts, means and the common scatter, in two passes over blocks of rows; sums in float64.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
    index : ndarray of int, shape (n_samples,)
        Class of each sample.
    n_classes : int
    weight : ndarray of shape (n_samples,), optional
        A weight of 2 is the sample twice.

    Examples
    --------
    >>> m = class_moments(np.array([[0.0], [2.0], [7.0]]), np.array([0, 0, 1]), n_classes=2)
    >>> m.counts.tolist(), m.means.tolist(), m.scatter.tolist()
    ([2.0, 1.0], [[1.0], [7.0]], [[2.0]])
    """
    n, d = X.shape
    weight = np.ones(n) if weight is None else np.asarray(weight, np.float64)
    counts = np.bincount(index, weight, n_classes)
    totals, scatter = np.zeros((n_classes, d)), np.zeros((d, d))
    for rows in row_blocks(n, d):
        some = len(index[rows])
        members = sparse.csr_matrix((weight[rows], (index[rows], np.arange(some))), shape=(n_classes, some))
        totals += members @ X[rows]
    means = totals / np.where(counts > 0, counts, 1)[:, None]
    near = means.astype(X.dtype)
    for rows in row_blocks(n, d):
        residual = (X[rows] - near[index[rows]]) * np.sqrt(weight[rows]).astype(X.dtype)[:, None]
        scatter += residual.T @ residual
    return Moments(counts, means, scatter)


def discriminant(
    means: np.ndarray, precision: np.ndarray, log_prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bayes' rule for Gaussians of one precision (d, d): weights (n_classes, d) and intercepts (n_classes,)."""
    weights = means @ precision
    return weights, log_prior - 0.5 * np.einsum("cd,cd->c", means, weights)


def ks_discriminant(moments: Moments, log_prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bayes' rule with Kubokawa and Srivastava's precision; the identity where all residuals are 0."""
    means, scatter = moments.means, moments.scatter
    added = np.trace(scatter) / max(moments.counts.sum() - 1, 1)
    if not added > _tiny(means):
        return discriminant(means, np.eye(means.shape[1]), log_prior)
    # Its condition is at most N: a Cholesky solution is as good as the pseudo-inverse, and cheaper.
    matrix = scatter + added * np.eye(len(scatter))
    weights = means.shape[1] * linalg.solve(matrix, means.T, assume_a="pos").T
    return weights, log_prior - 0.5 * np.einsum("cd,cd->c", means, weights)


def _tiny(means: np.ndarray) -> float:
    """A variance that is rounding beside means of this size."""
    return 1e-13 * max(float(np.square(means).max(initial=0)), np.finfo(np.float64).tiny)


def leave_one_out(
    X: np.ndarray,
    index: np.ndarray,
    groups: np.ndarray,
    moments: Moments,
    log_prior: np.ndarray,
    weight: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores of every sample by the `ks_discriminant` of all other groups, exactly and without refitting.

    Without group g (residuals z_j, weights w_j, their weighted sum s, what is left of its class n) the scatter is
    `A - sum_j w_j z_j z_j' - s s'/n`: a few rank-one steps down, which in the eigenbasis of A are matrix products, whatever
    the trace added to the diagonal has become.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
    index : ndarray of int, shape (n_samples,)
        Class of each sample.
    groups : ndarray of int, shape (n_samples,)
        What is left out together: the views of one picture, say. All samples of a group are of one class.
    moments : Moments
        Of these samples.
    log_prior : ndarray of shape (n_classes,)
    weight : ndarray of shape (n_samples,), optional

    Yields
    ------
    rows : ndarray of int
        Samples; those that are all that their class has never come up.
    scores : ndarray of shape (len(rows), n_classes)
    """
    n, d = X.shape
    weight = np.ones(n) if weight is None else np.asarray(weight, np.float64)
    values, basis = linalg.eigh(moments.scatter)
    values = np.maximum(values, 0)
    order = np.argsort(groups, kind="stable")
    _, first, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    left = moments.counts[index[order[first]]] - np.add.reduceat(weight[order], first)
    usable = left > 1e-9 * moments.counts[index[order[first]]]
    first, sizes, left = first[usable], sizes[usable], left[usable]
    if not len(first):
        return
    views = int(sizes.max())
    means = moments.means @ basis  # (n_classes, d), in the eigenbasis like everything below
    for some in row_blocks(len(first), (2 * views + 1) * max(d, len(means))):
        inside = np.arange(views) < sizes[some, None]  # (groups, views): groups are padded to one size
        rows = order[np.where(inside, first[some, None] + np.arange(views), first[some, None])]
        own = index[rows[:, 0]]
        x = X[rows] @ basis  # (groups, views, d)
        w = weight[rows] * inside
        z = x - means[own][:, None]
        total = np.einsum("gv,gvd->gd", w, z)
        down = np.concatenate(
            [np.sqrt(w)[..., None] * z, total[:, None] / np.sqrt(left[some])[:, None, None]], 1
        )
        added = (values.sum() - np.square(down).sum((1, 2))) / np.maximum(
            moments.counts.sum() - w.sum(1) - 1, 1
        )
        spread = added > _tiny(moments.means)
        scale = np.where(spread, float(d), 1.0)
        down[~spread] = 0
        inverse = np.where(
            spread[:, None], 1 / (values + np.where(spread, added, 1)[:, None]), 1.0
        )  # (groups, d)
        mean = means[own] - total / left[some][:, None]  # of its class, without the group

        weighed = down * inverse[:, None]  # (groups, r, d)
        core = np.eye(down.shape[1]) - weighed @ down.transpose(0, 2, 1)
        to_means = np.concatenate([weighed @ means.T, np.einsum("grd,gd->gr", weighed, mean)[..., None]], -1)
        solved = np.linalg.solve(core, to_means)  # (groups, r, n_classes + 1), the last for the moved mean
        squares = np.concatenate(
            [inverse @ np.square(means).T, np.einsum("gd,gd->g", inverse, mean**2)[:, None]], 1
        )
        squares += np.einsum("grc,grc->gc", to_means, solved)
        products = x * inverse[:, None]
        linear = np.concatenate([products @ means.T, np.einsum("gvd,gd->gv", products, mean)[..., None]], -1)
        linear += (x @ weighed.transpose(0, 2, 1)) @ solved
        scores = scale[:, None, None] * (linear - 0.5 * squares[:, None])
        scores[np.arange(len(own)), :, own] = scores[..., -1]
        yield rows[inside], (scores[..., :-1] + log_prior)[inside]


def surrogate_precision(X: np.ndarray, chosen: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The mean of the precisions of several small sets of samples, each scattered around a centre of its own.

    For each set Z (k, d) of residuals `d (Z'Z + tr I)^-1` with `tr = |Z|^2 / (k - 1)`, by Woodbury's identity: matrices of
    k x k, not of d x d, are inverted.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
    chosen : ndarray of int, shape (n_sets, k)
        Rows of X.
    centres : ndarray of shape (n_sets, n_features)

    Returns
    -------
    ndarray of shape (n_features, n_features)
    """
    (sets, k), d = chosen.shape, X.shape[1]
    total = np.zeros((d, d))
    for some in row_blocks(sets, k * (k + 2 * d)):
        z = X[chosen[some]] - centres[some, None]  # (sets, k, d)
        trace = np.square(z).sum((1, 2)) / max(k - 1, 1)
        spread = trace > _tiny(centres)
        total += np.eye(d) * (np.where(spread, d / np.where(spread, trace, 1), 1.0).sum())
        z, trace = z[spread], trace[spread]
        gram = z @ z.transpose(0, 2, 1) + trace[:, None, None] * np.eye(k)
        half = np.linalg.solve(gram, z) * (d / trace)[:, None, None]
        total -= z.reshape(-1, d).T @ half.reshape(-1, d)
    return total / sets
