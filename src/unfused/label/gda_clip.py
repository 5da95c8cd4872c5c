"""GDA-CLIP: a training-free classifier on frozen image-text features.

Every class is a Gaussian and all share one covariance, so Bayes' rule gives a linear classifier in closed form,
    w_c = P mu_c,   b_c = log pi_c - mu_c' P mu_c / 2,   P = D ((N-1) S + tr(S) I)^-1   (Kubokawa and Srivastava),
and its scores are added to the zero-shot ones: `logits = scale x W_t + alpha (x W + b)`. No gradient, one pass over the few
labelled features; both parts are linear and so is the result. alpha is the best of {0, 1e-4, ..., 1e5} on validation data
or, without them, on the support with every sample (all views of a picture) left out in turn, which has a closed form too.
The paper's grid has no 0, though with one shot and no views anything else can be worse than zero-shot, and it ends at 100,
too little where there are many more samples than features, as P shrinks like D/N.

- *Unlabelled*: expectation-maximisation of the same mixture from zero-shot responsibilities, the text a prior in every
  round. Here the precision is (S + ridge)^-1, since P above, meant for an alpha, is about D/N of it.
- *New classes* that have a text feature w and no picture: the k samples nearest to w stand in; their mean is taken with
  copies of w, their scatter around w.
- *Imbalanced*: the prior stays uniform.

Reference: A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024, arXiv:2402.04087.
Needs: few labels or unlabelled data, features, optionally text features.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from unfused.data.views import encode_views
from unfused.nn.gaussian import (
    Moments,
    class_moments,
    discriminant,
    ks_discriminant,
    leave_one_out,
    surrogate_precision,
)
from unfused.nn.zero_shot import (
    FLOATS,
    LogitClassifier,
    align_classes,
    check_labels,
    check_text_features,
    class_labels,
    label_index,
    log_softmax,
    row_blocks,
    unit_rows,
)

__all__ = ["GDAClassifier", "encode_views"]

ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
NEVER = -1e9  # the intercept of a class that nothing is known of


class GDAClassifier(LogitClassifier):
    """Gaussian discriminant analysis on frozen features, added to the zero-shot classifier where there is one.

    Parameters
    ----------
    text_features : array-like of shape (n_classes, n_features), optional
        One row a class, normalised here. None: the Gaussian classifier alone.
    classes : array-like of shape (n_classes,), optional
        Labels in the order of the rows of `text_features`. By default the sorted labels of y, which then have to be as
        many; without y, 0, 1, ... A class without samples is added as `add_classes` does.
    alpha : float, "grid" or array-like, default="grid"
        Weight of the Gaussian scores. "grid" chooses among 0 and ten powers of ten, an array among its entries (the
        first of the best), on `X_val`, else leaving out. Its scale depends on N and n_features. Without text features 1.
    logit_scale : float, default=100.0
        Of the zero-shot logits: CLIP's 100; `model.logit_scale.exp()` of another.
    shrinkage : {"ks", "pooled"}, default="ks"
        The precision: as above, or the pseudo-inverse of the mean of the classes' covariances (the paper's choice for
        base classes when new ones will be added). "pooled" cannot leave out and has no `partial_fit`.
    priors : "uniform", "empirical" or array-like of shape (n_classes,), default="uniform"
        Class probabilities, an array in sorted order of the classes.
    normalize : bool, default=True
        Divide rows of X by their norms, as the text features. A row of norm 0 stays 0. False (for the Gaussian classifier
        on features whose norm says something) leaves X as it is.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted.
    coef_, intercept_ : ndarray of shape (n_classes, n_features), (n_classes,)
        The whole classifier as one linear layer, on normalised rows.
    image_coef_, image_intercept_ : ndarray
        The Gaussian part of it, before alpha.
    alpha_ : float
    alpha_scores_ : ndarray of shape (n_alphas,)
        Accuracy for each candidate; absent where alpha was not chosen.
    text_features_ : ndarray of shape (n_classes, n_features) or None
    counts_, means_ : ndarray of shape (n_classes,), (n_classes, n_features)
    scatter_ : ndarray of shape (n_features, n_features)
        Sum of outer products of residuals; not with "pooled".
    n_iter_ : int
        Rounds of EM; only after `fit_unlabeled`.
    n_features_in_, feature_names_in_

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W = np.eye(3, 8)                                    # what the text encoder says
    >>> X = rng.normal(size=(30, 8)) * 0.5 + 2 * np.eye(3, 8)[np.arange(30) % 3]
    >>> y = np.array(["ant", "bee", "cow"])[np.arange(30) % 3]
    >>> clf = GDAClassifier(W, logit_scale=10.0).fit(X, y)
    >>> clf.predict([[0, 2, 0, 0, 0, 0, 0, 0.3]]), clf.coef_.shape
    (array(['bee'], dtype='<U3'), (3, 8))
    >>> float(clf.fit_unlabeled(X).score(X, np.arange(30) % 3)) > 0.9
    True
    """

    text_features_: Any

    def __init__(
        self,
        text_features: Any = None,
        *,
        classes: Any = None,
        alpha: Any = "grid",
        logit_scale: float = 100.0,
        shrinkage: str = "ks",
        priors: Any = "uniform",
        normalize: bool = True,
    ) -> None:
        self.text_features = text_features
        self.classes = classes
        self.alpha = alpha
        self.logit_scale = logit_scale
        self.shrinkage = shrinkage
        self.priors = priors
        self.normalize = normalize

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.text_features is None
        return tags

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        groups: Any = None,
        text_features: Any = None,
        X_val: Any = None,
        y_val: Any = None,
    ) -> GDAClassifier:
        """Fit to a few labelled features; with text features and no y, `fit_unlabeled`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Each augmented view is a sample of its own (`encode_views` makes them).
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), optional
            2 is the sample twice; samples of weight 0 are left out.
        groups : array-like of shape (n_samples,), optional
            Which picture each row is a view of: left out together when alpha is chosen on the support.
        text_features : array-like, optional
            Instead of the constructor's.
        X_val, y_val : array-like, optional
            Labelled validation data to choose alpha on.

        Raises
        ------
        ValueError
            For what the parameters and X do not allow: NaN, one class, text features of another width, repeated names.
        """
        if y is None and (self.text_features is not None or text_features is not None):
            return self.fit_unlabeled(X, text_features=text_features)
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_labels(y)
        weight, keep = None, slice(None)
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            keep = weight > 0
            weight = weight[keep]
        if groups is not None:
            check_consistent_length(X, groups)
            groups = np.asarray(groups)[keep]
        X, y = self._rows(X[keep]), y[keep]
        self._reset(y, text_features)
        index = label_index(y, self.classes_)
        moments = class_moments(X, index, len(self.classes_), weight)
        if self.shrinkage == "pooled":
            self._set_moments(moments, _pooled(X, index, moments, weight))
            del self.scatter_
        else:
            self._set_moments(moments)
        if len(absent := np.flatnonzero(moments.counts == 0)):
            self._stand_in(X, absent)
        self._choose_alpha(X_val, y_val, (X, index, groups, weight))
        return self._merge()

    @available_if(lambda self: self.shrinkage == "ks")
    def partial_fit(
        self,
        X: Any,
        y: Any,
        classes: Any = None,
        sample_weight: Any = None,
        *,
        text_features: Any = None,
        X_val: Any = None,
        y_val: Any = None,
    ) -> GDAClassifier:
        """Add samples; the result is that of `fit` on all of them, as moments are all that is kept.

        Parameters
        ----------
        X, y, sample_weight, text_features, X_val, y_val
            As in `fit`. With text features, alpha has to be a number or `X_val` given.
        classes : array-like of shape (n_classes,)
            All labels there will be; needed at the first call. A class is not predicted before its first sample.
        """
        self._check_parameters()
        first = not hasattr(self, "counts_")
        X, y = validate_data(self, X, y, dtype=FLOATS, reset=first)
        check_labels(y)
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if first:
            labels = self.classes if classes is None else classes
            if labels is None:
                raise ValueError(
                    "classes is None: the first call of partial_fit needs all labels there will be"
                )
            self._reset(np.unique(class_labels(labels)), text_features)
        index = label_index(y, self.classes_)
        moments = class_moments(self._rows(X), index, len(self.classes_), weight)
        if first:
            self._set_moments(moments)
        else:
            before = self.image_coef_, self.image_intercept_
            self._set_moments(Moments(self.counts_, self.means_, self.scatter_).merge(moments))
            unseen = self.counts_ == 0  # what `add_classes` made of a class stays until its first sample
            self.image_coef_[unseen], self.image_intercept_[unseen] = before[0][unseen], before[1][unseen]
        self._choose_alpha(X_val, y_val, None)
        return self._merge()

    def fit_unlabeled(
        self,
        X: Any,
        *,
        text_features: Any = None,
        max_iter: int = 10,
        tol: float = 1e-4,
        text_in_e_step: bool = True,
        ridge: float | None = 1e-3,
        ensemble: bool = True,
    ) -> GDAClassifier:
        """Fit to features without labels: expectation-maximisation from the zero-shot classifier.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        text_features : array-like of shape (n_classes, n_features), optional
            Instead of the constructor's; one of them is needed.
        max_iter : int, default=10
        tol : float, default=1e-4
            Stops once no mean moves by more than this times the features' spread.
        text_in_e_step : bool, default=True
            Responsibilities from `scale x W_t + x W + b` (safer), or from `x W + b` alone.
        ridge : float or None, default=1e-3
            Added to the diagonal of S, times its mean. None: the few-shot form of the precision with N samples.
        ensemble : bool, default=True
            Whether the zero-shot logits are in the result. If so alpha (1 where it is "grid") weighs the other part.
        """
        self._check_parameters()
        if max_iter < 1:
            raise ValueError(f"max_iter={max_iter}: at least 1 round is needed")
        if ridge is not None and not ridge > 0:
            raise ValueError(f"ridge={ridge}: give a positive number, or None for the few-shot precision")
        X = self._rows(validate_data(self, X, dtype=FLOATS))
        self._reset(None, text_features)
        text = float(self.logit_scale) * self.text_features_
        centre = X.mean(axis=0, dtype=np.float64)
        total = class_moments(X, np.zeros(len(X), int), 1).scatter  # around the centre
        spread = np.sqrt(np.trace(total) / len(X))
        means = _best_rows(X, self.text_features_, 1)[:, 0]
        means = X[means].astype(np.float64)  # what a class keeps to that no sample leans to
        coef, intercept = text, np.zeros(len(text))
        log_prior = self._log_prior(np.ones(len(text)))
        for self.n_iter_ in range(1, max_iter + 1):
            counts, sums = np.zeros(len(text)), np.zeros_like(means)
            for rows in row_blocks(len(X), 3 * len(text)):
                share = np.exp(log_softmax(X[rows] @ coef.T + intercept))  # (rows, n_classes)
                counts += share.sum(axis=0)
                sums += share.T @ X[rows]
            before, alive = means, counts > 1e-8 * len(X)
            means = np.where(alive[:, None], sums / np.where(alive, counts, 1)[:, None], before)
            between = (means - centre) * np.sqrt(np.where(alive, counts, 0))[:, None]
            scatter = total - between.T @ between  # sum_ic r_ic (x_i - mu_c)(x_i - mu_c)'
            moments = Moments(counts, means, scatter)
            if ridge is None:
                coef, intercept = ks_discriminant(moments, log_prior)
            else:
                cov = scatter / len(X)
                added = max(ridge * np.trace(cov) / len(cov), 1e-12)
                coef, intercept = discriminant(
                    means, np.linalg.inv(cov + added * np.eye(len(cov))), log_prior
                )
            self.image_coef_, self.image_intercept_ = coef, intercept
            coef = text + coef if text_in_e_step else coef
            if np.abs(means - before).max() <= tol * spread:
                break
        self.counts_, self.means_, self.scatter_ = counts, means, scatter
        self.alpha_ = 1.0 if np.ndim(self.alpha) or isinstance(self.alpha, str) else float(self.alpha)
        return self._merge(text=ensemble)

    def add_classes(
        self, X: Any, text_features: Any, classes: Any = None, *, k: int = 64, text_copies: int = 16
    ) -> GDAClassifier:
        """Add classes that have a text feature and no picture.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples of the old classes (those of `fit`, views included): what stands in is chosen from them.
        text_features : array-like of shape (n_new, n_features)
        classes : array-like of shape (n_new,), optional
            Their labels; by default the next integers.
        k : int, default=64
            Samples that stand in for a class, those with the largest cosine to its text; all where there are fewer.
        text_copies : int, default=16
            How often the text feature counts in the class's mean.
        """
        check_is_fitted(self)
        if self.text_features_ is None:
            raise ValueError(
                "text_features is None: new classes by text need text features of the old ones, too"
            )
        if k < 1 or text_copies < 0:
            raise ValueError(f"k={k}, text_copies={text_copies}: give at least 1 sample and 0 copies")
        X = self._rows(validate_data(self, X, reset=False, dtype=FLOATS))
        text = check_text_features(text_features, self.n_features_in_, self.normalize)
        if classes is None:
            if self.classes_.dtype.kind not in "iu":
                raise ValueError("classes is None: give the new classes' names")
            classes = self.classes_.max() + 1 + np.arange(len(text))
        every = class_labels(np.concatenate([self.classes_, class_labels(classes, len(text))]))
        new = np.arange(len(self.classes_), len(every))
        for name in ("counts_", "means_", "image_coef_", "image_intercept_"):
            was = getattr(self, name)
            setattr(self, name, np.concatenate([was, np.zeros((len(text), *was.shape[1:]))]))
        self.text_features_ = np.concatenate([self.text_features_, text])
        self._stand_in(X, new, k, text_copies)
        order = np.argsort(every, kind="stable")
        for name in ("counts_", "means_", "image_coef_", "image_intercept_", "text_features_"):
            setattr(self, name, getattr(self, name)[order])
        self.classes_ = every[order]
        return self._merge()

    def _logits(self, X: np.ndarray) -> np.ndarray:
        X = self._rows(X)
        return X @ self.coef_.T.astype(X.dtype) + self.intercept_.astype(X.dtype)

    def _rows(self, X: np.ndarray) -> np.ndarray:
        return unit_rows(X) if self.normalize else X

    def _check_parameters(self) -> None:
        if self.shrinkage not in ("ks", "pooled"):
            raise ValueError(f"shrinkage={self.shrinkage!r}: choose 'ks' or 'pooled'")
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale={self.logit_scale}: give a positive number (CLIP's is 100)")
        text = isinstance(self.alpha, str)
        if self.alpha != "grid" if text else not np.isfinite(np.asarray(self.alpha, float)).all():
            raise ValueError(f"alpha={self.alpha!r}: give a number, an array of candidates, or 'grid'")

    def _reset(self, labels: np.ndarray | None, text_features: Any) -> None:
        """Classes, and the text features in their order."""
        text = self.text_features if text_features is None else text_features
        if text is not None:
            text = check_text_features(text, self.n_features_in_, self.normalize)
        elif labels is None:
            raise ValueError(
                "text_features is None: without labels the classes have to come from a text encoder"
            )
        self.classes_, self.text_features_ = align_classes(labels, text, self.classes)
        for name in ("alpha_scores_", "n_iter_"):
            self.__dict__.pop(name, None)

    def _log_prior(self, counts: np.ndarray) -> np.ndarray:
        if isinstance(self.priors, str) and self.priors in ("uniform", "empirical"):
            priors = counts if self.priors == "empirical" else np.ones(len(counts))
        else:
            priors = np.asarray(self.priors, np.float64) if not isinstance(self.priors, str) else np.empty(0)
            if priors.shape != counts.shape or not (priors > 0).all():
                raise ValueError(
                    f"priors={self.priors!r}: give 'uniform', 'empirical' or {len(counts)} positive numbers"
                )
        return np.log(np.maximum(priors, 1e-300) / priors.sum())

    def _set_moments(self, moments: Moments, precision: np.ndarray | None = None) -> None:
        self.counts_, self.means_, self.scatter_ = moments.counts, moments.means, moments.scatter
        log_prior = self._log_prior(moments.counts)
        if precision is None:
            self.image_coef_, self.image_intercept_ = ks_discriminant(moments, log_prior)
        else:
            self.image_coef_, self.image_intercept_ = discriminant(moments.means, precision, log_prior)
        self.image_intercept_ = np.where(moments.counts > 0, self.image_intercept_, NEVER)

    def _stand_in(self, X: np.ndarray, new: np.ndarray, k: int = 64, text_copies: int = 16) -> None:
        """Fill in the classes `new`, of which there is a text feature alone."""
        if self.text_features_ is None:
            raise ValueError(
                f"class {self.classes_[new].tolist()[0]!r} has no sample and no text feature: leave it out"
            )
        text = self.text_features_[new]
        chosen = _best_rows(X, text, k)  # (n_new, k)
        means = np.stack([X[chosen[:, j]] for j in range(chosen.shape[1])]).sum(axis=0, dtype=np.float64)
        means = (means + text_copies * text) / (chosen.shape[1] + text_copies)
        precision = surrogate_precision(X, chosen, text)
        log_prior = np.full(len(new), -np.log(len(self.counts_)))
        self.means_[new] = means
        self.image_coef_[new], self.image_intercept_[new] = discriminant(means, precision, log_prior)

    def _choose_alpha(self, X_val: Any, y_val: Any, support: tuple[Any, ...] | None) -> None:
        self.alpha_ = 1.0
        if self.text_features_ is None:
            return
        alphas = np.asarray(ALPHAS if isinstance(self.alpha, str) else self.alpha, np.float64)
        if alphas.ndim == 0:
            self.alpha_ = float(alphas)
            return
        correct, counted = np.zeros(len(alphas)), 0.0
        for X, index, image, weight in self._held_out(X_val, y_val, support):
            text = self.logit_scale * (X @ self.text_features_.T)
            right = np.stack([(text + alpha * image).argmax(axis=1) == index for alpha in alphas])
            correct += right @ weight
            counted += weight.sum()
        if not counted:
            self.alpha_ = 0.0
            warnings.warn(
                "no class has two samples to leave one out: alpha_ is 0, the zero-shot classifier; give X_val or alpha",
                stacklevel=4,
            )
            return
        self.alpha_scores_ = correct / counted
        self.alpha_ = float(alphas[self.alpha_scores_.argmax()])

    def _held_out(self, X_val: Any, y_val: Any, support: tuple[Any, ...] | None) -> Any:
        """Blocks of (rows, classes, Gaussian scores, weights) to choose alpha on."""
        if X_val is not None:
            X, index = self._validation(X_val, y_val)
            X = self._rows(X)
            for rows in row_blocks(len(X), 3 * len(self.classes_)):
                image = X[rows] @ self.image_coef_.T + self.image_intercept_
                yield X[rows], index[rows], image, np.ones(len(image))
            return
        if support is None or self.shrinkage == "pooled":
            way = "partial_fit" if support is None else "shrinkage='pooled'"
            raise ValueError(
                f"alpha={self.alpha!r} cannot leave samples out with {way}: give X_val, or alpha a number"
            )
        X, index, groups, weight = support
        groups = np.arange(len(X)) if groups is None else np.unique(groups, return_inverse=True)[1]
        _check_groups(groups, index)
        moments = Moments(self.counts_, self.means_, self.scatter_)
        if not (present := moments.counts > 0).all():  # classes without samples are no candidates here
            moments = Moments(moments.counts, np.where(present[:, None], moments.means, 0), moments.scatter)
        log_prior = np.where(present, self._log_prior(moments.counts), NEVER)
        weight = np.ones(len(X)) if weight is None else weight
        for chosen, image in leave_one_out(X, index, groups, moments, log_prior, weight):
            yield X[chosen], index[chosen], image, weight[chosen]

    def _merge(self, text: bool = True) -> GDAClassifier:
        """Both parts as one linear layer."""
        self.coef_ = self.alpha_ * self.image_coef_
        self.intercept_ = self.alpha_ * self.image_intercept_
        if text and self.text_features_ is not None:
            self.coef_ = self.coef_ + self.logit_scale * self.text_features_
        return self


def _pooled(X: np.ndarray, index: np.ndarray, moments: Moments, weight: np.ndarray | None) -> np.ndarray:
    """Pseudo-inverse of the mean over classes of their covariances."""
    freedom = np.maximum(moments.counts - 1, 0)
    if not (enough := freedom > 0).any():
        raise ValueError(
            "shrinkage='pooled' needs a class with two samples: give more, or use shrinkage='ks'"
        )
    share = np.where(enough, 1 / np.where(enough, freedom, 1), 0) / enough.sum()
    weight = share[index] if weight is None else weight * share[index]
    return np.linalg.pinv(class_moments(X, index, len(moments.counts), weight).scatter, hermitian=True)


def _best_rows(X: np.ndarray, text: np.ndarray, k: int) -> np.ndarray:
    """The `k` rows of X with the largest product with each row of `text`, (n_text, k); fewer where X has fewer."""
    k = min(k, len(X))
    found = []
    for some in row_blocks(len(text), 2 * len(X)):
        similarity = text[some].astype(X.dtype) @ X.T
        found.append(np.argpartition(-similarity, k - 1, axis=1)[:, :k])
    return np.concatenate(found)


def _check_groups(groups: np.ndarray, index: np.ndarray) -> None:
    pairs = np.unique(np.stack([groups, index]), axis=1)
    if pairs.shape[1] > groups.max() + 1:
        raise ValueError(
            "groups holds a group with samples of two classes: the views of one picture share its class"
        )
