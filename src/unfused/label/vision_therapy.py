"""Vision therapy: a verifier that sees examples corrects a classifier's labels, and the classifier learns from them.

1. *Transition matrix.* Of every class's support images some are taken at regular ranks of confidence; T[c] is their mean
   softmax, T scaled to [0, 1] as a whole: T[c, p] tells how much of a true c is taken for p.
2. *Denoising in-context learning*, for an image x with prediction p: the N classes with the largest T[:, p], p first and the
   others by s(x), are candidates. Of each, the M support images whose probability of p is nearest to x's are its exemplars.
   In round m a verifier sees a negative (an image of candidate y, said to be p: "False"; for y = p one of the next
   candidate), a positive (an image of y, said to be y: "True") and x, said to be y. q_y is its mean P("True").
   *Diagnosis*: if (q_p + s(x)_p) / 2 >= threshold, p stays. *Therapy*: else the candidate with the largest q.
3. *Fine-tuning*: the image encoder, its text classifier frozen, learns the therapy's labels, and on all other images what
   a frozen copy of itself says.

Read from the card, where it leaves it open: negative and positive of a round are two different exemplars of y where it has
two. The released code cuts to N after sorting by s(x), so that T does nothing (`candidate_order="confidence"`), and compares
confidences by signed difference through a permuted index; here it is the absolute difference.

Reference: Machine Vision Therapy: Multimodal Large Language Models Can Enhance Visual Robustness via Denoising In-Context
Learning, ICML 2024, arXiv:2312.02546.
Needs: unlabelled data, few labels, class probabilities, a verifier.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted

from unfused.label._therapy_info import ACCEPTED, FAILED, PENDING, THERAPY, UNKNOWN, TherapyInfo
from unfused.label._therapy_student import TherapyStudent, therapy_fine_tune, therapy_loss
from unfused.label._verifier import IMAGE, Asker, Question, TransformersVerifier
from unfused.nn.estimators import draw_seed
from unfused.nn.zero_shot import class_labels, row_blocks, unit_rows

__all__ = [
    "TherapyInfo",
    "TherapyStudent",
    "TransformersVerifier",
    "VisionTherapy",
    "therapy_fine_tune",
    "therapy_loss",
]

TEMPLATE = f"This image {IMAGE} shows a photo of {{name}}, True or False? Answer:"
ORDERS, RETRIEVALS = ("transition", "confidence", "random"), ("confidence", "features")


class VisionTherapy(BaseEstimator):
    """Corrects a classifier's labels of unlabelled images by asking a verifier about the classes it tends to confuse.

    Images are whatever the verifier takes: paths, PIL images, arrays, row numbers. They are only indexed, one at a time, so
    that a memory map or a data set does.

    Parameters
    ----------
    verifier : callable
        `verifier(images, captions, answers) -> float`, three of each, the answers "False", "True" and None: the probability
        that the third answer is "True". `TransformersVerifier` is one.
    batch_size : int, optional
        Call it with lists of up to so many of these lists; it returns as many numbers. By default `verifier.batch_size`, or
        one question a call where it has none.
    n_candidates : int, default=6
        N, p among them.
    n_exemplars : int, default=3
        M, rounds a candidate; fewer where the support has fewer of a class.
    accept_threshold : float, default=0.6
        Above 1 nothing is accepted without asking about all candidates.
    candidate_order : {"transition", "confidence", "random"}, default="transition"
        Candidates by T[:, p]; the N most probable for the image; or N - 1 others by chance.
    retrieval : {"confidence", "features"}, default="confidence"
        Exemplars by |s(exemplar)_p - s(x)_p|, or by cosine of `features`.
    labeling_budget : int, default=10
        Support images of a class behind its row of T.
    n_stored : int, default=10
        Support images of a class to retrieve exemplars from, at regular ranks of confidence.
    temperature : float or "support", default=1.0
        The probabilities are sharpened or softened to p ** (1 / temperature). "support" takes the likeliest on the support:
        the rule for acceptance averages them with q, and a CLIP at its own scale is over-confident on shifted images.
    template : str
        The sentence, with `{name}`, and `<img>` where models that interleave have the picture.
    timeout : float, optional
        Seconds that one call may take.
    max_failures : int, default=20
        Failed calls in a row after which the rest of the images is left "pending".
    random_state : int, RandomState instance or None, default=None

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        In the order of the columns.
    transition_matrix_ : ndarray of shape (n_classes, n_classes)
        In [0, 1]; true classes are rows. The row of a class without support is 0.
    exemplars_ : list
        Images kept of the support.
    exemplar_rows_ : ndarray of int, shape (n_classes, n_stored)
        Positions in `exemplars_`, -1 where there are fewer.
    exemplar_probs_ : ndarray of shape (n_exemplars, n_classes)
    temperature_ : float
    info_ : TherapyInfo
        Of the latest `relabel`, also of one that was interrupted.

    Examples
    --------
    A verifier that knows the truth, images that are numbers and a model that takes every third class for the second:

    >>> truth = np.arange(30) % 3
    >>> probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.0, 0.6, 0.4]])[truth]
    >>> def verifier(images, captions, answers):
    ...     return float(f"class {images[2] % 3}," in captions[2])
    >>> vt = VisionTherapy(verifier, n_candidates=2).fit(
    ...     range(12), truth[:12], probs[:12], names=["class 0", "class 1", "class 2"])
    >>> labels, info = vt.relabel(range(12, 30), probs[12:])
    >>> bool((labels == truth[12:]).all()), info.status[:3].tolist(), info.calls[:3].tolist()
    (True, ['accepted', 'accepted', 'therapy'], [3, 3, 6])
    """

    def __init__(
        self,
        verifier: Callable[..., Any] | None = None,
        *,
        batch_size: int | None = None,
        n_candidates: int = 6,
        n_exemplars: int = 3,
        accept_threshold: float = 0.6,
        candidate_order: str = "transition",
        retrieval: str = "confidence",
        labeling_budget: int = 10,
        n_stored: int = 10,
        temperature: float | str = 1.0,
        template: str = TEMPLATE,
        timeout: float | None = None,
        max_failures: int = 20,
        random_state: Any = None,
    ) -> None:
        self.verifier = verifier
        self.batch_size = batch_size
        self.n_candidates = n_candidates
        self.n_exemplars = n_exemplars
        self.accept_threshold = accept_threshold
        self.candidate_order = candidate_order
        self.retrieval = retrieval
        self.labeling_budget = labeling_budget
        self.n_stored = n_stored
        self.temperature = temperature
        self.template = template
        self.timeout = timeout
        self.max_failures = max_failures
        self.random_state = random_state

    def fit(
        self,
        images: Sequence[Any],
        y: Any,
        probs: Any,
        *,
        features: Any = None,
        classes: Any = None,
        names: Sequence[str] | None = None,
    ) -> VisionTherapy:
        """Estimate the confusions on the support and keep exemplars. The verifier is not called.

        Parameters
        ----------
        images : sequence of n_support
            Labelled; none of them may be among those to relabel.
        y : array-like of shape (n_support,)
        probs : array-like of shape (n_support, n_classes)
            The classifier's softmax of them.
        features : array-like of shape (n_support, n_features), optional
            With `retrieval="features"`.
        classes : array-like of shape (n_classes,), optional
            Labels of the columns; by default the sorted labels of y. A class without support is never a candidate.
        names : sequence of str, optional
            What sentences call them; by default the labels.

        Raises
        ------
        ValueError
            For numbers that are no probabilities, labels that fit no column, fewer than two classes with support, settings
            out of range.
        """
        self._check()
        probs = _probabilities(probs, len(images))
        y = np.asarray(y)
        if y.shape != (len(images),):
            raise ValueError(f"y has the shape {y.shape} for {len(images)} images: give one label each")
        self.classes_ = class_labels(np.unique(y) if classes is None else classes)
        if len(self.classes_) != probs.shape[1]:
            raise ValueError(
                f"probs has {probs.shape[1]} columns for {len(self.classes_)} classes: give `classes`, their labels in order"
            )
        self.names_ = [str(name) for name in (self.classes_.tolist() if names is None else names)]
        if len(self.names_) != len(self.classes_):
            raise ValueError(
                f"names has {len(self.names_)} entries for {len(self.classes_)} classes: give as many"
            )
        class_labels(self.names_, name="names")
        column = {label: number for number, label in enumerate(self.classes_.tolist())}
        if strange := [label for label in y.tolist() if label not in column]:
            raise ValueError(f"y holds {strange[0]!r}, which is not among the classes")
        index = np.array([column[label] for label in y.tolist()])
        if len(np.unique(index)) < 2:
            raise ValueError("y holds one class: the support needs images of at least two")
        self.seed_ = draw_seed(check_random_state(self.random_state))
        self.temperature_ = (
            _calibrate(probs, index) if self.temperature == "support" else float(self.temperature)
        )
        probs = _temper(probs, self.temperature_)
        self._learn(images, index, probs, self._features(features, len(images)))
        self._support = {_digest(image) for image in images}
        return self

    def _learn(
        self, images: Sequence[Any], index: np.ndarray, probs: np.ndarray, features: np.ndarray | None
    ) -> None:
        n_classes = probs.shape[1]
        order = np.lexsort((-probs.max(axis=1), index))  # class by class, the surest first
        count = np.bincount(index, minlength=n_classes)
        matrix = np.zeros((n_classes, n_classes))
        self.exemplar_rows_ = np.full((n_classes, self.n_stored), -1)
        kept: list[int] = []
        for c, ranked in enumerate(np.split(order, count.cumsum()[:-1])):
            if not len(ranked):
                continue
            matrix[c] = probs[ranked[_regular(len(ranked), self.labeling_budget)]].mean(axis=0)
            stored = ranked[_regular(len(ranked), self.n_stored)]
            self.exemplar_rows_[c, : len(stored)] = len(kept) + np.arange(len(stored))
            kept.extend(stored.tolist())
        low, high = matrix[count > 0].min(), matrix.max()
        self.transition_matrix_ = np.where(count[:, None] > 0, (matrix - low) / (high - low or 1.0), 0.0)
        self.exemplars_ = [images[row] for row in kept]
        self.exemplar_probs_ = probs[kept]
        self.exemplar_features_ = None if features is None else features[kept]

    def relabel(
        self,
        images: Sequence[Any],
        probs: Any,
        *,
        features: Any = None,
        max_images: int | None = None,
        resume: TherapyInfo | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> tuple[np.ndarray, TherapyInfo]:
        """Ask the verifier about each image.

        A verifier that raises, takes too long or returns no probability costs that answer: q is the mean of the rounds that
        were answered, a candidate without any is out, and without a q of p, or of any other candidate, the image keeps p as
        "failed". `resume` and `checkpoint` go on with what is "failed" or "pending".

        Parameters
        ----------
        images : sequence of n
        probs : array-like of shape (n, n_classes)
            The classifier's softmax of them.
        features : array-like of shape (n, n_features), optional
            With `retrieval="features"`.
        max_images : int, optional
            Ask about so many, drawn at random (the paper: 5,000); the others are "pending".
        resume : TherapyInfo, optional
            Of an earlier call on the same images, or `info_` of one that was interrupted.
        checkpoint : path, optional
            A file that keeps the progress; if it is there it is resumed from.
        progress : callable, optional
            Called with the images done and those to do.

        Returns
        -------
        labels : ndarray of shape (n,)
        info : TherapyInfo

        Raises
        ------
        ValueError
            For probabilities that do not fit those of `fit`, an earlier info of other images or settings.
        """
        check_is_fitted(self)
        self._check()
        if not callable(self.verifier):
            raise ValueError(f"verifier={self.verifier!r}: give a callable")
        probs = _probabilities(probs, len(images))
        if probs.shape[1] != len(self.classes_):
            raise ValueError(
                f"probs has {probs.shape[1]} columns, fit saw {len(self.classes_)} classes: give as many"
            )
        probs = _temper(probs, self.temperature_)
        known = self.exemplar_features_
        if self.retrieval == "features" and known is None:
            raise ValueError("retrieval='features': fit has seen no features; fit again")
        vectors = self._features(features, len(images), None if known is None else known.shape[1])
        if max_images is not None and max_images < 0:
            raise ValueError(f"max_images={max_images}: give at least 0, or None")
        info = self._begin(probs)
        if resume is None and checkpoint is not None and Path(checkpoint).exists():
            resume = TherapyInfo.load(checkpoint)
        if resume is not None:
            if resume.key != info.key:
                raise ValueError(
                    "resume, or checkpoint: it is of other images, another support or other settings"
                )
            info = copy.deepcopy(resume)
        self.info_ = info
        some = np.random.default_rng([self.seed_, 1]).permutation(len(images))[:max_images]
        todo = np.sort(some[np.isin(info.codes[some], (PENDING, FAILED))])
        again = set(todo.tolist())
        info.failures = [failure for failure in info.failures if failure["image"] not in again]
        size = getattr(self.verifier, "batch_size", None) if self.batch_size is None else self.batch_size
        asker, saved = Asker(self.verifier, size, self.timeout, self.max_failures), time.monotonic()
        for start in range(0, len(todo), size or 1):
            rows = todo[start : start + (size or 1)]
            self._block(rows, images, probs, vectors, asker, info)
            info.failures += asker.failures
            asker.failures.clear()
            if checkpoint is not None and time.monotonic() - saved > 10:
                info.save(checkpoint)
                saved = time.monotonic()
            if progress is not None:
                progress(min(start + len(rows), len(todo)), len(todo))
            if asker.stopped:
                warnings.warn(
                    f"verifier failed {self.max_failures} times in a row ({asker.stopped}): "
                    f"{int((info.codes[todo] == PENDING).sum())} images were not asked about; pass resume=info to go on",
                    stacklevel=2,
                )
                break
        if checkpoint is not None:
            info.save(checkpoint)
        return self.classes_[info.chosen], info

    def _begin(self, probs: np.ndarray) -> TherapyInfo:
        predicted = probs.argmax(axis=1)
        confidence = probs.max(axis=1)
        candidates = self._candidates(probs, predicted)
        shape = candidates.shape
        key = hashlib.blake2b(digest_size=16)
        for array in (probs, candidates, self.exemplar_probs_):
            key.update(np.ascontiguousarray(array).data)
        how = [self.n_exemplars, self.accept_threshold, self.retrieval, self.template, self.names_]
        key.update(json.dumps(how, default=str).encode())
        return TherapyInfo(
            predicted,
            confidence,
            candidates,
            chosen=predicted.copy(),
            scores=np.full(shape, np.nan),
            calls=np.zeros(len(probs), np.int64),
            codes=np.where(self.exemplar_rows_[predicted, 0] >= 0, PENDING, UNKNOWN),
            key=key.hexdigest(),
        )

    def _candidates(self, probs: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Column numbers (n, N): p, then the others by probability."""
        absent = self.exemplar_rows_[:, 0] < 0
        n_classes = len(absent)
        many = min(self.n_candidates, n_classes - int(absent.sum()))
        found = np.empty((len(probs), many), np.int64)
        rng = np.random.default_rng([self.seed_, 0])
        by_column = np.where(absent[:, None], -1.0, self.transition_matrix_)
        np.fill_diagonal(by_column, 2.0)  # p itself always
        table = np.argsort(-by_column, axis=0, kind="stable")[:many].T  # (n_classes, N): for each p
        for rows in row_blocks(len(probs), 3 * n_classes):
            p, s = predicted[rows], probs[rows]
            line = np.arange(len(p))
            if self.candidate_order == "transition":
                some = table[p]
            else:
                rank = rng.random(s.shape) if self.candidate_order == "random" else s.copy()
                rank[:, absent] = -1
                rank[line, p] = 2
                some = np.argsort(-rank, axis=1, kind="stable")[:, :many]
            weight = np.where(some == p[:, None], 2.0, np.take_along_axis(s, some, axis=1))
            found[rows] = np.take_along_axis(some, np.argsort(-weight, axis=1, kind="stable"), axis=1)
        return found

    def _retrieve(
        self, candidates: np.ndarray, predicted: np.ndarray, probs: np.ndarray, features: np.ndarray | None
    ) -> np.ndarray:
        """Positions (b, N, M) in `exemplars_` of the exemplars most like each image, -1 where there are fewer."""
        stored = self.exemplar_rows_[candidates]  # (b, N, n_stored)
        if features is None:
            own = np.take_along_axis(probs, predicted[:, None], axis=1)[:, :, None]
            apart = np.abs(self.exemplar_probs_[stored, predicted[:, None, None]] - own)
        else:
            assert self.exemplar_features_ is not None
            apart = -np.einsum("bd,bnkd->bnk", features, self.exemplar_features_[stored])
        apart[stored < 0] = np.inf
        nearest = np.argsort(apart, axis=2, kind="stable")[:, :, : self.n_exemplars]
        return np.take_along_axis(stored, nearest, axis=2)

    def _block(
        self,
        rows: np.ndarray,
        images: Sequence[Any],
        probs: np.ndarray,
        features: np.ndarray | None,
        asker: Asker,
        info: TherapyInfo,
    ) -> None:
        """Diagnosis of some images, then therapy of those that were not accepted."""
        queries = {int(row): images[int(row)] for row in rows}
        if seen := [row for row, image in queries.items() if _digest(image) in self._support]:
            warnings.warn(
                f"image {seen[0]} is in the support too: its label is not the verifier's", stacklevel=3
            )
        nearest = self._retrieve(
            info.candidates[rows],
            info.predicted[rows],
            probs[rows],
            None if features is None else features[rows],
        )
        info.scores[rows] = np.nan
        info.chosen[rows] = info.predicted[rows]
        first = np.zeros(len(rows), np.int64)
        whole = self._ask(np.arange(len(rows)), first, rows, queries, nearest, asker, info)
        q = info.scores[rows, 0]
        sure = (q + info.confidence[rows]) / 2 >= self.accept_threshold
        codes = np.select([~whole, np.isnan(q), sure], [PENDING, FAILED, ACCEPTED], THERAPY)
        ill = np.flatnonzero(codes == THERAPY)
        others = info.candidates.shape[1] - 1
        which, number = np.repeat(ill, others), np.tile(1 + np.arange(others), len(ill))
        full = self._ask(which, number, rows, queries, nearest, asker, info).reshape(-1, others).all(axis=1)
        scores = info.scores[rows[ill]]
        answered = np.isfinite(scores[:, 1:]).any(axis=1)
        codes[ill] = np.select([~full, ~answered], [PENDING, FAILED], THERAPY)
        best = np.where(np.isnan(scores), -1.0, scores).argmax(axis=1)
        treated = full & answered
        info.chosen[rows[ill[treated]]] = info.candidates[rows[ill[treated]], best[treated]]
        info.codes[rows] = codes  # last: a block that is interrupted is asked about again

    def _ask(
        self,
        which: np.ndarray,
        number: np.ndarray,
        rows: np.ndarray,
        queries: dict[int, Any],
        nearest: np.ndarray,
        asker: Asker,
        info: TherapyInfo,
    ) -> np.ndarray:
        """All rounds about pairs of an image and a candidate: fills `info.scores`; which pairs were asked in full."""
        questions, owner, labels = [], [], self.classes_.tolist()
        for pair, (b, i) in enumerate(zip(which.tolist(), number.tolist(), strict=True)):
            row = int(rows[b])
            classes = info.candidates[row]
            p, y = self.names_[classes[0]], self.names_[classes[i]]
            own = nearest[b, i][nearest[b, i] >= 0]
            against = nearest[b, 1][nearest[b, 1] >= 0] if i == 0 else np.roll(own, -1)
            captions = [self.template.format(name=name) for name in (p, y, y)]
            for m, positive in enumerate(own.tolist()):
                negative = int(against[m % len(against)])
                pictures = [self.exemplars_[negative], self.exemplars_[positive], queries[row]]
                about = {"image": row, "class": labels[classes[i]], "round": m}
                questions.append(Question(pictures, captions, ["False", "True", None], about))
                owner.append(pair)
        found, asked = asker(questions)
        owned, good = np.array(owner, np.int64), np.isfinite(found)
        total = np.bincount(owned[good], found[good], minlength=len(which))
        answers = np.bincount(owned[good], minlength=len(which))
        info.scores[rows[which], number] = np.where(answers > 0, total / np.maximum(answers, 1), np.nan)
        np.add.at(info.calls, rows[which[owned[asked]]], 1)
        return np.bincount(owned[~asked], minlength=len(which)) == 0

    def _check(self) -> None:
        for name, allowed in (("candidate_order", ORDERS), ("retrieval", RETRIEVALS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {allowed}")
        for name, least in (
            ("n_candidates", 2),
            ("n_exemplars", 1),
            ("labeling_budget", 1),
            ("n_stored", 1),
            ("max_failures", 1),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1, or None")
        if self.temperature != "support" and not (
            isinstance(self.temperature, int | float) and 0 < self.temperature < np.inf
        ):
            raise ValueError(f"temperature={self.temperature!r}: give a positive number, or 'support'")
        if not self.accept_threshold >= 0:
            raise ValueError(f"accept_threshold={self.accept_threshold}: give a number of at least 0")
        if "{name}" not in self.template:
            raise ValueError(f"template={self.template!r}: it needs {{name}}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout}: give seconds above 0, or None")

    def _features(self, features: Any, count: int, width: int | None = None) -> np.ndarray | None:
        if self.retrieval != "features":
            return None
        if features is None:
            raise ValueError("features=None: retrieval='features' needs those of the images")
        found = check_array(features, dtype=np.float64, input_name="features")
        if len(found) != count:
            raise ValueError(f"features has {len(found)} rows for {count} images: give one each")
        if width is not None and found.shape[1] != width:
            raise ValueError(f"features has {found.shape[1]} columns, the support's {width}: use one encoder")
        return unit_rows(found)


def _probabilities(probs: Any, count: int) -> np.ndarray:
    if hasattr(probs, "detach"):
        probs = probs.detach().float().cpu().numpy()
    probs = check_array(probs, dtype=np.float64, input_name="probs")
    if len(probs) != count:
        raise ValueError(f"probs has {len(probs)} rows for {count} images: give one each")
    total = probs.sum(axis=1)
    if probs.min() < 0 or np.abs(total - 1).max() > 1e-2:
        raise ValueError("probs: rows of probabilities that sum to 1 are needed; apply a softmax to logits")
    return probs / total[:, None]


def _temper(probs: np.ndarray, temperature: float) -> np.ndarray:
    if temperature == 1:
        return probs
    powers = (probs / probs.max(axis=1, keepdims=True)) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def _calibrate(probs: np.ndarray, index: np.ndarray) -> float:
    """The temperature at which the labels are likeliest, between 1/20 and 20."""

    def surprise(log: float) -> float:
        own = _temper(probs, float(np.exp(log)))[np.arange(len(index)), index]
        return float(-np.log(np.maximum(own, 1e-12)).mean())

    return float(np.exp(minimize_scalar(surprise, bounds=(-np.log(20), np.log(20)), method="bounded").x))


def _regular(count: int, most: int) -> np.ndarray:
    """Up to `most` ranks at regular distances, the first and the last among them.

    >>> _regular(9, 3), _regular(2, 3)
    (array([0, 4, 8]), array([0, 1]))
    """
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def _digest(image: Any) -> Any:
    """Equal for the same path, number, or content."""
    if isinstance(image, str | os.PathLike | int | np.integer):
        return os.fspath(image) if isinstance(image, os.PathLike) else image
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    try:
        array = np.ascontiguousarray(image)
        if array.dtype == object:
            return id(image)
    except (TypeError, ValueError):
        return id(image)
    return hashlib.blake2b(array.tobytes(), digest_size=16).digest()
