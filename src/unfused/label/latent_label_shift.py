"""DDFA: finds classes without labels, from domains in which the same classes occur in other proportions.

What shifts together belongs together: p_d(x, y) = p_d(y) p(x|y), with domains d in which p(x|y) is the same. With r
domains weighted equally, the classifier of domains f(x) = q(d|x) is a mixture, q(d|x) = sum_y q(d|y) q(y|x), whatever
the classes look like. So

    discriminate   f(x) ~ q(d|x), out of fold: what a model has memorised would be one cluster per domain
    discretise     c(x) in 1..m: k-means on f(x)
    factorise      A = p(c|d), (m, r);  A ~ C Q,  C = p(c|y), Q = p_d(y), both non-negative
    adjust         q(y|x) from f(x) = D q(y|x), D = q(d|y) = Q' normalised over d;  p_d(y|x) ~ q(y|x) q(d|y)

Classes are found up to their order if Q has rank k (so r >= k) and each class has cells of its own (anchors). That is
what can be identified; what a plain non-negative factorisation finds is unique only where each class is also nearly
absent from some domain. With milder shift Q comes out too extreme, and the labels suffer less than Q. Where p(x|y)
differs between domains, by a device or an accent, that difference passes for classes.

Reference: Unsupervised Learning under Latent Label Shift, NeurIPS 2022, arXiv:2207.13179.
Needs: unlabelled data, several domains.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin, clone
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, has_fit_parameter, validate_data

from unfused.nn.estimators import check_whole, draw_seed, seeded

__all__ = ["DDFA"]

DEAD = 1e-3  # a class below this share in every domain is none


class DDFA(ClusterMixin, BaseEstimator):
    """Discriminate, discretise, factorise, adjust: class proportions of every domain and a classifier for each.

    Parameters
    ----------
    n_classes : int, optional
        k, at most the number of domains. By default (not in the paper) as many as A has singular values above what
        the finite sample alone gives it.
    n_discretization : int, optional
        m, the cells that f(x) is cut into, at least k. By default three per class.
    discriminator : classifier or "precomputed", optional
        Anything with `fit` and `predict_proba`: a network that was pretrained without labels does best (skorch makes
        one of a torch module). By default a standardised MLP (128, 64), early stopped. "precomputed": X holds the
        probabilities themselves, (n_samples, r), held out, in the order of the sorted domains.
    cv : int or splitter, default=5
        Folds of the domain classifier. New points get the mean of the folds' models.
    nmf_restarts : int, default=10
        Random starts; the lowest residual wins, among those without a dead class.
    solver : {"nnls", "pinv", "table"}, default="nnls"
        How q(y|x) is found: by least squares over the probability simplex; by the pseudo-inverse, negative entries set
        to 0 (which leaves its largest entry where it was); or, the naive variant, from the cell c(x) alone.
    reweight : {"auto", "weights", "posterior", "none"}, default="auto"
        How domains of unequal size are made equal: by sample weights, by dividing the probabilities by the shares of
        the domains, or not at all. "auto": weights where the discriminator takes them, else the posterior, and nothing
        for precomputed probabilities.
    discretizer : clusterer, optional
        Fitted to X in place of k-means on f(x), for comparison: `make_pipeline(PCA(10), KMeans(30))`.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    labels_ : ndarray of int, shape (n_samples,)
        Class of each training point, given its domain, from its out-of-fold f(x). `predict` of the same points asks
        the folds' mean, which has seen them.
    class_prior_ : ndarray of shape (k, r)
        Q: proportions of the classes in each domain, in the order of `domains_`.
    cell_given_class_ : ndarray of shape (m, k)
        C.
    domain_given_class_ : ndarray of shape (r, k)
        D.
    domains_, classes_ : ndarray of shape (r,), (k,)
    domain_proba_ : ndarray of shape (n_samples, r)
        f(x), out of fold.
    score_residual_ : float
        Frobenius norm of A - CQ before C and Q are normalised.
    singular_values_, noise_level_ : ndarray of shape (min(m, r),), float
        Of A, and the bound under which one may be due to the finite sample alone.
    n_classes_, n_features_in_, feature_names_in_

    Raises
    ------
    ValueError
        More classes than domains or cells, a domain of one point, an unseen domain at prediction, domains missing.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(2, size=400)  # never shown to the model
    >>> sites = np.where(rng.random(400) < 0.3, "middle", np.where(y, "north", "south"))
    >>> X = np.where(y, 1, -1)[:, None] * [0, 3] + rng.normal(size=(400, 2)) * [3, 0.5]  # wide where nothing shifts
    >>> model = DDFA(n_classes=2, n_discretization=6, random_state=0).fit(X, domains=sites)
    >>> agree = (model.predict(X, domains=sites) == y).mean()
    >>> bool(max(agree, 1 - agree) > 0.95), model.domains_.tolist(), model.class_prior_.max(0).round(1).tolist()
    (True, ['middle', 'north', 'south'], [0.5, 1.0, 1.0])
    """

    def __init__(
        self,
        n_classes: int | None = None,
        n_discretization: int | None = None,
        discriminator: Any = None,
        *,
        cv: Any = 5,
        nmf_restarts: int = 10,
        solver: str = "nnls",
        reweight: str = "auto",
        discretizer: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_classes = n_classes
        self.n_discretization = n_discretization
        self.discriminator = discriminator
        self.cv = cv
        self.nmf_restarts = nmf_restarts
        self.solver = solver
        self.reweight = reweight
        self.discretizer = discretizer
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, domains: Any = None) -> DDFA:
        """Learn from points of known domains.

        Parameters
        ----------
        X : array of shape (n_samples, n_features), or (n_samples, ...) as the discriminator takes it
        y : ignored
        domains : array of shape (n_samples,), optional
            Site, month, user ...: ints or strings. Without it all points are of one domain, in which no class can be
            told from another: `n_classes` above 1 is an error then, and without `n_classes` there is one class.
        """
        X = validate_data(self, X, dtype=(np.float64, np.float32), allow_nd=True)
        self._check_parameters()
        self.domains_, d = _read_domains(domains, len(X))
        r, k = len(self.domains_), self.n_classes
        if k is not None and k > r:
            given = "no domains" if domains is None else f"{r} domains"
            raise ValueError(f"n_classes={k} with {given}: pass domains= with at least {k} different ones")
        m = self.n_discretization or (3 * (k or r) if r > 1 else 1)
        if k is not None and k > m:
            raise ValueError(f"n_discretization={m} is less than n_classes={k}: give at least as many")
        rng = check_random_state(self.random_state)
        self.domain_proba_ = F = self._discriminate(X, d, rng)  # (n, r)
        if self.discretizer is None:
            self.discretizer_ = KMeans(m, n_init=5, max_iter=100, random_state=draw_seed(rng))
        else:
            self.discretizer_ = seeded(clone(self.discretizer), rng)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # fewer distinct f(x) than cells: some stay empty
            c = self.discretizer_.fit_predict(F if self.discretizer is None else X)
        A = _shares(c, d, max(m if self.discretizer is None else 0, int(c.max()) + 1), r)  # (m, r)
        self.singular_values_ = np.linalg.svd(A, compute_uv=False)
        self.noise_level_ = _noise_level(A, np.bincount(d, minlength=r))
        found = max(1, int((self.singular_values_ > self.noise_level_).sum()))
        if k is not None and found < k:
            warnings.warn(
                f"the domains differ in {found} ways beyond the noise of the sample, n_classes={k}: the classes may not be "
                "identifiable (see singular_values_ and noise_level_)",
                stacklevel=2,
            )
        self.n_classes_ = k or found
        self.classes_ = np.arange(self.n_classes_)
        C, Q, self.score_residual_ = _factorise(A, self.n_classes_, self.nmf_restarts, rng)
        self.cell_given_class_, self.class_prior_ = C, Q
        self.domain_given_class_ = _normalised(Q.T)  # (r, k)
        self.labels_ = self._posterior(F, c, d).argmax(1)
        return self

    def predict(self, X: Any, domains: Any = None) -> np.ndarray:
        """The likeliest class, 0..k-1; `domains` as for `predict_proba`."""
        return self.predict_proba(X, domains).argmax(1)

    def predict_proba(self, X: Any, domains: Any = None) -> np.ndarray:
        """p_d(y|x), shape (n_samples, k).

        Parameters
        ----------
        X : array of shape (n_samples, ...)
        domains : array of shape (n_samples,), optional
            Of those seen in `fit`. None: a point may be of any domain, all equally likely.
        """
        check_is_fitted(self, "class_prior_")
        X = validate_data(self, X, dtype=(np.float64, np.float32), allow_nd=True, reset=False)
        d = None if domains is None else _read_domains(domains, len(X), self.domains_)[1]
        F = self._domain_proba(X)
        cells = None
        if self.solver == "table":
            cells = self.discretizer_.predict(F if self.discretizer is None else X)
        return self._posterior(F, cells, d)

    def score(self, X: Any, y: Any = None, *, domains: Any = None) -> float:
        """How well k classes explain the domains: minus the Brier score of D q(y|x), averaged over domains.

        It needs no labels, so that a search over `n_discretization` or the discriminator may maximise it.
        """
        check_is_fitted(self, "class_prior_")
        X = validate_data(self, X, dtype=(np.float64, np.float32), allow_nd=True, reset=False)
        d = _read_domains(domains, len(X), self.domains_)[1]
        D = self.domain_given_class_
        q = simplex_least_squares(self._domain_proba(X), D)
        error = ((q @ D.T - np.eye(len(D))[d]) ** 2).sum(1)
        _, d = np.unique(d, return_inverse=True)
        return -float((np.bincount(d, error) / np.bincount(d)).mean())

    # -- the four steps --------------------------------------------------------------------------------------------

    def _discriminate(self, X: np.ndarray, d: np.ndarray, rng: Any) -> np.ndarray:
        """f(x) of every training point from a model that has not seen it: (n, r)."""
        sizes = np.bincount(d)
        self.discriminators_: list[
            tuple[Any, np.ndarray | None]
        ] = []  # the folds' models, shares to divide by
        if isinstance(self.discriminator, str) or len(sizes) == 1:
            if isinstance(self.discriminator, str) and self.reweight == "posterior":
                self.discriminators_ = [(None, sizes / len(d))]
            return self._domain_proba(X)
        if sizes.min() < 2:
            name = self.domains_.tolist()[sizes.argmin()]
            raise ValueError(
                f"domains: {name!r} has 1 point, each needs 2: leave it out or join it with another"
            )
        model = (
            _default_discriminator(X, sizes, self.cv) if self.discriminator is None else self.discriminator
        )
        how = self.reweight
        if how == "auto":
            how = "weights" if has_fit_parameter(model, "sample_weight") else "posterior"
        splitter = self.cv
        if isinstance(splitter, int):
            splitter = StratifiedKFold(splitter, shuffle=True, random_state=draw_seed(rng))
        F = np.full((len(X), len(sizes)), np.nan)
        for train, held_out in splitter.split(X, d):
            fitted, n_d = seeded(clone(model), rng), np.bincount(d[train], minlength=len(sizes))
            weights = {"sample_weight": (len(train) / len(sizes) / n_d)[d[train]]} if how == "weights" else {}
            fitted.fit(X[train], d[train], **weights)
            self.discriminators_.append((fitted, n_d / len(train) if how == "posterior" else None))
            F[held_out] = _domain_proba(X[held_out], len(sizes), *self.discriminators_[-1])
        if np.isnan(F).any():
            raise ValueError(
                f"cv={self.cv!r} or the discriminator leaves points without probabilities: use folds that hold out every "
                "point, and a discriminator that gives no NaN"
            )
        return F

    def _domain_proba(self, X: np.ndarray) -> np.ndarray:
        r = len(self.domains_)
        if isinstance(self.discriminator, str):
            if X.ndim != 2 or X.shape[1] != r:
                raise ValueError(
                    f"discriminator='precomputed': X must be (n, {r}), a column per domain; got {X.shape}"
                )
            if (X < 0).any() or not X.sum(1).all():
                raise ValueError(
                    "discriminator='precomputed': X holds negative numbers or rows of zeros, no probabilities"
                )
            return _domain_proba(X, r, *(self.discriminators_ or [(None, None)])[0])
        if r == 1:
            return np.ones((len(X), 1))
        return np.mean([_domain_proba(X, r, *fold) for fold in self.discriminators_], 0)

    def _posterior(self, F: np.ndarray, cells: np.ndarray | None, d: np.ndarray | None) -> np.ndarray:
        """p_d(y|x), or its mixture over equally likely domains where d is None: (n, k)."""
        D, Q = self.domain_given_class_, self.class_prior_
        if self.solver == "table":
            assert cells is not None
            joint = self.cell_given_class_[cells] * (Q.mean(1) if d is None else Q.T[d])
        else:
            q = F @ np.linalg.pinv(D).T if self.solver == "pinv" else simplex_least_squares(F, D)
            joint = q.clip(0) if d is None else q.clip(0) * D[d]
        total = joint.sum(1, keepdims=True)
        prior = (
            Q.mean(1)[None] if d is None else Q.T[d]
        )  # where the cell or the point is impossible in its domain
        return np.where(total > 0, joint / np.where(total > 0, total, 1), prior)

    def _check_parameters(self) -> None:
        given = [name for name in ("n_classes", "n_discretization") if getattr(self, name) is not None]
        check_whole(self, **dict.fromkeys([*given, "nmf_restarts"], 1))
        for name, choices in (
            ("solver", ("nnls", "pinv", "table")),
            ("reweight", ("auto", "weights", "posterior", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if isinstance(self.discriminator, str) and self.discriminator != "precomputed":
            raise ValueError(f"discriminator={self.discriminator!r}: give a classifier or 'precomputed'")
        if isinstance(self.discriminator, str) and self.reweight == "weights":
            raise ValueError(
                "reweight='weights' with precomputed probabilities: choose 'posterior' or 'none'"
            )


def simplex_least_squares(F: np.ndarray, D: np.ndarray) -> np.ndarray:
    """argmin |D q - f| over q >= 0 with sum q = 1, for every row f of F at once.

    With E = D - f 1', D q - f = E q on the simplex, and min |E u|^2 + (1'u - 1)^2 over u >= 0 has the solution u = t q
    for the q wanted: a non-negative least-squares problem per point, solved by block principal pivoting on all points
    together. Rows of F and columns of D need not be normalised.

    Parameters
    ----------
    F : array of shape (n, r)
    D : array of shape (r, k)

    Returns
    -------
    ndarray of shape (n, k)

    Examples
    --------
    >>> D = np.array([[0.9, 0.2], [0.1, 0.8]])
    >>> simplex_least_squares(np.array([[0.9, 0.1], [0.55, 0.45], [0.1, 0.9]]), D).round(3)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]])
    """
    F, D = np.asarray(F, dtype=np.float64), np.asarray(D, dtype=np.float64)
    k = D.shape[1]
    gram, start = D.T @ D, F @ np.linalg.pinv(D).T > 0
    gram = gram + 1e-12 * np.trace(gram) * np.eye(k)  # for classes that no domain tells apart
    q, rows = np.empty((len(F), k)), max(1, 2**20 // k**2)
    for i in range(0, len(F), rows):
        f = F[i : i + rows]
        b = f @ D
        M = (
            gram + (1 + (f * f).sum(1))[:, None, None] - b[:, :, None] - b[:, None, :]
        )  # E'E + 11': (rows, k, k)
        q[i : i + rows] = _pivot(M, start[i : i + rows])
    return q


def _pivot(M: np.ndarray, passive: np.ndarray) -> np.ndarray:
    """u >= 0 with M u - 1 >= 0 and u'(M u - 1) = 0 for each positive definite M (n, k, k), scaled to sum 1.

    All that is infeasible changes sides; where that has not helped three times, the last of them alone (Murty).
    """
    n, k = passive.shape
    passive, u = passive.copy(), np.full((n, k), 1 / k)
    fewest, patience, open_ = np.full(n, k + 1), np.full(n, 3), np.arange(n)
    for _ in range(20 * k + 100):
        inside, part = passive[open_], M[open_]
        system = np.where(inside[:, :, None] & inside[:, None, :], part, 0)
        system[:, np.arange(k), np.arange(k)] += ~inside
        x = np.linalg.solve(system, inside[..., None].astype(M.dtype))[..., 0]
        slack = (part @ x[..., None])[..., 0] - 1
        bad = np.where(inside, x, slack) < -1e-10
        u[open_] = np.where(inside, x, 0)
        wrong = bad.sum(1)
        better = wrong < fewest[open_]
        patience[open_] = np.where(better, 3, patience[open_] - 1)
        fewest[open_] = np.minimum(fewest[open_], wrong)
        last = np.arange(k) == k - 1 - bad[:, ::-1].argmax(1)[:, None]
        passive[open_] ^= np.where((patience[open_] >= 0)[:, None], bad, bad & last)
        open_ = open_[wrong > 0]
        if not len(open_):
            break
    u = u.clip(0)
    return u / u.sum(1, keepdims=True)


def _factorise(A: np.ndarray, k: int, restarts: int, rng: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """A (m, r) ~ C (m, k) Q (k, r), the columns of both normalised, and the residual."""
    best: tuple[Any, ...] = ()
    for _ in range(restarts):
        nmf = NMF(k, init="random", solver="cd", tol=1e-5, max_iter=1000, random_state=draw_seed(rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the residual decides
            H = nmf.fit_transform(A.T)  # A' ~ H C': (r, k)
        scale = nmf.components_.sum(1)
        Q = _normalised((H * scale).T)
        rank = (int((Q.max(1) < DEAD).sum()), nmf.reconstruction_err_)
        if not best or rank < best[0]:
            best = rank, _normalised(nmf.components_.T), Q
    (dead, residual), C, Q = best
    if dead:
        warnings.warn(
            f"{dead} of {k} classes occur in no domain in any of {restarts} starts: lower n_classes",
            stacklevel=3,
        )
    return C, Q, float(residual)


# -- small parts -------------------------------------------------------------------------------------------------------


def _shares(c: np.ndarray, d: np.ndarray, m: int, r: int) -> np.ndarray:
    """p(c|d): (m, r)."""
    return _normalised(np.bincount(c * r + d, minlength=m * r).reshape(m, r).astype(np.float64))


def _normalised(matrix: np.ndarray) -> np.ndarray:
    """Columns that sum to 1; a column of zeros becomes uniform."""
    total = matrix.sum(0)
    return np.where(total > 0, matrix / np.where(total > 0, total, 1), 1 / len(matrix))


def _noise_level(A: np.ndarray, sizes: np.ndarray) -> float:
    """About the largest singular value of A's sampling error: the norms of its deviations over a row and a column."""
    variance = A * (1 - A) / sizes
    return float(np.sqrt(variance.sum(1).max()) + np.sqrt(variance.sum(0).max()))


