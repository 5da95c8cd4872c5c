"""Classic: hand-made features and logistic regression, no network.

A network that loses to it is no result. The representation and the strength of the L2 penalty are those with
the lowest cross-validated log loss on the labelled points:
    sound     "mfcc"         13 cepstral coefficients (DCT of the log-mel), the clip resampled to 32 frames
              "statistics"   mean and standard deviation over time of 20 coefficients and of their slopes
    pictures  "pixels"       the picture at 16 x 16
              "descriptors"  histograms of oriented gradients, and a histogram of colours
    texts     "words"        TF-IDF of single words and pairs
              "characters"   TF-IDF of 2 to 5 characters within words, or "both"
Rows of a table are told apart by logistic regression or by gradient-boosted trees, whichever has the lower loss.

Reference: none (a baseline).
Needs: labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from unfused.finetune._classic_table import ClassicTable
from unfused.finetune._classic_text import ClassicText
from unfused.finetune._logistic import check, choose_penalty, logistic

__all__ = ["Classic", "ClassicTable", "ClassicText", "audio_features", "image_features"]

CHUNK = 512  # clips or pictures in memory at once


class Classic(ClassifierMixin, BaseEstimator):
    """Logistic regression on MFCC or their statistics, on pixels or picture descriptors.

    `X` is a sequence of log-mels of whole clips, each (n_mels, frames), or of uint8 pictures of one size,
    each (channels, height, width); or what `audio_features` or `image_features` made of them, once for many
    fits.

    Parameters
    ----------
    representation : {"auto", "mfcc", "statistics", "pixels", "descriptors"}, default="auto"
        "auto" compares those that fit the input, by cross-validation.
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
    Its input is not a table of numbers, so scikit-learn's `check_estimator` does not apply.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(20) % 2
    >>> clips = [rng.normal(size=(40, 25)) + np.linspace(0, 3 * label, 40)[:, None] for label in labels]
    >>> Classic().fit(clips, labels).predict(clips[:4])
    array([0, 1, 0, 1])
    >>> features = audio_features(clips)  # once, for any number of fits
    >>> Classic("mfcc").fit(features[:10], labels[:10]).predict(features[10:14])
    array([0, 1, 0, 1])
    """

    def __init__(self, representation: str = "auto", seed: int = 0) -> None:
        self.representation = representation
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Any = None) -> Classic:
        """Choose and train.

        Parameters
        ----------
        X : sequence of n log-mels or pictures, or their features
        y : array of shape (n,)
            Labels, at least two classes.
        groups : array of shape (n,), optional
            Speakers, sites ...: a group is never on both sides of a fold.
        """
        features = _features(X)
        assert features.dtype.names
        if self.representation not in ("auto", *features.dtype.names):
            possible = ", ".join(features.dtype.names)
            raise ValueError(f"representation={self.representation!r}: choose 'auto' or one of {possible}")
        names = features.dtype.names if self.representation == "auto" else (self.representation,)
        tables = {name: check(features[name], y, "the features of X") for name in names}
        chosen = {name: choose_penalty(*tables[name], groups, self.seed) for name in names}
        self.losses_ = {name: loss for name, (_, loss) in chosen.items()}
        self.representation_ = min(names, key=self.losses_.__getitem__)
        self.penalty_ = chosen[self.representation_][0]
        self.model_ = logistic(self.penalty_).fit(*tables[self.representation_])
        self.classes_ = self.model_.classes_
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels, (n,)."""
        return self.model_.predict(self.transform(X))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, (n, n_classes), in the order of `classes_`."""
        return self.model_.predict_proba(self.transform(X))

    def transform(self, X: Any) -> np.ndarray:
        """The chosen features, (n, d)."""
        check_is_fitted(self)
        features = _features(X)
        if self.representation_ not in (features.dtype.names or ()):
            raise ValueError(f"X is of another kind than what was fitted ({self.representation_!r} features)")
        return features[self.representation_].astype(np.float64)


def audio_features(log_mels: Sequence[Any]) -> np.ndarray:
    """All representations of sounds.

    Parameters
    ----------
    log_mels : sequence of n arrays, each of shape (n_mels, frames)
        Of whole clips, of any lengths.

    Returns
    -------
    structured array of shape (n,)
        With the fields "mfcc" (416 numbers) and "statistics" (80).
    """
    return _table(log_mels, {"mfcc": mfcc_frames, "statistics": mfcc_statistics})


def image_features(images: Sequence[Any]) -> np.ndarray:
    """All representations of pictures.

    Parameters
    ----------
    images : sequence of n uint8 arrays, each of shape (channels, height, width)
        Of one size.

    Returns
    -------
    structured array of shape (n,)
        With the fields "pixels" and "descriptors".
    """
    return _table(images, {"pixels": pixels, "descriptors": descriptors})


def _features(X: Any) -> np.ndarray:
    if getattr(X, "dtype", None) is not None and X.dtype.names:
        return X
    if not len(X):
        raise ValueError("X is empty")
    first = np.asarray(X[0])
    if first.ndim == 3 and first.dtype == np.uint8:
        return image_features(X)
    if first.ndim == 2 and all(np.ndim(clip) == 2 and len(clip) == len(first) for clip in X):
        return audio_features(X)
    raise ValueError(
        "X must be log-mels, each (n_mels, frames) with the same n_mels, or uint8 pictures, each (channels, "
        f"height, width); its first item has shape {first.shape} and type {first.dtype}"
    )


def _table(X: Sequence[Any], compute: dict[str, Callable[[list[Any]], np.ndarray]]) -> np.ndarray:
    parts = []
    for start in range(0, len(X), CHUNK):
        chunk = [X[i] for i in range(start, min(start + CHUNK, len(X)))]
        columns = {name: function(chunk) for name, function in compute.items()}
        kinds = [(name, np.float32, column.shape[1:]) for name, column in columns.items()]
        part = np.empty(len(chunk), dtype=kinds)
        for name, column in columns.items():
            part[name] = column
        parts.append(part)
    return np.concatenate(parts)


def mfcc(log_mels: Sequence[Any], count: int) -> list[np.ndarray]:
    """Orthonormal DCT-II over the mel axis: the first `count` coefficients, (count, frames) for each clip."""
    n_mels = len(log_mels[0])
    steps = np.pi / n_mels * (np.arange(n_mels) + 0.5)
    basis = np.cos(steps * np.arange(count)[:, None]) * np.sqrt(2 / n_mels)  # (count, n_mels)
    basis[0] /= np.sqrt(2)
    ends = np.cumsum([np.shape(clip)[1] for clip in log_mels])
    return np.split(
        basis.astype(np.float32) @ np.concatenate(log_mels, 1, dtype=np.float32), ends[:-1], axis=1
    )


def mfcc_frames(log_mels: Sequence[Any]) -> np.ndarray:
    from unfused.nn.log_mel import FrontEnd, fit_frames_many

    stretch = FrontEnd(frames=32, fit="stretch", level=False)
    return np.stack([frames.numpy().ravel() for frames in fit_frames_many(mfcc(log_mels, 13), stretch)])


def mfcc_statistics(log_mels: Sequence[Any]) -> np.ndarray:
    rows = []
    for clip in mfcc(log_mels, 20):
        slope = np.gradient(clip, axis=1) if clip.shape[1] > 1 else np.zeros_like(clip)
        rows.append(np.concatenate([clip.mean(1), clip.std(1), slope.std(1), np.abs(slope).mean(1)]))
    return np.stack(rows)


def pixels(images: Sequence[Any], size: int = 16) -> np.ndarray:
    return _resize(images, size).reshape(len(images), -1)


def descriptors(images: Sequence[Any]) -> np.ndarray:
    """Histograms of 9 gradient directions in 4 x 4 cells, normalised over 2 x 2 cells; 4 levels a colour."""
    colour = _resize(images, 32)  # (n, channels, 32, 32)
    down, across = np.gradient(colour.mean(1), axis=(1, 2))
    angle = np.arctan2(down, across) % np.pi
    strength = np.hypot(down, across)
    share = np.maximum(0, 1 - _circular(angle[..., None] * 9 / np.pi - np.arange(9), 9))  # (n, 32, 32, 9)
    cells = (share * strength[..., None]).reshape(len(images), 4, 8, 4, 8, 9).sum((2, 4))  # (n, 4, 4, 9)
    blocks = np.concatenate(
        [cells[:, i : i + 3, j : j + 3] for i in (0, 1) for j in (0, 1)], -1
    )  # (n, 3, 3, 36)
    blocks = blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 0.1)
    levels = np.minimum((colour * 4).astype(int), 3)
    code = (levels * 4 ** np.arange(levels.shape[1])[:, None, None]).sum(1).reshape(len(images), -1)
    bins = 4 ** levels.shape[1]
    counts = np.bincount(
        (code + bins * np.arange(len(images))[:, None]).ravel(), minlength=bins * len(images)
    )
    histogram = counts.reshape(len(images), bins) / code.shape[1]
    return np.concatenate([blocks.reshape(len(images), -1), np.sqrt(histogram)], 1)


def _circular(difference: np.ndarray, period: float) -> np.ndarray:
    return np.abs((difference + period / 2) % period - period / 2)


def _resize(images: Sequence[Any], size: int) -> np.ndarray:
    """Area average to (n, channels, size, size), float32 in [0, 1]."""
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(np.stack(images)).float() / 255
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True).numpy()
