"""Texts without a network: TF-IDF and logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from unfused.finetune._logistic import check_classes, folds_of, losses_of, lowest

__all__ = ["ClassicText", "tf_idf"]

REPRESENTATIONS = ("words", "characters", "both")
PENALTIES = (
    1.0,
    10.0,
    100.0,
    1000.0,
)  # of C; rows have unit length, so they are weaker than for standardised features
DEFAULT_C = 10.0  # where there are too few points to choose
# Many points: the choice is made on two folds and the leading components, the fit itself on all.
MANY, LEADING = 500, 256
EXACT = 3000  # more texts than this are rotated to so many components, which is no longer exact
CHUNK = 4096


def tf_idf(representation: str) -> Any:
    """The vectoriser of "words" (one and two) or "characters" (two to five, within words), of "both" together."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    same: dict[str, Any] = {"sublinear_tf": True, "strip_accents": None, "dtype": np.float32}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b|[^\w\s]", **same)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **same)
    if representation == "words":
        return words
    if representation == "characters":
        return characters
    half = 0.5**0.5
    return FeatureUnion(
        [("words", words), ("characters", characters)],
        transformer_weights={"words": half, "characters": half},
    )


class ClassicText(ClassifierMixin, BaseEstimator):
    """Logistic regression on TF-IDF of words or characters.

    Parameters
    ----------
    representation : {"auto", "words", "characters", "both"}, default="auto"
        "auto" takes the one with the lowest cross-validated log loss.
    seed : int, default=0
        Of the folds.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
    representation_ : str
        The one in use.
    losses_ : dict of str to float
        Cross-validated log loss of each.
    penalty_ : float
        The chosen C of the logistic regression.

    Notes
    -----
    Its input are texts, so scikit-learn's `check_estimator` does not apply. The regression is fitted on the texts' inner
    products: the same solution as on the hundred thousand features, in a fraction of the time.

    Examples
    --------
    >>> texts = ["a red fox", "the red car", "red again", "so green", "a green tree", "green and green"]
    >>> ClassicText().fit(texts, ["r", "r", "r", "g", "g", "g"]).predict(["red fox", "green car"])
    array(['r', 'g'], dtype='<U1')
    """

    def __init__(self, representation: str = "auto", seed: int = 0) -> None:
        self.representation = representation
        self.seed = seed

    def fit(self, X: Sequence[str], y: Any, groups: Any = None) -> ClassicText:
        """Choose and train.

        Parameters
        ----------
        X : sequence of n texts
        y : array of shape (n,)
            Labels, at least two classes.
        groups : array of shape (n,), optional
            Authors, sources ...: a group is never on both sides of a fold.
        """
        texts, y = list(X), np.asarray(y)
        if len(texts) != len(y):
            raise ValueError(f"X has {len(texts)} texts for {len(y)} labels")
        check_classes(y)
        if self.representation not in ("auto", *REPRESENTATIONS):
            raise ValueError(
                f"representation={self.representation!r}: choose 'auto' or one of {', '.join(REPRESENTATIONS)}"
            )
        names = REPRESENTATIONS if self.representation == "auto" else (self.representation,)
        folds = list(folds_of(y, groups, self.seed))
        found = {}
        for name in names:
            vectorizer = tf_idf(name)
            try:
                x = vectorizer.fit_transform(texts)
            except ValueError:  # an empty vocabulary: nothing but blanks
                continue
            rotated, rotation = _rotate(x, self.seed)
            found[name] = (vectorizer, rotated, rotation, *_choose(rotated, y, folds))
        if not found:
            raise ValueError("X holds no words: there is nothing to tell the texts apart by")
        self.losses_ = {name: loss for name, (*_, loss) in found.items()}
        self.representation_ = min(found, key=self.losses_.__getitem__)
        self._vectorizer, rotated, self._rotation, self.penalty_, _ = found[self.representation_]
        self.model_ = LogisticRegression(C=self.penalty_, max_iter=300).fit(rotated, y)
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X: Sequence[str]) -> np.ndarray:
        """Class probabilities, (n, n_classes), in the order of `classes_`."""
        check_is_fitted(self, "model_")
        texts = list(X)
        blocks = [
            self.model_.predict_proba(
                self._vectorizer.transform(texts[start : start + CHUNK]) @ self._rotation
            )
            for start in range(0, len(texts), CHUNK)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, len(self.classes_)))

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """Labels, (n,)."""
        return self.classes_[self.predict_proba(X).argmax(1)]


def _rotate(x: Any, seed: int) -> tuple[np.ndarray, Any]:
    """Rows of a sparse matrix with the same inner products in few dimensions, and the map from its columns to them."""
    if x.shape[0] > EXACT:
        from sklearn.decomposition import TruncatedSVD

        svd = TruncatedSVD(min(1000, x.shape[1] - 1), random_state=seed).fit(x)
        return svd.transform(x), svd.components_.T
    values, vectors = np.linalg.eigh((x @ x.T).toarray().astype(np.float64))
    values, vectors = values[::-1], vectors[:, ::-1]  # the leading ones first
    kept = values > 1e-6 * values[0]
    # X' U / sqrt(lambda): orthonormal columns, on which X has the coordinates U sqrt(lambda)
    rotation = x.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return vectors[:, kept] * np.sqrt(values[kept]), rotation


def _choose(
    x: np.ndarray, y: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, float]:
    """The C with the lowest cross-validated log loss, and that loss."""
    if len(x) > MANY:
        x, folds = x[:, :LEADING], folds[:2]
    losses = []
    for train, test in folds:
        model = LogisticRegression(max_iter=100, tol=1e-3, warm_start=True)
        columns = []
        for C in PENALTIES:
            model.set_params(C=C).fit(x[train], y[train])
            columns.append(losses_of(model.predict_proba(x[test]), model.classes_, y[test]))
        losses.append(np.stack(columns, 1))
    best, loss = lowest(losses)
    return (DEFAULT_C if best is None else PENALTIES[best]), loss
