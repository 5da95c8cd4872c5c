"""CapS-Adapter: a cache whose keys are generated images and the captions they were generated from.

*CapS*: a few images of the target domain are captioned, and from "A photo of <class>. <caption>" new images are generated,
so that the support looks like the domain, which images from class names alone do not. Image features F and caption
features G are both kept. *M-Adapter* mixes their affinities and adds a vote and a distance of class distributions:
    A = (1 - delta) x F' + delta x G',   K = KL(p(x) || p(f)),   p(z) = softmax(z W' / tau),
    logits = scale x W' + alpha exp(-beta (1 - A)) V - gamma K_scaled V,
with K rescaled to the range of A. M-Adapter-F is gamma = 0; Tip-X is delta = 0. The four numbers are chosen on labelled
validation data; alpha and gamma enter linearly, so that all their values together cost no more than the gammas alone.

Deviations: the ranges of K and A are those of the validation data (of the support without them), so that a prediction
does not depend on what else is predicted; the release's class distribution softmaxes the feature itself, W unused
(`distribution="feature"` does that), and its loop leaves the last rows of K at 0, which this one does not.

Reference: CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification, ACM Multimedia 2024, arXiv:2405.16591.
Needs: few labels, features, text features, optionally a captioner, optionally a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.utils.validation import validate_data

from unfused.nn.cache_model import Keys, divergence, linear_grid
from unfused.nn.zero_shot import (
    FLOATS,
    LogitClassifier,
    align_classes,
    check_labels,
    check_text_features,
    class_labels,
    label_index,
    row_blocks,
    unit_rows,
)

__all__ = ["CaptionSupport", "MAdapterClassifier", "build_caption_support"]

GRIDS = {
    "alpha": 0.1 + np.arange(20) * 49.9 / 20,
    "beta": 1 + np.arange(200) * 49 / 200,
    "gamma": 0.1 + np.arange(50) * 29.9 / 50,
    "delta": np.arange(11) / 10,
}
WITHOUT_VALIDATION = {"alpha": 1.0, "beta": 5.5, "gamma": 0.1, "delta": 0.5}


class MAdapterClassifier(LogitClassifier):
    """Zero-shot logits plus the vote of image and caption keys.

    Parameters
    ----------
    text_features : array-like of shape (n_classes, n_features), optional
        One row a class, normalised here, as X is. None: class means of the keys, and no zero-shot part.
    classes : array-like of shape (n_classes,), optional
        Labels of those rows; by default the sorted labels of y.
    alpha, beta, gamma, delta : float, "grid" or array-like, default="grid"
        Weight and sharpness of the vote, weight of the distance, share of the captions in the affinity. "grid" is the
        paper's 20, 200, 50 and 11 values, an array other candidates; the best on `X_val` is taken (the first of equals,
        delta outermost, then beta, alpha, gamma). Without validation data "grid" means 1, 5.5, 0.1 and 0.5. Without
        caption features delta is 0.
    tau : float, default=0.5
        Temperature of the class distributions.
    logit_scale : float, default=100.0
        Of the zero-shot logits: CLIP's 100; `model.logit_scale.exp()` of another.
    distribution : {"class", "feature"}, default="class"
        Softmax of `x W' / tau`, or, as the released code has it, of the feature itself over tau.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted.
    alpha_, beta_, gamma_, delta_ : float
    score_ : float
        Accuracy of the choice on the validation data; absent without.
    keys_, caption_keys_ : ndarray of shape (n_keys, n_features)
        Unit rows, class by class; the second None without captions.
    key_index_ : ndarray of int, shape (n_keys,)
    affinity_range_, divergence_range_ : (float, float)
        Smallest and largest A and K seen.
    text_features_ : ndarray of shape (n_classes, n_features)
    n_features_in_, feature_names_in_

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W = np.eye(3, 8)
    >>> y = np.arange(24) % 3
    >>> F = rng.normal(size=(24, 8)) * 0.4 + 2 * W[y]                 # images
    >>> G = rng.normal(size=(24, 8)) * 0.2 + W[y]                     # their captions
    >>> clf = MAdapterClassifier(W, beta=[1, 5.5], gamma=0.0).fit(F, y, caption_features=G, X_val=F, y_val=y)
    >>> clf.predict([[0, 2, 0, 0, 0, 0, 0, 0.3]]), clf.score_
    (array([1]), 1.0)
    """

    text_features_: Any

    def __init__(
        self,
        text_features: Any = None,
        *,
        classes: Any = None,
        alpha: Any = "grid",
        beta: Any = "grid",
        gamma: Any = "grid",
        delta: Any = "grid",
        tau: float = 0.5,
        logit_scale: float = 100.0,
        distribution: str = "class",
    ) -> None:
        self.text_features = text_features
        self.classes = classes
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.delta = delta
        self.tau = tau
        self.logit_scale = logit_scale
        self.distribution = distribution

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        caption_features: Any = None,
        text_features: Any = None,
        X_val: Any = None,
        y_val: Any = None,
    ) -> MAdapterClassifier:
        """Take the keys and choose the numbers.

        Parameters
        ----------
        X : array-like of shape (n_keys, n_features)
            Features of generated images (`build_caption_support`), or of a few real ones.
        y : array-like of shape (n_keys,)
        caption_features : array-like of shape (n_keys, n_features), optional
            Text features of their captions.
        text_features : array-like, optional
            Instead of the constructor's.
        X_val, y_val : array-like, optional
            Labelled validation data.

        Raises
        ------
        ValueError
            For NaN, one class, features that do not fit together, repeated names, settings out of their range.
        """
        if self.distribution not in ("class", "feature"):
            raise ValueError(f"distribution={self.distribution!r}: choose 'class' or 'feature'")
        if not self.tau > 0 or not self.logit_scale >= 0:
            raise ValueError(f"tau={self.tau}, logit_scale={self.logit_scale}: give positive numbers")
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_labels(y)
        text = self.text_features if text_features is None else text_features
        text = None if text is None else check_text_features(text, X.shape[1])
        self.classes_, self.text_features_ = align_classes(y, text, self.classes)
        keys, order = Keys.sort(unit_rows(X), label_index(y, self.classes_), len(self.classes_))
        self.keys_, self.key_index_, self.caption_keys_ = keys.features, keys.index, None
        if caption_features is not None:
            captions = check_text_features(caption_features, X.shape[1], name="caption_features")
            if len(captions) != len(X):
                raise ValueError(
                    f"caption_features has {len(captions)} rows, X has {len(X)}: give one to each image"
                )
            self.caption_keys_ = captions[order].astype(X.dtype)
        self._zero_shot = 1.0 if text is not None else 0.0
        if text is None:
            sums = np.zeros((keys.n_classes, X.shape[1]))
            np.add.at(sums, keys.index, keys.features)
            self.text_features_ = unit_rows(sums)
        self.__dict__.pop("score_", None)
        if X_val is None:
            self._set_ranges(self.keys_, {name: self._candidates(name, chosen=True)[0] for name in GRIDS})
        else:
            X_val, index = self._validation(X_val, y_val)
            self._choose(unit_rows(X_val), index)
        return self

    def _candidates(self, name: str, chosen: bool = False) -> np.ndarray:
        """The values that a parameter may take; the one that it has without validation data with `chosen`."""
        value = getattr(self, name)
        if name == "delta" and self.caption_keys_ is None:
            return np.zeros(1)
        if isinstance(value, str):
            if value != "grid":
                raise ValueError(f"{name}={value!r}: give a number, an array of candidates, or 'grid'")
            return np.array([WITHOUT_VALIDATION[name]]) if chosen else GRIDS[name]
        values = np.atleast_1d(np.asarray(value, np.float64))
        if values.ndim != 1 or not len(values) or not (values >= 0).all() or not np.isfinite(values).all():
            raise ValueError(f"{name}={value!r}: give numbers that are not negative")
        if name == "delta" and values.max() > 1:
            raise ValueError(f"delta={value!r}: the captions' share lies between 0 and 1")
        if chosen and len(values) > 1:
            raise ValueError(f"{name} has {len(values)} candidates: give X_val and y_val to choose on")
        return values

    def _choose(self, x: np.ndarray, index: np.ndarray) -> None:
        """Every combination on validation data."""
        alphas, betas, gammas, deltas = (self._candidates(name) for name in GRIDS)
        keys = Keys(self.keys_, self.key_index_, len(self.classes_))
        apart = self._divergence(x)
        sums = keys.votes(apart)
        base = self._base(x)
        best: tuple[float, dict[str, float]] = (-1.0, {})
        for delta in deltas:
            affinity = self._affinity(x, float(delta))
            slope, offset = _rescale((apart.min(), apart.max()), (affinity.min(), affinity.max()))
            distance = -(slope * sums + offset * np.bincount(keys.index, minlength=keys.n_classes))
            for beta in betas:
                votes = keys.votes(np.exp(beta * (affinity - 1)))
                scores = linear_grid(base, votes, distance, index, alphas, gammas)
                at = np.unravel_index(scores.argmax(), scores.shape)
                if scores[at] > best[0]:
                    found = {"alpha": alphas[at[0]], "beta": beta, "gamma": gammas[at[1]], "delta": delta}
                    best = (float(scores[at]), {name: float(value) for name, value in found.items()})
        self.score_ = best[0]
        self._set_ranges(x, best[1])

    def _set_ranges(self, x: np.ndarray, chosen: dict[str, Any]) -> None:
        for name, value in chosen.items():
            setattr(self, f"{name}_", float(value))
        low_high = [[], []]  # type: list[list[tuple[float, float]]]
        for rows in row_blocks(len(x), self._row_width()):
            for found, part in zip(
                low_high, (self._affinity(x[rows], self.delta_), self._divergence(x[rows])), strict=True
            ):
                found.append((float(part.min()), float(part.max())))
        self.affinity_range_, self.divergence_range_ = (
            (min(low for low, _ in found), max(high for _, high in found)) for found in low_high
        )

    def _affinity(self, x: np.ndarray, delta: float) -> np.ndarray:
        if self.caption_keys_ is None or not delta:
            return x @ self.keys_.T.astype(x.dtype)
        # One product with the mixture of both keys instead of two products.
        return x @ ((1 - delta) * self.keys_ + delta * self.caption_keys_).T.astype(x.dtype)

    def _divergence(self, x: np.ndarray) -> np.ndarray:
        text = self.text_features_.astype(x.dtype) if self.distribution == "class" else None
        return divergence(x, self.keys_.astype(x.dtype), text, 1 / self.tau)

    def _base(self, x: np.ndarray) -> np.ndarray:
        return self._zero_shot * self.logit_scale * (x @ self.text_features_.T.astype(x.dtype))

    def _logits(self, X: np.ndarray) -> np.ndarray:
        x = unit_rows(X)
        keys = Keys(self.keys_, self.key_index_, len(self.classes_))
        logits = self._base(x) + self.alpha_ * keys.votes(
            np.exp(self.beta_ * (self._affinity(x, self.delta_) - 1))
        )
        if self.gamma_:
            slope, offset = _rescale(self.divergence_range_, self.affinity_range_)
            logits -= self.gamma_ * keys.votes(slope * self._divergence(x) + offset)
        return logits

    def _row_width(self) -> int:
        return 3 * len(self.keys_) + 3 * len(self.classes_)


def _rescale(source: tuple[float, float], target: tuple[float, float]) -> tuple[float, float]:
    """Slope and offset that bring one range to another; the middle of the target where the source is a point."""
    wide = float(source[1] - source[0])
    if wide <= 0:
        return 0.0, float(target[0] + target[1]) / 2
    slope = float(target[1] - target[0]) / wide
    return slope, float(target[0] - slope * source[0])


# -- CapS --------------------------------------------------------------------------------------------------------------


@dataclass
class CaptionSupport:
    """Keys for `MAdapterClassifier.fit(s.image_features, s.labels, caption_features=s.caption_features)`.

    Attributes
    ----------
    image_features, caption_features : ndarray of shape (n_keys, n_features)
        Unit rows.
    labels : ndarray of shape (n_keys,)
        Class names.
    prompts : list of str
        What each image was generated from, and what its caption feature is of.
    images : list
        As the generator gave them.
    failures : list of dict
        `stage` ("captioner" or "generator"), `class`, `input` (number of the image, or the prompt), `reason`.
    """

    image_features: np.ndarray
    caption_features: np.ndarray
    labels: np.ndarray
    prompts: list[str]
    images: list[Any] = field(repr=False)
    failures: list[dict[str, Any]] = field(default_factory=list)


def build_caption_support(
    images: Sequence[Any],
    labels: Any,
    captioner: Callable[[Any], Any],
    generator: Callable[[str], Any],
    encode_images: Callable[[list[Any]], Any],
    encode_texts: Callable[[list[str]], Any],
    *,
    images_per_class: int = 10,
    template: str = "A photo of {name}. {caption}",
    max_tries: int = 3,
) -> CaptionSupport:
    """Caption images of the target domain, generate new ones from the captions, encode both.

    What fails is written down and passed over: a captioner that raises or says nothing costs an image, a class none of
    whose images could be captioned is generated from its name alone, and a generated image that is missing, black or of
    one colour (a safety checker's) is tried again from the class's next caption.

    Parameters
    ----------
    images : sequence
        A few of each class, whatever the captioner takes.
    labels : array-like of str, shape (n_images,)
        Names of their classes.
    captioner : callable
        Image -> text. A transformers `image-to-text` pipeline fits as it is: `[{"generated_text": ...}]` is understood.
    generator : callable
        Prompt -> image. A diffusers pipeline fits as it is, or with its settings bound by `functools.partial(pipe,
        guidance_scale=9.5, num_inference_steps=85)`: the first of `.images` is taken.
    encode_images, encode_texts : callable
        List -> array (n, n_features), from one image-text model.
    images_per_class : int, default=10
        To generate.
    template : str
        With `{name}` and `{caption}`.
    max_tries : int, default=3
        The generator is called at most this many times `images_per_class` for a class.

    Returns
    -------
    CaptionSupport

    Raises
    ------
    ValueError
        If a class got no image at all; the message has the generator's last reason.

    Examples
    --------
    >>> paint = lambda prompt: np.random.default_rng(len(prompt)).random((4, 4, 3))
    >>> support = build_caption_support(
    ...     [0, 1, 2, 3], ["cat", "cat", "dog", "dog"], lambda i: f"number {i}", paint,
    ...     lambda pictures: [p.mean((0, 1)) for p in pictures], lambda texts: np.ones((len(texts), 3)), images_per_class=3,
    ... )
    >>> support.prompts[:3], support.image_features.shape
    (['A photo of cat. number 0', 'A photo of cat. number 1', 'A photo of cat. number 0'], (6, 3))
    """
    names = np.asarray(labels)
    if len(names) != len(images) or not len(names):
        raise ValueError(
            f"labels has {len(names)} entries for {len(images)} images: give one to each of at least one"
        )
    if images_per_class < 1 or max_tries < 1:
        raise ValueError(
            f"images_per_class={images_per_class}, max_tries={max_tries}: at least 1 of each is needed"
        )
    if "{name}" not in template:
        raise ValueError(f"template={template!r}: it needs {{name}} (and {{caption}})")
    order = class_labels(list(dict.fromkeys(names.tolist())), name="labels").tolist()
    support = CaptionSupport(np.empty(0), np.empty(0), np.empty(0), [], [])
    found: list[Any] = []
    for name in order:
        captions = list(_captions(name, np.flatnonzero(names == name), images, captioner, support.failures))
        reason, made, tries = "", 0, images_per_class * max_tries
        for attempt in range(tries):
            if made == images_per_class:
                break
            prompt = template.format(
                name=name, caption=captions[attempt % len(captions)] if captions else ""
            ).strip()
            picture, reason = _generate(generator, prompt)
            if reason:
                support.failures.append(
                    {"stage": "generator", "class": name, "input": prompt, "reason": reason}
                )
                continue
            support.images.append(picture)
            support.prompts.append(prompt)
            found.append(name)
            made += 1
        if not made:
            raise ValueError(f"generator gave no image of class {name!r} in {tries} tries: {reason}")
    support.labels = np.asarray(found)
    support.image_features = unit_rows(np.asarray(encode_images(support.images), np.float64))
    support.caption_features = unit_rows(np.asarray(encode_texts(support.prompts), np.float64))
    return support


def _captions(
    name: Any,
    rows: np.ndarray,
    images: Sequence[Any],
    captioner: Callable[[Any], Any],
    failures: list[dict[str, Any]],
) -> Iterator[str]:
    for row in rows.tolist():
        try:
            caption, reason = _text(captioner(images[row])), "it said nothing"
        except Exception as error:  # whatever a captioner raises costs this image, not the run
            caption, reason = "", f"{type(error).__name__}: {error}"
        if caption:
            yield caption
        else:
            failures.append({"stage": "captioner", "class": name, "input": row, "reason": reason})


def _text(said: Any) -> str:
    """The text in a string, in transformers' `[{"generated_text": ...}]`, or in a chat whose last turn has `content`."""
    while isinstance(said, list | tuple) and said:
        said = said[-1] if isinstance(said[-1], dict) and "role" in said[-1] else said[0]
    if isinstance(said, dict):
        return _text(said.get("generated_text", said.get("text", said.get("content", ""))))
    if not isinstance(said, str):
        raise TypeError(f"a captioner returns text, not {type(said).__name__}")
    return " ".join(said.split())


def _generate(generator: Callable[[str], Any], prompt: str) -> tuple[Any, str]:
    """A picture, and why it cannot be used."""
    try:
        made = generator(prompt)
        picture = getattr(made, "images", made)
        if isinstance(picture, list | tuple):
            picture = picture[0] if picture else []
        pixels = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture, np.float64)
    except Exception as error:  # one image, not the run
        return None, f"{type(error).__name__}: {error}"
    if not pixels.size or pixels.ndim < 2 or not np.isfinite(pixels).all():
        return None, f"no picture (shape {pixels.shape})"
    if np.ptp(pixels) == 0:
        return None, "black, or of one colour"
    return picture, ""
