"""Unsupervised prompt learning: a prompt and labels for unlabelled texts from a black-box language model's probabilities.

The black box answers f(text, prompt, demonstrations) with probabilities of the classes; no gradient, and every query costs.
    1  ask about all texts under a first prompt; the most confident of each class become reliable: D_c
    2  in rounds: demonstrations of a text are taken from D_c, never the text itself; the other texts are labelled anew under
       prompt and demonstrations, and join D_c when as confident as it was; the prompt, a categorical P_i over the vocabulary
       for each of its m places, descends the cross-entropy to the labels *under the demonstrations it will be used with*:
           z_1 ... z_I ~ P,  L_k = CE(f(batch, z_k, demonstrations), labels),  A_k = (L_k - mean L) / (I - 1)
           "reinforce_loo":  P = softmax(theta), theta_ij -= lr sum_k A_k 1[z_ki = j]
           "bdpl":           G_ij = sum_k A_k (+1 if z_ki = j else -1) / P_ij, its norm clipped to 3, a step of AdamW, every row
                             projected to the simplex
    3  labels of all texts, under the likeliest token of every place.
The A_k sum to 0. So the terms -1/P of tokens that were not drawn, which are no score function, cancel up to a factor of 2: the
two estimators differ in parameters and step, not in direction. The "reinforce_loo" losses are measured in their own
standard deviation (at least 1e-3), so that a rate means the same for every task.

Confident-first labels, demonstrations during training and policy gradients are the paper's first version; its constants, the
choice of demonstrations and the rule for joining D_c could not be confirmed and are reconstructed.

Reference: On Unsupervised Prompt Learning for Classification with Black-box Language Models, preprint 2024, arXiv:2410.03124.
Needs: a black-box language model, unlabelled data, class names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from unfused.data.files import atomic_write
from unfused.label._demonstrations import Demonstrations, text_key
from unfused.label._lm_black_box import LMBlackBox, Query
from unfused.label._prompt_policy import SimplexPolicy, SoftmaxPolicy
from unfused.nn.black_box import BlackBox

__all__ = ["BlackBoxPromptLearner", "LMBlackBox", "Query"]

RATES = {"reinforce_loo": 5.0, "bdpl": 0.01}
"""A logit moves by lr / (I - 1) for one standard deviation of loss, a probability by about lr."""

CALIBRATION_SETS = 4
"""Content-free texts are asked under the demonstrations of so many texts."""


class BlackBoxPromptLearner(ClassifierMixin, BaseEstimator):
    """Learns a prompt, pseudo-labels of the texts and a classifier that uses both.

    Parameters
    ----------
    black_box : callable (list of Query) -> array of shape (n, n_classes)
        An `LMBlackBox` or any function, async too. It may raise, hang or return rubbish: such queries count, are tried
        again, and are then left unanswered.
    classes : sequence, optional
        Names of the classes in the order of its columns; by default `black_box.class_words`.
    vocab : sequence of str, default=()
        Candidate tokens of the prompt, words or phrases. Empty: the first prompt stays, and what is left is in-context
        learning from confident pseudo-labels.
    prompt_length : int, default=4
        m.
    initial_prompt : sequence of str, default=()
        Asked with until the first step of the prompt.
    n_demos : int, default=4
        K demonstrations for a text, at most.
    n_samples : int, default=8
        I prompts for a step, at least 2.
    batch_size : int, default=32
        Texts of a step.
    steps : int, default=5
        Of the prompt in a round.
    rounds : int, default=10
        At most; it ends before by the budget, or after two rounds that changed neither label nor prompt.
    lr : float, optional
        By default 5 for "reinforce_loo" and 0.01 for "bdpl".
    confident_share : float, default=0.2
        Of the texts of each predicted class, those in D_c at first.
    min_per_class : int, default=2
        Of each class at least so many; a class predicted less often takes the texts for which it is likeliest.
    threshold : float, optional
        Confidence at which a text joins D_c; by default the lowest that its class had in D_c at first.
    budget : int or None, default=8000
        Queries in `fit`. So many are set aside that the last labelling can be paid.
    estimator : {"reinforce_loo", "bdpl"}, default="reinforce_loo"
    demo_selector : {"knn", "random"}, default="knn"
        The nearest of D_c, the nearest last; or a random choice balanced over classes, in random order.
    train_with_demos : bool, default=True
        False trains the prompt without demonstrations, the paper's ablation; they are used all the same afterwards.
    calibration : {None, "content-free", "batch"}, default=None
        Divide probabilities by those of `content_free` texts under the same prompt and demonstrations, or by the mean over
        the texts (no extra queries).
    content_free : sequence of str, default=("N/A",)
    embedder : callable (list of str) -> array of shape (n, d), or a transformer, optional
        For "knn"; by default TF-IDF of words.
    call_size : int, default=64
        Queries handed to the black box at once.
    timeout : float, optional
        Seconds for one such call.
    retries : int, default=1
    random_state : int, RandomState or None

    Attributes
    ----------
    prompt_ : tuple of str
    probabilities_ : ndarray of shape (m, N)
        P; (0, 0) without a vocabulary.
    classes_ : ndarray
    texts_ : list of str
    pseudo_labels_ : ndarray of int, shape (n,)
        Index into `classes_`; -1 where the black box gave no answer.
    confidence_ : ndarray of shape (n,)
        Top probability; 1 for given labels, 0 without an answer.
    confident_ : ndarray of bool, shape (n,)
        D_c at the end.
    n_calls_, n_failed_ : int
        Queries sent in `fit`; those given up.
    stop_reason_ : str
        "rounds", "budget", "converged", or what was wrong with the black box.
    history_ : list of dict
        Of every round: `calls`, `changed` labels, `confident`, `histogram` of labels, mean `loss`, `prompt`.

    Notes
    -----
    With all labels given, as in `cross_val_score`, it is supervised prompt learning. What it learned is short: `prompt_` and
    `export`, the labelled texts; `unfused.label.save` refuses it, as a black box is a function.

    Raises
    ------
    ValueError
        For texts that are no strings, unknown labels, and arguments out of range.
    RuntimeError
        If the black box answered not a single query of the first pass.

    Examples
    --------
    >>> def box(queries):
    ...     hit = np.array([("film" in q.text) + 2 * ("movie" in q.prompt) for q in queries])
    ...     good = np.array(["fine" in q.text for q in queries])
    ...     p = np.where(good, 0.55 + 0.1 * hit, 0.45 - 0.1 * hit)
    ...     return np.stack([1 - p, p], axis=1)
    >>> texts = ["fine film", "poor film", "fine day", "poor day", "a fine film", "a poor plot"]
    >>> learner = BlackBoxPromptLearner(box, ["bad", "good"], vocab=["movie", "tax"], prompt_length=1, random_state=0)
    >>> learner.fit(texts).prompt_
    ('movie',)
    >>> learner.predict(["fine weather"]).tolist()
    ['good']
    """

    def __init__(
        self,
        black_box: Callable[[list[Query]], Any] | None = None,
        classes: Sequence[Any] | None = None,
        vocab: Sequence[str] = (),
        prompt_length: int = 4,
        initial_prompt: Sequence[str] = (),
        n_demos: int = 4,
        n_samples: int = 8,
        batch_size: int = 32,
        steps: int = 5,
        rounds: int = 10,
        lr: float | None = None,
        confident_share: float = 0.2,
        min_per_class: int = 2,
        threshold: float | None = None,
        budget: int | None = 8000,
        estimator: str = "reinforce_loo",
        demo_selector: str = "knn",
        train_with_demos: bool = True,
        calibration: str | None = None,
        content_free: Sequence[str] = ("N/A",),
        embedder: Any = None,
        call_size: int = 64,
        timeout: float | None = None,
        retries: int = 1,
        random_state: Any = None,
    ) -> None:
        self.black_box, self.classes, self.vocab, self.prompt_length = (
            black_box,
            classes,
            vocab,
            prompt_length,
        )
        self.initial_prompt, self.n_demos, self.n_samples = initial_prompt, n_demos, n_samples
        self.batch_size, self.steps, self.rounds, self.lr = batch_size, steps, rounds, lr
        self.confident_share, self.min_per_class, self.threshold = confident_share, min_per_class, threshold
        self.budget, self.estimator, self.demo_selector = budget, estimator, demo_selector
        self.train_with_demos, self.calibration, self.content_free = (
            train_with_demos,
            calibration,
            content_free,
        )
        self.embedder, self.call_size, self.timeout = embedder, call_size, timeout
        self.retries, self.random_state = retries, random_state

    # -- learning ----------------------------------------------------------------------------------------------------

    def fit(self, X: Sequence[str], y: Any = None) -> BlackBoxPromptLearner:
        """Learn from texts.

        Parameters
        ----------
        X : sequence of str, length n
        y : sequence, optional
            Labels that are known, names of classes; -1 or None where not. They are in D_c and never change.
        """
        texts = _check_texts(X)
        self._check()
        self.classes_ = _class_names(self.classes, self.black_box)
        given = _given(y, self.classes_, len(texts))
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        self.seed_ = int(rng.integers(2**31))
        box, policy = self._box(self.budget), self._policy()
        self.texts_, self._features = texts, self._embed(texts, fit=True)
        prompt = tuple(self.initial_prompt)
        self._first_pass(box, prompt, given)

        cutoff = self._cutoffs()
        self.history_, self.stop_reason_, still = [], "rounds", 0
        for _ in range(self.rounds):
            demos = self._demos(rng)
            outside = np.flatnonzero(~self.confident_)
            if box.down or box.left < 2 * self._price(len(outside)):
                self.stop_reason_ = "budget"
                break
            before, old = self.pseudo_labels_.copy(), prompt
            self._relabel(box, prompt, demos, outside)
            sure = outside[self.pseudo_labels_[outside] >= 0]
            self.confident_[sure[self.confidence_[sure] >= cutoff[self.pseudo_labels_[sure]]]] = True
            losses = self._steps(box, policy, demos, rng)
            if losses:
                prompt = tuple(self.vocab[j] for j in policy.probabilities().argmax(1))
            changed = int((before != self.pseudo_labels_).sum())
            self.history_.append(
                {
                    "calls": box.n_calls,
                    "changed": changed,
                    "confident": int(self.confident_.sum()),
                    "histogram": np.bincount(
                        self.pseudo_labels_[self.pseudo_labels_ >= 0], minlength=len(self.classes_)
                    ).tolist(),
                    "loss": float(np.mean(losses)) if losses else None,
                    "prompt": prompt,
                }
            )
            still = 0 if changed or old != prompt else still + 1
            if still == 2 or (len(self.vocab) and len(losses) < self.steps):
                self.stop_reason_ = "converged" if still == 2 else "budget"
                break
        self._finish(box, policy, prompt, rng)
        return self

    def _first_pass(self, box: BlackBox, prompt: tuple[str, ...], given: np.ndarray) -> None:
        """Labels without demonstrations, and D_c."""
        found = box([Query(text, prompt) for text in self.texts_])
        if not np.isfinite(found).any():
            raise RuntimeError(
                f"black_box answered none of its first {box.n_calls} queries: {box.error or 'budget=0'}"
            )
        found = _divide(found, self._prior(box, prompt, [()], found))
        self.pseudo_labels_, self.confidence_ = np.full(len(found), -1), np.zeros(len(found))
        self._label(found, np.arange(len(found)))
        known = given >= 0
        self.pseudo_labels_[known], self.confidence_[known] = given[known], 1.0
        self.confident_ = self._most_confident(found, known)

    def _most_confident(self, proba: np.ndarray, known: np.ndarray) -> np.ndarray:
        chosen = known.copy()
        unseen = np.zeros(len(proba), dtype=bool)
        unseen[np.unique([text_key(text) for text in self.texts_], return_index=True)[1]] = True
        for c in range(proba.shape[1]):
            mine = np.flatnonzero((self.pseudo_labels_ == c) & unseen & ~known)
            count = max(self.min_per_class, round(self.confident_share * len(mine)))
            chosen[mine[np.argsort(-self.confidence_[mine], kind="stable")][:count]] = True
        for c in range(proba.shape[1]):
            missing = self.min_per_class - int((chosen & (self.pseudo_labels_ == c)).sum())
            free = np.flatnonzero(np.isfinite(proba[:, c]) & ~chosen & unseen)
            likeliest = free[np.argsort(-proba[free, c], kind="stable")][: max(missing, 0)]
            self.pseudo_labels_[likeliest], self.confidence_[likeliest] = c, proba[likeliest, c]
            chosen[likeliest] = True
        return chosen

    def _cutoffs(self) -> np.ndarray:
        """Confidence at which a text of each class joins D_c."""
        if self.threshold is not None:
            return np.full(len(self.classes_), float(self.threshold))
        lowest = np.full(len(self.classes_), np.inf)
        np.minimum.at(lowest, self.pseudo_labels_[self.confident_], self.confidence_[self.confident_])
        return lowest.clip(1 / len(self.classes_))

    def _relabel(
        self, box: BlackBox, prompt: tuple[str, ...], demos: list[Any], rows: np.ndarray
    ) -> np.ndarray | None:
        """New labels and confidences of some rows; the divisor of their probabilities."""
        found = box([Query(self.texts_[i], prompt, demos[i]) for i in rows])
        prior = self._prior(box, prompt, demos, found)
        self._label(_divide(found, prior), rows)
        return prior

    def _label(self, proba: np.ndarray, rows: np.ndarray) -> None:
        there = np.isfinite(proba).all(1)
        self.pseudo_labels_[rows[there]] = proba[there].argmax(1)
        self.confidence_[rows[there]] = proba[there].max(1)

    def _steps(self, box: BlackBox, policy: Any, demos: list[Any], rng: np.random.Generator) -> list[float]:
        """Steps of the prompt, as many as can be paid: mean losses."""
        shown = demos if self.train_with_demos else [()] * len(demos)
        labelled, losses = np.flatnonzero(self.pseudo_labels_ >= 0), []
        for _ in range(self.steps if len(self.vocab) else 0):
            rows = rng.permutation(labelled)[: self.batch_size]
            last = self._price(int((~self.confident_).sum()))
            if box.down or box.left < self.n_samples * self._price(len(rows)) + last:
                break
            sampled = policy.sample(self.n_samples, rng)  # (I, m)
            prompts = [tuple(self.vocab[j] for j in z) for z in sampled]
            mine = [shown[i] for i in rows]  # all prompts meet the same texts under the same demonstrations
            found = box([Query(self.texts_[i], z, shown[i]) for z in prompts for i in rows])
            found = found.reshape(len(prompts), len(rows), -1)  # (I, B, C)
            priors = [self._prior(box, z, mine, p) for z, p in zip(prompts, found, strict=True)]
            proba = np.stack([_divide(p, prior) for p, prior in zip(found, priors, strict=True)])
            loss = -np.log(proba[:, np.arange(len(rows)), self.pseudo_labels_[rows]].clip(1e-6))
            if (there := np.isfinite(loss).all(0)).any():
                policy.step(sampled, loss[:, there].mean(1))
                losses.append(float(loss[:, there].mean()))
        return losses

    def _finish(self, box: BlackBox, policy: Any, prompt: tuple[str, ...], rng: np.random.Generator) -> None:
        """Label what is outside D_c under the last prompt, and keep what `predict` needs."""
        demos = self._demos(rng)
        self.prior_ = self._relabel(box, prompt, demos, np.flatnonzero(~self.confident_))
        self.prompt_, self.probabilities_ = prompt, policy.probabilities().copy()
        self.n_calls_, self.n_failed_ = box.n_calls, box.n_failed
        if box.down:
            self.stop_reason_ = f"black_box failed {box.patience} times in a row: {box.error}"
        if box.n_failed:
            warnings.warn(f"black_box left {box.n_failed} queries unanswered: {box.error}", stacklevel=3)
        del self._features

    def _demos(self, rng: np.random.Generator) -> list[Any]:
        """Demonstrations of every text, out of D_c."""
        rows = np.flatnonzero(self.confident_)
        features = None if self._features is None else self._features[rows]
        texts = [self.texts_[i] for i in rows]
        self.demonstrations_ = Demonstrations(
            texts, self.pseudo_labels_[rows], features, self.demo_selector, self.n_demos
        )
        return self.demonstrations_.choose(self.texts_, self._features, rng)

    # -- calibration and cost ----------------------------------------------------------------------------------------

    def _prior(
        self, box: BlackBox, prompt: tuple[str, ...], demos: Sequence[Any], found: np.ndarray
    ) -> np.ndarray | None:
        """What probabilities are divided by, (C,)."""
        if self.calibration is None:
            return None
        if self.calibration == "content-free":
            apart = demos[:: max(1, len(demos) // CALIBRATION_SETS)][:CALIBRATION_SETS]
            found = box([Query(text, prompt, shown) for shown in apart for text in self.content_free])
        there = np.isfinite(found).all(1)
        return found[there].mean(0) if there.any() else None

    def _price(self, n: int) -> int:
        """Queries that `n` texts cost under one prompt."""
        free = (
            len(self.content_free) * min(CALIBRATION_SETS + 1, n) if self.calibration == "content-free" else 0
        )
        return n + free

    # -- use ---------------------------------------------------------------------------------------------------------

    def predict_proba(self, X: Sequence[str], prompt: Sequence[str] | None = None) -> np.ndarray:
        """Probabilities under prompt and demonstrations, (n, C); uniform, with a warning, where no answer came.

        Parameters
        ----------
        X : sequence of str
            A text that is among the demonstrations is not shown to itself.
        prompt : sequence of str, optional
            Another one than the learned.
        """
        check_is_fitted(self, "prompt_")
        texts = _check_texts(X)
        rng = np.random.default_rng(self.seed_)
        demos = self.demonstrations_.choose(texts, self._embed(texts, fit=False), rng)
        used, box = self.prompt_ if prompt is None else tuple(prompt), self._box(None)
        found = _divide(box([Query(t, used, d) for t, d in zip(texts, demos, strict=True)]), self.prior_)
        there = np.isfinite(found).all(1, keepdims=True)
        if not there.all():
            warnings.warn(f"black_box left {(~there).sum()} texts unanswered: {box.error}", stacklevel=2)
        return np.where(there, found, 1 / len(self.classes_))

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """Classes, (n,)."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def to_dataset(self, confident: bool = False) -> list[dict[str, Any]]:
        """The texts with their labels: rows for `datasets.Dataset.from_list`. Texts that got no label are left out.

        Parameters
        ----------
        confident : bool, default=False
            D_c alone.
        """
        check_is_fitted(self, "prompt_")
        kept = self.confident_ if confident else self.pseudo_labels_ >= 0
        return [
            {
                "text": self.texts_[i],
                "label": self.classes_[self.pseudo_labels_[i]].item(),
                "confidence": float(self.confidence_[i]),
            }
            for i in np.flatnonzero(kept)
        ]

    def export(self, path: str | Path, confident: bool = False) -> None:
        """`to_dataset` as JSON lines, what fine-tuning endpoints take."""
        rows = self.to_dataset(confident)
        with atomic_write(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _box(self, budget: int | None) -> BlackBox:
        return BlackBox(
            self.black_box,  # type: ignore[arg-type]
            len(self.classes_),
            budget,
            self.call_size,
            self.timeout,
            self.retries,
        )

    def _policy(self) -> Any:
        kind = SoftmaxPolicy if self.estimator == "reinforce_loo" else SimplexPolicy
        places = self.prompt_length if len(self.vocab) else 0
        return kind(places, len(self.vocab), RATES[self.estimator] if self.lr is None else self.lr)

    def _embed(self, texts: list[str], fit: bool) -> Any:
        """Rows of length 1; None where nothing needs them."""
        if self.demo_selector != "knn" or not self.n_demos:
            return None
        if self.embedder is not None and not hasattr(self.embedder, "transform"):
            features = np.asarray(self.embedder(texts), dtype=float)
        else:
            if fit:
                words = TfidfVectorizer(token_pattern=r"\S+")
                self.embedder_ = (words if self.embedder is None else clone(self.embedder)).fit(texts)
            features = self.embedder_.transform(texts)
        return normalize(features)

    def _check(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        need(callable(self.black_box), "black_box is missing: give a function, or an LMBlackBox")
        need(self.estimator in RATES, f"estimator={self.estimator!r}: choose {' or '.join(map(repr, RATES))}")
        need(
            self.demo_selector in ("knn", "random"),
            f"demo_selector={self.demo_selector!r}: choose 'knn' or 'random'",
        )
        need(
            self.calibration in (None, "content-free", "batch"),
            f"calibration={self.calibration!r}: choose None, 'content-free' or 'batch'",
        )
        need(self.n_samples >= 2, f"n_samples={self.n_samples}: the baseline needs at least 2 prompts")
        need(
            0 < self.confident_share <= 1,
            f"confident_share={self.confident_share}: it is a share, above 0 and up to 1",
        )
        for name in ("prompt_length", "batch_size", "min_per_class", "call_size"):
            need(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: at least 1 is needed")
        for name in ("n_demos", "steps", "rounds", "retries"):
            need(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: it cannot be negative")
        need(
            self.budget is None or self.budget >= 1,
            f"budget={self.budget}: at least 1 query is needed, or None",
        )
        need(not isinstance(self.vocab, str), f"vocab={self.vocab!r}: give a list of tokens, not one string")
        need(len(set(self.vocab)) == len(self.vocab), "vocab has a token twice")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.target_tags.required = False
        return tags


def _divide(proba: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
    if prior is None:
        return proba
    scaled = proba / prior.clip(1e-6)
    return scaled / scaled.sum(-1, keepdims=True)


def _check_texts(X: Any) -> list[str]:
    if isinstance(X, str):
        raise ValueError("X is one string: give a list of texts")
    texts = X.tolist() if hasattr(X, "tolist") else list(X)
    if not texts:
        raise ValueError("X has 0 samples: at least one text is needed")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"X[{i}] is {text!r:.60}, not a text")
    if not any(map(str.strip, texts)):
        raise ValueError("X has only empty texts")
    return texts


def _class_names(classes: Any, black_box: Any) -> np.ndarray:
    found = getattr(black_box, "class_words", None) if classes is None else classes
    if found is None:
        raise ValueError("classes is missing: name them in the order of the black box's columns")
    names = np.asarray(found)
    if names.ndim != 1 or len(names) < 2 or len(np.unique(names)) < len(names):
        raise ValueError(f"classes={list(found)!r}: at least two different names are needed")
    if names.dtype.kind == "U" and not all(name.strip() for name in names.tolist()):
        raise ValueError(f"classes={list(found)!r}: a name is empty")
    return names


def _given(y: Any, classes: np.ndarray, n: int) -> np.ndarray:
    """Index of each known label, -1 where there is none."""
    if y is None:
        return np.full(n, -1)
    values = y.tolist() if hasattr(y, "tolist") else list(y)
    if len(values) != n:
        raise ValueError(f"y has {len(values)} labels for {n} texts")
    index = {name: i for i, name in enumerate(classes.tolist())}
    unknown = {value for value in values if value not in index and value not in (-1, None, "-1")}
    if unknown:
        raise ValueError(f"y has {sorted(map(str, unknown))}, which classes lacks")
    return np.array([index.get(value, -1) for value in values])
