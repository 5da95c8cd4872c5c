"""Tuning by hiding known classes: the protocol of `unfused.label.tabular_ncd`, for any estimator that finds classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.model_selection import ParameterSampler
from sklearn.utils import _safe_indexing, check_random_state, get_tags, indexable
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from unfused.nn.estimators import check_whole, draw_seed, read_known, seeded
from unfused.nn.matching import clustering_accuracy

__all__ = ["HiddenClassSearchCV"]

METRICS: dict[str, Callable[[Any, Any], float]] = {
    "acc": clustering_accuracy,
    "nmi": normalized_mutual_info_score,
    "ari": adjusted_rand_score,
}


def _offers(name: str) -> Callable[[Any], bool]:
    def check(search: Any) -> bool:
        getattr(getattr(search, "best_estimator_", search.estimator), name)
        return True

    return check


class HiddenClassSearchCV(MetaEstimatorMixin, BaseEstimator):
    """Random search by hiding known classes: tunes what finds novel classes without a label of these.

    Each fold hides some of the known classes: their rows count as unlabelled, the others as labelled, and a candidate is
    scored by how well its clusters of the hidden rows match their classes.

    Parameters
    ----------
    estimator : NCD estimator
        Anything with `fit(X, y)`, y = -1 for novel rows, and `predict`; a pipeline too.
    param_distributions : dict or list of dict
        As for `RandomizedSearchCV`.
    n_iter : int, default=30
        Candidates.
    n_hidden_folds : int, default=3
    n_hidden_classes : int or None, default=None
        Classes hidden in a fold. None: as large a share of the known ones as the novel ones are of all, where their number
        is known, else a group of 1 / n_hidden_folds; at least 2. Folds overlap where there are too few classes.
    n_clusters_param : str or None, default="n_clusters"
        The estimator's parameter for the number of novel classes ("pbn__n_clusters" in a pipeline). Where its value is None
        the number is estimated inside each fold too; else a fold gets the number of classes that it hides.
    include_unlabelled : bool, default=False
        True adds the truly novel rows to those that are unlabelled in a fold, and their clusters to those sought.
    metric : {"acc", "nmi", "ari"} or callable (labels, clusters) -> float, default="acc"
        "acc": accuracy after Hungarian matching.
    error_score : float or "raise", default=nan
        Score of a fold in which the estimator raises an error.
    n_jobs : int or None, default=None
    random_state : int, RandomState or None, default=None
        Of the candidates, the folds, and of every `random_state` of the estimator that is None.

    Attributes
    ----------
    best_estimator_ : estimator
        Fitted with all known classes labelled, under its own number of clusters.
    best_params_, best_score_, best_index_
    cv_results_ : dict of arrays
        `params`, `mean_test_score`, `std_test_score`, `rank_test_score`, `split0_test_score`, ...
    hidden_classes_ : list of ndarray
        The classes that each fold hides.

    Notes
    -----
    A warning is given and nothing is searched where fewer than 3 classes are known: with two hidden none would be left.

    Examples
    --------
    >>> from unfused.label import NCDSpectralClustering
    >>> rng = np.random.default_rng(0)
    >>> truth = np.arange(300) % 6
    >>> X = 9 * np.eye(6)[truth] + rng.normal(size=(300, 6))
    >>> y = np.where(truth < 4, truth, -1)
    >>> spectral = NCDSpectralClustering(n_clusters=2)
    >>> search = HiddenClassSearchCV(spectral, {"u": [0.01, 0.5], "n_components": [2, 5]}, n_iter=3, random_state=0)
    >>> len(search.fit(X, y).cv_results_["params"]), clustering_accuracy(truth[y == -1], search.predict(X[y == -1]))
    (3, 1.0)
    """

    def __init__(
        self,
        estimator: Any,
        param_distributions: Any,
        *,
        n_iter: int = 30,
        n_hidden_folds: int = 3,
        n_hidden_classes: int | None = None,
        n_clusters_param: str | None = "n_clusters",
        include_unlabelled: bool = False,
        metric: Any = "acc",
        error_score: Any = np.nan,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.param_distributions = param_distributions
        self.n_iter = n_iter
        self.n_hidden_folds = n_hidden_folds
        self.n_hidden_classes = n_hidden_classes
        self.n_clusters_param = n_clusters_param
        self.include_unlabelled = include_unlabelled
        self.metric = metric
        self.error_score = error_score
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> HiddenClassSearchCV:
        """Search, then fit the best candidate to all rows.

        Parameters
        ----------
        X : array of shape (n_samples, n_features), or what the estimator takes
        y : array of shape (n_samples,), optional
            -1 (among strings None, NaN or "-1") for rows of novel classes.
        """
        score = METRICS.get(self.metric, self.metric) if isinstance(self.metric, str) else self.metric
        if not callable(score):
            raise ValueError(
                f"metric={self.metric!r}: choose one of {', '.join(METRICS)}, or give a function"
            )
        rng = check_random_state(self.random_state)
        X, y = indexable(X, y)
        classes, codes = read_known(y, len(X) if hasattr(X, "__len__") else X.shape[0])
        base = seeded(clone(self.estimator), rng)
        seeds = draw_seed(rng), draw_seed(rng)
        self.hidden_classes_: list[np.ndarray] = []
        self.best_params_: dict[str, Any] = {}
        if len(classes) < 3:
            warnings.warn(
                f"y has {len(classes)} known classes, hiding some takes 3: nothing is searched, the estimator fitted as it is",
                stacklevel=2,
            )
        else:
            self._search(base, X, codes, classes, score, *seeds)
        self.best_estimator_ = clone(base).set_params(**clone(self.best_params_, safe=False)).fit(X, y)
        return self

    def _search(
        self, base: Any, X: Any, codes: np.ndarray, classes: np.ndarray, score: Any, *seeds: int
    ) -> None:
        given = base.get_params().get(self.n_clusters_param) if self.n_clusters_param else None
        folds = self._hide(len(classes), given, seeds[0])
        self.hidden_classes_ = [classes[hidden] for hidden in folds]
        candidates = list(ParameterSampler(self.param_distributions, self.n_iter, random_state=seeds[1]))

        def run(params: Mapping[str, Any], hidden: np.ndarray) -> float | Exception:
            below = np.isin(codes, hidden)
            used = np.flatnonzero((codes >= 0) | self.include_unlabelled)
            model = clone(base).set_params(**clone(dict(params), safe=False))
            if given is not None and self.n_clusters_param:
                more = given if self.include_unlabelled else 0
                model.set_params(**{self.n_clusters_param: len(hidden) + more})
            try:
                model.fit(_safe_indexing(X, used), np.where(below, -1, codes)[used])
                return float(score(codes[below], model.predict(_safe_indexing(X, np.flatnonzero(below)))))
            except Exception as error:
                return error

        found = Parallel(n_jobs=self.n_jobs)(
            delayed(run)(params, hidden) for params in candidates for hidden in folds
        )
        errors = [value for value in found if isinstance(value, Exception)]
        if errors and (self.error_score == "raise" or len(errors) == len(found)):
            raise errors[0]
        if errors:
            message = f"{len(errors)} of {len(found)} fits failed and score {self.error_score}; the first: {errors[0]!r}"
            warnings.warn(message, FitFailedWarning, stacklevel=3)
        values = np.array(
            [self.error_score if isinstance(value, Exception) else value for value in found], dtype=float
        )
        scores = values.reshape(len(candidates), len(folds))
        mean = scores.mean(1)
        if np.isnan(mean).all():
            raise ValueError(
                f"every candidate failed in some fold; the first error: {errors[0]!r}"
            ) from errors[0]
        order = np.where(np.isnan(mean), -np.inf, mean)
        self.cv_results_ = {
            "params": candidates,
            **{f"split{i}_test_score": scores[:, i] for i in range(len(folds))},
            "mean_test_score": mean,
            "std_test_score": scores.std(1),
            "rank_test_score": 1 + (order[:, None] < order).sum(1),
        }
        self.best_index_ = int(order.argmax())
        self.best_params_, self.best_score_ = candidates[self.best_index_], float(mean[self.best_index_])

    def _hide(self, known: int, novel: int | None, seed: int) -> list[np.ndarray]:
        """Groups of the numbers 0..known-1: disjoint where the classes suffice, else each class about as often."""
        folds, size = self.n_hidden_folds, self.n_hidden_classes
        check_whole(self, n_hidden_folds=1)
        if size is None:
            size = round(known * novel / (known + novel)) if novel else round(known / folds)
            size = max(2, min(size, known - 2))
        elif not 1 <= size < known:
            raise ValueError(f"n_hidden_classes={size} of {known} known classes: give 1 to {known - 1}")
        order, rng = np.empty(0, dtype=int), np.random.RandomState(seed)
        while len(order) < folds * size:
            rest = rng.permutation(known)
            overlap = len(order) % size
            if overlap:  # a fold must not hide a class twice
                rest = rest[np.argsort(np.isin(rest, order[-overlap:]), kind="stable")]
            order = np.append(order, rest)
        return [np.sort(order[i * size : (i + 1) * size]) for i in range(folds)]

    @available_if(_offers("predict"))
    def predict(self, X: Any) -> np.ndarray:
        """Of `best_estimator_`."""
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_.predict(X)

    @available_if(_offers("transform"))
    def transform(self, X: Any) -> np.ndarray:
        """Of `best_estimator_`."""
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_.transform(X)

    @property
    def n_features_in_(self) -> int:
        return self._of_best("n_features_in_")

    @property
    def feature_names_in_(self) -> np.ndarray:
        return self._of_best("feature_names_in_")

    def _of_best(self, name: str) -> Any:
        if not hasattr(self, "best_estimator_"):
            raise AttributeError(f"{type(self).__name__} has no {name} before fit")
        return getattr(self.best_estimator_, name)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.input_tags.pairwise, tags.input_tags.sparse = inner.input_tags.pairwise, inner.input_tags.sparse
        tags.non_deterministic, tags.transformer_tags = inner.non_deterministic, inner.transformer_tags
        return tags
