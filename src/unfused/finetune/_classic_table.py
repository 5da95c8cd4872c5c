"""Rows of a table without a network: logistic regression, or gradient-boosted trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from unfused.finetune._logistic import check_classes, choose_penalty, folds_of, logistic, losses_of, lowest

__all__ = ["ClassicTable"]

LOGISTIC, BOOSTING = "logistic regression", "gradient boosting"
MOST_COLUMNS = 2000  # beyond, trees take minutes and find no more
LEAST_ROWS = (
    50  # of fewer, folds cannot tell which is better: on 5 draws of 15 wines the choice gave .87 for .96
)
ITERATIONS = 100


class ClassicTable(ClassifierMixin, BaseEstimator):
    """Logistic regression on standardised and one-hot columns, or gradient-boosted trees on the columns themselves.

    Parameters
    ----------
    names : sequence of int, default=()
        Columns that hold codes of names (whole numbers from 0 to 254); the others hold numbers, NaN where missing.
    representation : {"auto", "logistic regression", "gradient boosting"}, default="auto"
        "auto" takes the one with the lower cross-validated log loss. Trees are left out below 50 rows and beyond 2,000
        columns.
    seed : int, default=0
        Of the folds and the trees.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    representation_ : str
        The one in use.
    losses_ : dict of str to float
        Cross-validated log loss of each.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(60, 3))
    >>> x[::7, 2] = np.nan
    >>> model = ClassicTable().fit(x, (x[:, 0] > 0).astype(int))
    >>> model.predict([[2.0, 0.0, np.nan], [-2.0, 0.0, 1.0]]).tolist(), sorted(model.losses_)
    ([1, 0], ['gradient boosting', 'logistic regression'])
    """

    def __init__(self, names: Sequence[int] = (), representation: str = "auto", seed: int = 0) -> None:
        self.names = names
        self.representation = representation
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Any = None) -> ClassicTable:
        """Choose and train.

        Parameters
        ----------
        X : array of shape (n, columns)
        y : array of shape (n,)
            Labels, at least two classes.
        groups : array of shape (n,), optional
            Sites, devices ...: a group is never on both sides of a fold.
        """
        x, y = np.asarray(X, np.float64), np.asarray(y)
        if x.ndim != 2 or len(x) != len(y):
            raise ValueError(f"X of shape {x.shape} with {len(y)} labels: give (n, columns) and n labels")
        check_classes(y)
        if self.representation not in ("auto", LOGISTIC, BOOSTING):
            raise ValueError(
                f"representation={self.representation!r}: choose 'auto', {LOGISTIC!r} or {BOOSTING!r}"
            )
        wanted = (LOGISTIC, BOOSTING) if self.representation == "auto" else (self.representation,)
        if self.representation == "auto" and (x.shape[1] > MOST_COLUMNS or len(x) < LEAST_ROWS):
            wanted = (LOGISTIC,)
        self.losses_, made = {}, {}
        if LOGISTIC in wanted:
            vector = self._vectorizer(x.shape[1])
            penalty, self.losses_[LOGISTIC] = choose_penalty(vector.fit_transform(x), y, groups, self.seed)
            made[LOGISTIC] = lambda: make_pipeline(vector, logistic(penalty)).fit(x, y)
        if BOOSTING in wanted:
            count, self.losses_[BOOSTING] = self._choose_iterations(x, y, groups)
            made[BOOSTING] = lambda: self._trees(len(x), count).fit(x, y)
        self.representation_ = min(self.losses_, key=self.losses_.__getitem__)
        self.model_ = made[self.representation_]()
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, (n, n_classes), in the order of `classes_`."""
        check_is_fitted(self, "model_")
        return self.model_.predict_proba(np.asarray(X, np.float64))

    def predict(self, X: Any) -> np.ndarray:
        """Labels, (n,)."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def _vectorizer(self, columns: int) -> Any:
        from sklearn.compose import ColumnTransformer
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import OneHotEncoder

        names = sorted(self.names)
        numbers = sorted(set(range(columns)) - set(names))
        impute = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
        spell = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
        return ColumnTransformer([("numbers", impute, numbers), ("names", spell, names)])

    def _trees(self, rows: int, count: int) -> Any:
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(
            max_iter=count,
            min_samples_leaf=int(
                np.clip(rows // 20, 1, 20)
            ),  # the default, 20, would not split few labels at all
            categorical_features=sorted(self.names) or None,
            early_stopping=False,
            random_state=self.seed,
        )

    def _choose_iterations(self, x: np.ndarray, y: np.ndarray, groups: Any) -> tuple[int, float]:
        """After how many trees the cross-validated log loss is lowest, and that loss."""
        losses = []
        for train, test in folds_of(y, groups, self.seed):
            trees = self._trees(len(train), ITERATIONS).fit(x[train], y[train])
            stages = trees.staged_predict_proba(x[test])
            losses.append(np.stack([losses_of(stage, trees.classes_, y[test]) for stage in stages], 1))
        best, loss = lowest(losses)
        return (ITERATIONS if best is None else best + 1), loss
