"""TFUP: zero-shot logits plus the vote of a cache that the unlabelled images filled themselves; TFUP-T trains on it.

The *cache* holds for each class, of the 2K images surest to be it, the K whose class distributions are most central;
`p(x) = softmax(10 x W')` is soft on purpose: with CLIP's 100 the divergences explode. A *vote* weighs feature and semantic
similarity together:
    a = x m',   b = 2 (1 - KL(p(x) || p(m)), min-max over keys),   logits = 100 x W' + alpha exp(-beta (1 - a b)) V.
*TFUP-T* learns a bottleneck on images, `f' = 0.2 ReLU(W2 ReLU(W1 f)) + 0.8 f`, and a residual on texts,
`w' = w / 2 + R / 2`: first on the surest images with TFUP's labels, then on all, each strong view towards the confident
TFUP label of its weak view, with the batch's mean prediction kept balanced (`0.3 sum_c pbar_c log pbar_c`). The cache is
then dropped.

The cache takes K of every class: it assumes a balanced pool, and so does the marginal term. Deviations: the cosine
schedule counts all steps (the release's rises again); the last epoch is kept (the paper's numbers are the best by test
accuracy); text features are brought to the norm 10 that CLIP's have, which the learning rate refers to. The image adapter
has no bias and is homogeneous: the norm of image features does not matter.

Reference: Training-Free Unsupervised Prompt for Vision-Language Models, 2024, arXiv:2404.16339.
Needs: unlabelled data, features, text features, gradients for TFUP-T alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from unfused.nn.cache_model import Keys, confident_and_central, multi_level_affinity
from unfused.nn.zero_shot import (
    FLOATS,
    LogitClassifier,
    align_classes,
    check_labels,
    check_text_features,
    label_index,
    unit_rows,
)

__all__ = ["TFUPClassifier", "TFUPTClassifier"]


class _Unlabelled(LogitClassifier):
    """Text features are the classes; without them the class means of labelled rows are."""

    text_features: Any
    classes: Any
    text_features_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.text_features is None
        return tags

    def _start(self, X: Any, y: Any, text_features: Any) -> np.ndarray:
        """Check X and y; set `classes_` and `text_features_` (unit rows)."""
        text = self.text_features if text_features is None else text_features
        if y is None and text is not None:
            X = validate_data(self, X, dtype=FLOATS)
        else:
            X, y = validate_data(self, X, y, dtype=FLOATS)
            check_labels(y)
        if text is not None:
            text = check_text_features(text, X.shape[1])
        self.classes_, self.text_features_ = align_classes(y, text, self.classes)
        if text is None:
            index = label_index(y, self.classes_)
            members = np.eye(len(self.classes_))[
                index
            ]  # no sum can be of norm 0 for long: such a mean votes for nothing
            self.text_features_ = unit_rows(members.T @ unit_rows(X))
        return X


class TFUPClassifier(_Unlabelled):
    """Zero-shot classification with a cache of the unlabelled pool's surest and most central images. Trains nothing.

    Parameters
    ----------
    text_features : array-like of shape (n_classes, n_features), optional
        One row a class, normalised here, as X is. None: y has to be given and the class means stand in for texts.
    classes : array-like of shape (n_classes,), optional
        Labels of those rows. By default the sorted labels of y, else 0, 1, ...
    alpha, beta : float, default=0.3, 1.0
        Weight and sharpness of the vote. The paper's; a sharper and stronger one can be much better where zero-shot is
        weak (1 and 5.5, Tip-Adapter's).
    semantic_scale : float, default=10.0
        Of the class distributions.
    logit_scale : float, default=100.0
        Of the zero-shot logits: CLIP's 100; `model.logit_scale.exp()` of another.
    cache_proportion : float, default=0.3
    shots : (int, int), default=(9, 16)
        K is `cache_proportion` times the images a class, within these bounds; never more than there are images.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted.
    keys_ : ndarray of shape (n_keys, n_features)
        The cache, class by class.
    key_index_ : ndarray of int, shape (n_keys,)
        Class of each key.
    key_rows_ : ndarray of int, shape (n_keys,)
        Which row of X it was; an image may stand for several classes.
    text_features_ : ndarray of shape (n_classes, n_features)
    n_features_in_, feature_names_in_

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W = np.eye(3, 8)
    >>> X = rng.normal(size=(300, 8)) * 0.5 + 2 * np.eye(3, 8)[np.arange(300) % 3]
    >>> clf = TFUPClassifier(W, classes=["ant", "bee", "cow"]).fit(X)
    >>> clf.predict([[0, 2, 0, 0, 0, 0, 0, 0.3]]), clf.keys_.shape
    (array(['bee'], dtype='<U3'), (48, 8))
    """

    def __init__(
        self,
        text_features: Any = None,
        *,
        classes: Any = None,
        alpha: float = 0.3,
        beta: float = 1.0,
        semantic_scale: float = 10.0,
        logit_scale: float = 100.0,
        cache_proportion: float = 0.3,
        shots: tuple[int, int] = (9, 16),
    ) -> None:
        self.text_features = text_features
        self.classes = classes
        self.alpha = alpha
        self.beta = beta
        self.semantic_scale = semantic_scale
        self.logit_scale = logit_scale
        self.cache_proportion = cache_proportion
        self.shots = shots

    def fit(self, X: Any, y: Any = None, *, text_features: Any = None) -> TFUPClassifier:
        """Fill the cache from unlabelled features; they may be those to predict.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), optional
            Not looked at beyond the names of the classes, unless there are no text features.
        text_features : array-like, optional
            Instead of the constructor's.

        Raises
        ------
        ValueError
            For NaN, one class, text features of another width, repeated names, settings out of their range.
        """
        low, high = self.shots
        if not 1 <= low <= high:
            raise ValueError(f"shots={self.shots}: give bounds (low, high) with 1 <= low <= high")
        for name in ("alpha", "beta", "semantic_scale", "logit_scale", "cache_proportion"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a number that is not negative")
        X = unit_rows(self._start(X, y, text_features))
        self.key_rows_, self.key_index_ = self._choose(X, self.cache_proportion, low, high)
        self.keys_ = X[self.key_rows_]
        return self

    def _choose(
        self, X: np.ndarray, proportion: float, low: int, high: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows for each class and their classes."""
        shots = int(np.clip(int(proportion * len(X) / len(self.classes_)), low, high))
        text = self.text_features_.astype(X.dtype)
        rows = confident_and_central(X, text, self.semantic_scale, shots)
        return rows.ravel(), np.repeat(np.arange(len(rows)), rows.shape[1])

    def _vote(self, x: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Logits of unit rows with this text."""
        keys = Keys(self.keys_.astype(x.dtype), self.key_index_, len(text))
        affinity = multi_level_affinity(x, keys.features, text, self.semantic_scale, self.beta)
        return self.logit_scale * (x @ text.T) + self.alpha * keys.votes(affinity)

    def _logits(self, X: np.ndarray) -> np.ndarray:
        return self._vote(unit_rows(X), self.text_features_.astype(X.dtype))

    def _row_width(self) -> int:
        return 3 * len(self.keys_) + 3 * len(self.classes_)


class TFUPTClassifier(_Unlabelled):
    """TFUP as the teacher of two small adapters; predicts without the cache.

    Parameters
    ----------
    text_features, classes
        As for `TFUPClassifier`.
    tfup : TFUPClassifier, optional
        The teacher's settings; by default its own defaults. Its `text_features` and `classes` are not used.
    image_ratio, text_ratio : float, default=0.2, 0.5
        Share of the adapter in image features and of the residual in text features.
    threshold : float, default=0.9
        Confidence from which a weak view's label is used.
    marginal_weight : float, default=0.3
        Of the term that balances the classes; 0 where the pool is known to be unbalanced.
    training_proportion : float, default=0.75
        Size of the warm-up's set, like `cache_proportion`, but at least `shots[0]` and without an upper bound.
    epochs, warmup_epochs, batch_size : int, default=30, 5, 256
        Epochs in all, and those of them that warm up.
    learning_rate, eps, weight_decay : float, default=0.012, 0.003, 0.1
        Of AdamW, on a cosine over all steps.
    text_norm : float, default=10.0
        Norm that text features are brought to before the residual is added; sets what the learning rate means.
    random_state : int, RandomState or None, default=None
        Of the adapters' start and of the batches.

    Attributes
    ----------
    classes_, text_features_
    tfup_ : TFUPClassifier
        The teacher, fitted.
    image_down_, image_up_ : ndarray of shape (n_features // 4, n_features), (n_features, n_features // 4)
    text_adapted_ : ndarray of shape (n_classes, n_features)
        Unit rows.
    kept_ : list of float
        Of each epoch after the warm-up, the share of images whose label was confident.
    n_features_in_, feature_names_in_

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W = np.eye(3, 8)
    >>> X = rng.normal(size=(300, 8)) * 0.5 + 2 * np.eye(3, 8)[np.arange(300) % 3]
    >>> clf = TFUPTClassifier(W, epochs=4, warmup_epochs=1, random_state=0).fit(X)
    >>> float(clf.score(X, np.arange(300) % 3)) > 0.9
    True
    """

    def __init__(
        self,
        text_features: Any = None,
        *,
        classes: Any = None,
        tfup: TFUPClassifier | None = None,
        image_ratio: float = 0.2,
        text_ratio: float = 0.5,
        threshold: float = 0.9,
        marginal_weight: float = 0.3,
        training_proportion: float = 0.75,
        epochs: int = 30,
        warmup_epochs: int = 5,
        batch_size: int = 256,
        learning_rate: float = 0.012,
        eps: float = 0.003,
        weight_decay: float = 0.1,
        text_norm: float = 10.0,
        random_state: Any = None,
    ) -> None:
        self.text_features = text_features
        self.classes = classes
        self.tfup = tfup
        self.image_ratio = image_ratio
        self.text_ratio = text_ratio
        self.threshold = threshold
        self.marginal_weight = marginal_weight
        self.training_proportion = training_proportion
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.eps = eps
        self.weight_decay = weight_decay
        self.text_norm = text_norm
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any = None, *, text_features: Any = None, strong_views: Any = None
    ) -> TFUPTClassifier:
        """Fill the cache, warm up, train.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Features of the weak views: the plain pictures.
        y : array-like of shape (n_samples,), optional
            As for `TFUPClassifier`.
        text_features : array-like, optional
            Instead of the constructor's.
        strong_views : array-like of shape (n_views, n_samples, n_features) or callable, optional
            Features of augmented views, one drawn at random each time; or a function of row numbers that gives
            features (len(rows), n_features) of fresh ones. None: the weak views themselves.
        """
        if not 0 <= self.warmup_epochs <= self.epochs or self.batch_size < 1:
            raise ValueError(
                f"epochs={self.epochs}, warmup_epochs={self.warmup_epochs}, batch_size={self.batch_size}: the warm-up is "
                "part of the epochs and a batch has at least one image"
            )
        for name in ("image_ratio", "text_ratio", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1")
        X = self._start(X, y, text_features)
        teacher = clone(self.tfup) if self.tfup is not None else TFUPClassifier()
        teacher.set_params(classes=None)
        self.tfup_ = teacher.fit(X, text_features=self.text_features_)
        rng = check_random_state(self.random_state)
        self._train(np.asarray(X, np.float32), _views(strong_views, X, rng), rng)
        return self

    def _train(
        self, X: np.ndarray, strong: Callable[[np.ndarray], np.ndarray], rng: np.random.RandomState
    ) -> None:
        import torch
        from torch.nn import functional as F

        d, scale = X.shape[1], float(self.tfup_.logit_scale)
        hidden = max(d // 4, 1)
        text = torch.tensor(self.text_norm * self.text_features_, dtype=torch.float32)
        down, up = (
            torch.tensor(
                rng.uniform(-1, 1, shape) / np.sqrt(shape[1]), dtype=torch.float32, requires_grad=True
            )
            for shape in ((hidden, d), (d, hidden))
        )
        residual = torch.zeros_like(text, requires_grad=True)

        def images(f: np.ndarray) -> torch.Tensor:
            raw = torch.as_tensor(np.asarray(f, np.float32))
            adapted = torch.relu(torch.relu(raw @ down.T) @ up.T)
            return F.normalize(self.image_ratio * adapted + (1 - self.image_ratio) * raw, dim=-1)

        def classes() -> torch.Tensor:
            return F.normalize((1 - self.text_ratio) * text + self.text_ratio * residual, dim=-1)

        def teach(rows: np.ndarray) -> torch.Tensor:
            """TFUP's logits of the weak views with the adapters as they are and the cache as it was."""
            with torch.no_grad():
                return torch.from_numpy(self.tfup_._vote(images(X[rows]).numpy(), classes().numpy()))

        sure, _ = self.tfup_._choose(unit_rows(X), self.training_proportion, self.tfup_.shots[0], np.inf)
        labels = self.tfup_._all_logits(X).argmax(axis=1)
        plan = [sure] * self.warmup_epochs + [np.arange(len(X))] * (self.epochs - self.warmup_epochs)
        steps = sum(-(-len(rows) // self.batch_size) for rows in plan)
        optimizer = torch.optim.AdamW(
            [down, up, residual], lr=self.learning_rate, eps=self.eps, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        self.kept_ = []
        for epoch, pool in enumerate(plan):
            order, kept = rng.permutation(pool), 0
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                logits = scale * images(strong(rows)) @ classes().T
                if epoch < self.warmup_epochs:
                    loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]))
                else:
                    confidence, label = teach(rows).softmax(-1).max(-1)
                    confident = confidence > self.threshold
                    kept += int(confident.sum())
                    mean = logits.softmax(-1).mean(0)
                    loss = self.marginal_weight * torch.xlogy(mean, mean.clamp_min(1e-30)).sum()
                    if confident.any():
                        loss = loss + F.cross_entropy(logits[confident], label[confident])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if epoch >= self.warmup_epochs:
                self.kept_.append(kept / len(order))
        self.image_down_, self.image_up_ = down.detach().numpy(), up.detach().numpy()
        self.text_adapted_ = classes().detach().numpy()

    def _logits(self, X: np.ndarray) -> np.ndarray:
        down, up = self.image_down_.T.astype(X.dtype), self.image_up_.T.astype(X.dtype)
        adapted = np.maximum(np.maximum(X @ down, 0) @ up, 0)
        x = unit_rows(self.image_ratio * adapted + (1 - self.image_ratio) * X)
        return self.tfup_.logit_scale * (x @ self.text_adapted_.T.astype(X.dtype))


def _views(strong: Any, X: np.ndarray, rng: np.random.RandomState) -> Callable[[np.ndarray], np.ndarray]:
    """A function of row numbers that gives the features of a strong view of each."""
    if strong is None:
        return lambda rows: X[rows]
    if callable(strong):

        def call(rows: np.ndarray) -> np.ndarray:
            found = np.asarray(strong(rows))
            if found.shape != (len(rows), X.shape[1]):
                raise ValueError(
                    f"strong_views gave the shape {found.shape} for {len(rows)} rows: give ({len(rows)}, {X.shape[1]})"
                )
            return found

        return call
    views = np.asarray(strong)
    if views.ndim != 3 or views.shape[1:] != X.shape or not np.isfinite(views).all():
        raise ValueError(
            f"strong_views has the shape {views.shape}: give finite numbers (n_views, {len(X)}, {X.shape[1]})"
        )
    return lambda rows: views[rng.randint(len(views), size=len(rows)), rows]