def _domain_proba(X: np.ndarray, r: int, model: Any, shares: np.ndarray | None) -> np.ndarray:
    found = X if model is None else np.asarray(model.predict_proba(X))
    order = getattr(model, "classes_", np.arange(found.shape[1]))
    if found.ndim != 2 or found.shape[1] != len(order) or len(order) > r:
        raise ValueError(f"discriminator: predict_proba gave the shape {found.shape} for {r} domains")
    F = np.zeros((len(X), r))
    F[:, np.asarray(order, dtype=int)] = found
    if shares is not None:
        F = F / shares
    return F / F.sum(1, keepdims=True)


def _default_discriminator(X: np.ndarray, sizes: np.ndarray, cv: Any) -> Any:
    if X.ndim != 2:
        raise ValueError(
            f"X has the shape {X.shape}: give a discriminator that takes such X; the default wants (n, features)"
        )
    kept = 1 - 1 / (cv if isinstance(cv, int) else 5)
    # Early stopping holds out a tenth, stratified: at least one point of each domain, and one must remain.
    early = int(0.1 * kept * len(X)) >= len(sizes) and int(kept * sizes.min()) >= 2
    return make_pipeline(StandardScaler(), MLPClassifier((128, 64), alpha=1.0, early_stopping=early))


def _read_domains(domains: Any, n: int, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The different domains in order, and the number of each point's: (r,), (n,)."""
    if domains is None and (known is None or len(known) == 1):
        return np.zeros(1, dtype=int) if known is None else known, np.zeros(n, dtype=int)
    if domains is None:
        raise ValueError("domains is missing: give the domain of each point")
    ids = np.asarray(domains)
    if ids.shape != (n,):
        raise ValueError(f"domains has the shape {ids.shape}: give one for each of the {n} points")
    if ids.dtype.kind in "fO" and ((ids == np.array(None)) | (ids != ids)).any():
        raise ValueError("domains has missing values: name a domain for every point")
    try:
        seen, d = np.unique(ids, return_inverse=True)
    except TypeError:
        raise ValueError("domains mixes numbers and strings: make them all of one kind") from None
    if known is None:
        return seen, d
    unseen = [name for name in seen.tolist() if name not in set(known.tolist())]
    if unseen:
        raise ValueError(
            f"domains: {unseen[:3]} were not in fit; predict points of unknown domain apart, without domains"
        )
    return known, np.searchsorted(known, seen)[d]
