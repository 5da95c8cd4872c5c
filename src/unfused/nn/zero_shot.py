"""Classifiers on frozen features, with or without the text features of their classes.

What the estimators of `unfused.label` share: unit rows, one check of text features and class names, blocks of rows that
bound memory, and the scikit-learn face of anything that gives logits. NumPy and scikit-learn only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

__all__ = [
    "FLOATS",
    "LogitClassifier",
    "align_classes",
    "check_labels",
    "check_text_features",
    "class_labels",
    "label_index",
    "log_softmax",
    "row_blocks",
    "unit_rows",
]

FLOATS = [np.float64, np.float32]  # what `validate_data` leaves as it is
BUDGET = 1 << 22  # numbers in the largest temporary array


def unit_rows(X: np.ndarray) -> np.ndarray:
    """Every row divided by its Euclidean norm; a row of norm 0 stays 0.

    Examples
    --------
    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    largest = np.abs(X).max(axis=1, keepdims=True, initial=0)  # first: squares of large numbers overflow
    X = X / np.where(largest > 0, largest, 1).astype(X.dtype)
    norm = np.sqrt(np.einsum("nd,nd->n", X, X))[:, None]
    return X / np.where(norm > 0, norm, 1).astype(X.dtype)


def row_blocks(rows: int, width: int, budget: int = BUDGET) -> Iterator[slice]:
    """Slices of consecutive rows, so many that a temporary array of `width` numbers a row stays under `budget`.

    Examples
    --------
    >>> [(block.start, block.stop) for block in row_blocks(5, width=10, budget=20)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, budget // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of every row."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def class_labels(classes: Any, count: int | None = None, name: str = "classes") -> np.ndarray:
    """`classes` as an array of distinct labels, none of them an empty text.

    Parameters
    ----------
    classes : array-like of shape (n_classes,)
    count : int, optional
        How many there have to be.
    name : str
        Of the argument, for the message.

    Raises
    ------
    ValueError
        If labels are repeated, empty, or of another number.
    """
    labels = np.asarray(classes)
    if labels.ndim != 1:
        raise ValueError(f"{name} has the shape {labels.shape}: give one label a class")
    if count is not None and len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} labels, text_features has {count} rows: give as many")
    if labels.dtype.kind in "OUS" and any(not str(label).strip() for label in labels):
        raise ValueError(f"{name} holds an empty name: give every class one")
    unique, times = np.unique(labels, return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"{name} holds {unique[times > 1].tolist()[0]!r} more than once: every class needs its own"
        )
    return labels


def check_text_features(
    text_features: Any, n_features: int, normalize: bool = True, name: str = "text_features"
) -> np.ndarray:
    """Text features as finite float64 rows of norm 1, one a class.

    Parameters
    ----------
    text_features : array-like of shape (n_classes, n_features)
        Tensors do as well.
    n_features : int
        Columns of X.
    normalize : bool, default=True
        False leaves the norms as they are.
    name : str
        Of the argument, for the message.

    Raises
    ------
    ValueError
        If they are not two-dimensional and finite, have another number of columns than X, or a row of norm 0.
    """
    if hasattr(text_features, "detach"):
        text_features = text_features.detach().float().cpu().numpy()
    text = check_array(text_features, dtype=np.float64, input_name=name)
    if text.shape[1] != n_features:
        raise ValueError(
            f"{name} has {text.shape[1]} columns, X has {n_features} features: encode both with one model"
        )
    if len(zero := np.flatnonzero(~text.any(axis=1))):
        raise ValueError(f"{name}[{zero[0]}] has norm 0: it names no direction")
    return unit_rows(text) if normalize else text


def check_labels(y: np.ndarray) -> None:
    """scikit-learn's check of class labels, without its warning that so many classes might be numbers: one shot is usual."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")
        check_classification_targets(y)


def align_classes(
    labels: np.ndarray | None, text: np.ndarray | None, classes: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """The sorted classes, and the text features in their order.

    Parameters
    ----------
    labels : ndarray or None
        Those of the samples, if they have any.
    text : ndarray of shape (n_classes, n_features) or None
    classes : array-like of shape (n_classes,) or None
        Labels of the rows of `text`; None: the sorted labels of the samples, or 0, 1, ... where there are none.

    Raises
    ------
    ValueError
        If classes and text features are not as many, there is one class alone, or a name is empty or repeated.
    """
    if classes is not None:
        seen = class_labels(classes, None if text is None else len(text))
    elif labels is not None:
        seen = np.unique(labels)
    else:
        assert text is not None
        seen = np.arange(len(text))
    if len(seen) < 2:
        raise ValueError(f"y holds one class, {seen.tolist()[0]!r}: at least two are needed")
    if text is not None and len(text) != len(seen):
        raise ValueError(
            f"text_features has {len(text)} rows, y has {len(seen)} classes: give `classes`, the labels of the rows"
        )
    order = np.argsort(seen)
    return seen[order], None if text is None else text[order]


def label_index(y: np.ndarray, classes: np.ndarray, name: str = "y") -> np.ndarray:
    """Position of each label in the sorted `classes`; a ValueError where it is not among them."""
    unknown = ~np.isin(y, classes)
    if unknown.any():
        raise ValueError(f"{name} holds {y[unknown].tolist()[0]!r}, which is not among the classes")
    return np.searchsorted(classes, y)


class LogitClassifier(ClassifierMixin, BaseEstimator):
    """The predicting half of a classifier: a subclass gives `_logits` of a block of rows.

    `predict` walks over blocks of rows, so that its memory is bounded however many rows there are (X may be a
    `numpy.memmap`).
    """

    classes_: np.ndarray

    def _logits(self, X: np.ndarray) -> np.ndarray:
        """Logits (n, n_classes) of checked rows (n, n_features)."""
        raise NotImplementedError

    def _row_width(self) -> int:
        """How many numbers `_logits` needs for a row; sets the size of the blocks."""
        return len(self.classes_) + self.n_features_in_  # type: ignore[attr-defined]

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=FLOATS)

    def _validation(self, X_val: Any, y_val: Any) -> tuple[np.ndarray, np.ndarray]:
        """Checked rows of validation data, and the positions of their labels in `classes_`."""
        if y_val is None:
            raise ValueError("y_val is None: X_val needs its labels")
        X, y = validate_data(self, X_val, y_val, reset=False, dtype=FLOATS)
        return X, label_index(y, self.classes_, "y_val")

    def _all_logits(self, X: Any) -> np.ndarray:
        X = self._checked(X)
        blocks = row_blocks(len(X), self._row_width())
        return np.concatenate([self._logits(np.asarray(X[rows])) for rows in blocks])

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits of every class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of `classes_`; with two classes (n_samples,), the second's logit less the first's.
        """
        logits = self._all_logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict(self, X: Any) -> np.ndarray:
        """The class of the largest logit.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        X = self._checked(X)
        best = np.empty(len(X), np.intp)
        for rows in row_blocks(len(X), self._row_width()):
            best[rows] = self._logits(np.asarray(X[rows])).argmax(axis=1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Softmax of the logits, shape (n_samples, n_classes)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-softmax of the logits, shape (n_samples, n_classes)."""
        return log_softmax(self._all_logits(X).astype(np.float64))  # exp(-200) is 0 in single precision
