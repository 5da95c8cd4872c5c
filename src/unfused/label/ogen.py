"""OGEN: tuning on known classes that keeps the unknown ones, by image features generated from their names alone.

A small generator makes the feature of class c from its text and related classes: one attention and one MLP,
    g(Q, K, V) = unit( MLP(Q) + MHA(Q, K, V) ),
Q texts of what is to be made, K texts and V image features of what is known. For a batch of unit features z with labels y,
means M and deviations S of the known classes, the k classes nearest to y, and u uniform in [0, 1)^D, drawn once a batch:
    z1 = g(w_y; w_near, M_near + u S_near)       a known class played as unknown: towards z
    z2 = g(w_near; w_y, z)                       the reverse: towards M_near + u S_near
    z3 = g(w_new; ...)                           of the k unknown classes nearest to y, with gradient to their texts
    L = D MSE(z1) + D MSE(z2) + .25 CE(z1) + .25/k CE(z2) + .5/k CE(z3) + .25 CE(z) + distillation
and for the first fifth of the epochs the two MSE alone, which move nothing but the generator. The generator is thrown away.
The distillation pulls the predictions on all generated features towards those of an *adaptive local mean teacher*, the average
of the checkpoints of a window that grows with the epochs (`unfused.nn.local_mean`).

z3 has two forms. "joint", the paper's: K and V are the k known classes nearest to the new one. "single", the release's: K is
w_y and V is z, so that attention is but the value projection. Names of the unknown classes at training time are an advantage
over a tuner that lacks them: `synthetic="text"`, which takes their texts themselves as features, has it too: to be beaten.
The teacher is not in the release; its formula and the squared difference of probabilities are from recollection.

Reference: Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD Generalization, ICLR 2024, arXiv:2401.15914.
Needs: few labels, features, text features, names of unknown classes, gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from unfused.label._ogen_objective import FeatureGenerator, OGENOutput, OGENRegularizer
from unfused.nn.ema import EMA
from unfused.nn.estimators import draw_seed
from unfused.nn.local_mean import LocalMeanTeacher
from unfused.nn.prompt_context import context_encoder, without_gradients
from unfused.nn.zero_shot import (
    FLOATS,
    LogitClassifier,
    align_classes,
    check_labels,
    check_text_features,
    class_labels,
    label_index,
    unit_rows,
)

__all__ = [
    "FeatureGenerator",
    "LocalMeanTeacher",
    "LocalMeanTeacherCallback",
    "OGENClassifier",
    "OGENOutput",
    "OGENPromptClassifier",
    "OGENRegularizer",
]

SYNTHETIC = ("generator", "text", None)
TEACHERS = ("local", "ema", None)
TUNERS = ("image", "text", "both")


class LocalMeanTeacherCallback(TrainerCallback):
    """Keeps a `LocalMeanTeacher` up to date under `transformers.Trainer`, at the end of every epoch.

    Parameters
    ----------
    teacher : LocalMeanTeacher
    module : nn.Module, optional
        What is averaged, such as the tuner inside the model; by default the whole model.
    """

    def __init__(self, teacher: LocalMeanTeacher, module: nn.Module | None = None) -> None:
        self.teacher, self.module = teacher, module

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        module = self.module if self.module is not None else kwargs["model"]
        self.teacher.update(module, round(state.epoch) - 1, max(1, math.ceil(args.num_train_epochs)))


# -- tuners and their training -----------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """unit(x + W2 ReLU(W1 x)), W2 zero at first, so that training starts at zero-shot."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x + self.up(torch.relu(self.down(x))), dim=-1)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(layer.weight.detach().cpu().numpy().copy() for layer in (self.down, self.up))  # type: ignore[return-value]


class _Adapters(nn.Module):
    def __init__(self, base: Tensor, new: Tensor | None, tuner: str, hidden: int) -> None:
        super().__init__()
        self.count = len(base)
        self.register_buffer("raw", base if new is None else torch.cat([base, new]), persistent=False)
        dim = base.shape[1]
        self.image: nn.Module = _Residual(dim, hidden) if tuner != "text" else nn.Identity()
        self.text: nn.Module = _Residual(dim, hidden) if tuner != "image" else nn.Identity()

    def texts(self) -> tuple[Tensor, Tensor]:
        found = self.text(self.raw)
        return found[: self.count], found[self.count :]


class _Context(nn.Module):
    def __init__(self, vectors: Tensor, encode: Callable[[Tensor], Tensor], count: int) -> None:
        super().__init__()
        self.vectors, self.encode, self.count = nn.Parameter(vectors), encode, count
        self.image = nn.Identity()

    def texts(self) -> tuple[Tensor, Tensor]:
        found = self.encode(self.vectors)
        return found[: self.count], found[self.count :]


class _OGEN(LogitClassifier):
    """The settings and the training that both classifiers share."""

    synthetic: Any
    teacher: Any
    classes_: Any
    loss_curve_: Any
    image_down_: Any
    image_up_: Any
    text_down_: Any
    text_up_: Any

    def _check(self) -> None:
        for name, allowed in (("synthetic", SYNTHETIC), ("teacher", TEACHERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {allowed}")
        for name in ("epochs", "batch_size", "k", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        for name in ("learning_rate", "logit_scale"):
            value = getattr(self, name)
            if not (value is None and name == "logit_scale") and not 0 < value < np.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")

    def _train(
        self, tuner: Any, X: np.ndarray, index: np.ndarray, scale: float, optimizer: Callable[[list], Any]
    ) -> None:
        """Train `tuner` (`image`, `texts()`) in place."""
        settings: Any = self
        z, y = torch.from_numpy(np.asarray(X, np.float32)), torch.from_numpy(index.astype(np.int64))
        epochs = int(settings.epochs)
        regularizer = OGENRegularizer(
            z.shape[1],
            settings.k,
            math.gcd(settings.num_heads, z.shape[1]),
            settings.dropout,
            warmup=settings.warmup,
            weights=settings.weights,
            distill_weight=settings.distill_weight,
            extrapolation=settings.extrapolation,
            spread=settings.spread,
            detach_synthetic=settings.detach_synthetic,
        ).fit_statistics(z, y)
        both = nn.ModuleDict({"tuner": tuner, "generator": regularizer.generator}).train()
        local = LocalMeanTeacher(settings.m_min, settings.m_max, settings.decay)
        ema = EMA(both, settings.decay) if self.teacher == "ema" else None
        trained = optimizer([*(both if self.synthetic == "generator" else tuner).parameters()])
        self.loss_curve_ = []
        for epoch in range(epochs):
            _set_rate(trained, settings.learning_rate, epoch, epochs)
            teach = None
            if self.teacher and self.synthetic == "generator" and epoch and epoch >= settings.warmup * epochs:
                teach = _teacher((ema or local).module["tuner"], scale)  # type: ignore[index]
            total = 0.0
            for rows in torch.randperm(len(z)).split(int(settings.batch_size)):
                base, new = tuner.texts()
                if self.synthetic == "generator":
                    loss = regularizer(
                        z[rows],
                        y[rows],
                        base,
                        new,
                        scale,
                        epoch=epoch,
                        num_epochs=epochs,
                        adapt=tuner.image,
                        teacher=teach,
                    ).loss
                else:
                    loss = F.cross_entropy(scale * tuner.image(z[rows]) @ base.T, y[rows])
                    if self.synthetic == "text" and len(new):
                        k = min(settings.k, len(new))
                        nearest = (base.detach() @ new.detach().T).topk(k).indices[y[rows]].flatten()
                        of_names = F.cross_entropy(scale * tuner.image(new[nearest]) @ new.T, nearest)
                        loss = settings.weights[3] * loss + settings.weights[2] / k * of_names
                trained.zero_grad()
                if loss.requires_grad:
                    loss.backward()
                trained.step()
                total += float(loss.detach()) * len(rows)
            self.loss_curve_.append(total / len(z))
            if ema is not None:
                ema.update()
            elif self.teacher and self.synthetic == "generator":
                local.update(both, epoch, epochs)


def _set_rate(optimizer: Any, rate: float, epoch: int, epochs: int) -> None:
    """One epoch at 1e-5, then a cosine to 0."""
    if epochs > 1:
        rate = min(1e-5, rate) if epoch == 0 else rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def _teacher(tuner: Any, scale: float) -> Callable[[Tensor], Tensor]:
    texts = torch.cat(tuner.texts())
    return lambda features: scale * tuner.image(features) @ texts.T


class OGENClassifier(_OGEN):
    """A small residual adapter on frozen image-text features, tuned on known classes so that unknown ones survive.

    `predict` chooses among the known classes; `logits` takes the text features of any others. The adapter is
    `unit(x + W2 ReLU(W1 x))`, on image features, on text features (of known and unknown classes alike), or both.

    Parameters
    ----------
    text_features : array-like of shape (n_classes, n_features), optional
        Of the known classes. None: the class means of X, and nothing is zero-shot any more.
    new_text_features : array-like of shape (n_new, n_features), optional
        Of unknown classes: the ones to be met, or better any others, for then the comparison with a plain tuner is fair.
    classes : array-like of shape (n_classes,), optional
        Labels of the rows of `text_features`; by default the sorted labels of y.
    tuner : {"image", "text", "both"}, default="image"
    synthetic : {"generator", "text", None}, default="generator"
        OGEN; the new classes' texts themselves as their image features; or plain cross-entropy: the baselines.
    teacher : {"local", "ema", None}, default="local"
        The adaptive local mean teacher; an average over all epochs; no distillation.
    extrapolation, spread, detach_synthetic, k, num_heads, dropout, warmup, weights, distill_weight
        See `OGENRegularizer`; of `num_heads` the largest common divisor with n_features is used.
    m_min, m_max, decay
        See `LocalMeanTeacher`.
    reduction : int, default=4
        The adapter is n_features / reduction wide.
    epochs, batch_size : int, default=50, 32
    learning_rate, weight_decay : float, default=0.003, 0.0
        Of AdamW; one epoch at 1e-5, then a cosine.
    logit_scale : float, default=100.0
        `model.logit_scale.exp()`.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    text_features_, new_text_features_ : ndarray
        Unit rows before the adapter.
    image_down_, image_up_, text_down_, text_up_ : ndarray
        The adapters, (hidden, n_features) and (n_features, hidden); of a side that is not tuned, with hidden 0.
        Scaling the `up` ones by 0..1 interpolates between zero-shot and tuned.
    loss_curve_ : list of float, one an epoch
    n_features_in_, feature_names_in_

    Raises
    ------
    ValueError
        For NaN, one class, text features of another width, a class without sample, settings out of their range.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> W = rng.normal(size=(8, 16))                       # texts of 8 classes, 5 of which have labels
    >>> y = np.arange(40) % 5
    >>> X = W[y] + 0.5 * rng.normal(size=(40, 16))
    >>> clf = OGENClassifier(W[:5], W[5:], epochs=5, random_state=0).fit(X, y)
    >>> float(clf.score(X, y)) > 0.9, clf.logits(X, W[5:]).shape
    (True, (40, 3))
    """

    def __init__(
        self,
        text_features: Any = None,
        new_text_features: Any = None,
        *,
        classes: Any = None,
        tuner: str = "image",
        synthetic: str | None = "generator",
        teacher: str | None = "local",
        extrapolation: str = "joint",
        spread: str = "upward",
        detach_synthetic: bool = False,
        k: int = 3,
        num_heads: int = 4,
        dropout: float = 0.1,
        warmup: float = 0.2,
        weights: Sequence[float] = (0.25, 0.25, 0.5, 0.25),
        distill_weight: float = 1.0,
        m_min: int = 2,
        m_max: int = 9,
        decay: float = 0.9,
        reduction: int = 4,
        epochs: int = 50,
        batch_size: int = 32,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.0,
        logit_scale: float = 100.0,
        random_state: Any = None,
    ) -> None:
        self.text_features = text_features
        self.new_text_features = new_text_features
        self.classes = classes
        self.tuner = tuner
        self.synthetic = synthetic
        self.teacher = teacher
        self.extrapolation = extrapolation
        self.spread = spread
        self.detach_synthetic = detach_synthetic
        self.k = k
        self.num_heads = num_heads
        self.dropout = dropout
        self.warmup = warmup
        self.weights = weights
        self.distill_weight = distill_weight
        self.m_min = m_min
        self.m_max = m_max
        self.decay = decay
        self.reduction = reduction
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.logit_scale = logit_scale
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> OGENClassifier:
        """Tune the adapter.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Normalised here.
        y : array-like of shape (n_samples,)
        """
        self._check()
        if self.tuner not in TUNERS:
            raise ValueError(f"tuner={self.tuner!r}: choose one of {', '.join(TUNERS)}")
        if self.reduction < 1:
            raise ValueError(f"reduction={self.reduction}: give at least 1")
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_labels(y)
        X, dim = unit_rows(X), X.shape[1]
        text = None if self.text_features is None else check_text_features(self.text_features, dim)
        self.classes_, text = align_classes(y, text, self.classes)
        index = label_index(y, self.classes_)
        counts = np.bincount(index, minlength=len(self.classes_))
        if not counts.all():
            lacking = self.classes_[counts == 0].tolist()[0]
            raise ValueError(
                f"class {lacking!r} has no sample: leave it out and give its text as new_text_features"
            )
        if text is None:
            text = unit_rows(np.eye(len(counts))[index].T @ X)
        new = np.empty((0, dim))
        if self.new_text_features is not None:
            new = check_text_features(self.new_text_features, dim, name="new_text_features")
        self.text_features_, self.new_text_features_ = text, new
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed(check_random_state(self.random_state)))
            base, other = (torch.tensor(part, dtype=torch.float32) for part in (text, new))
            tuner = _Adapters(base, other, self.tuner, max(dim // self.reduction, 1))
            self._train(
                tuner,
                X,
                index,
                float(self.logit_scale),
                lambda parameters: torch.optim.AdamW(parameters, weight_decay=self.weight_decay),
            )
        nothing = np.zeros((0, dim), np.float32), np.zeros((dim, 0), np.float32)
        image, words = (
            side.arrays() if isinstance(side, _Residual) else nothing for side in (tuner.image, tuner.text)
        )
        self.image_down_, self.image_up_ = image
        self.text_down_, self.text_up_ = words
        return self

    def logits(self, X: Any, text_features: Any) -> np.ndarray:
        """Of any classes, from their text features.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        text_features : array-like of shape (m, n_features)
            As the encoder gives them, not adapted.

        Returns
        -------
        ndarray of shape (n_samples, m)
        """
        X = self._checked(X)
        return self._against(X, check_text_features(text_features, self.n_features_in_))

    def _logits(self, X: np.ndarray) -> np.ndarray:
        return self._against(X, self.text_features_)

    def _against(self, X: np.ndarray, text: np.ndarray) -> np.ndarray:
        image = _adapted(unit_rows(X), self.image_down_, self.image_up_)
        return self.logit_scale * image @ _adapted(text, self.text_down_, self.text_up_).T.astype(X.dtype)


def _adapted(x: np.ndarray, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    if not len(down):
        return x
    down, up = down.astype(x.dtype), up.astype(x.dtype)
    return unit_rows(x + np.maximum(x @ down.T, 0) @ up.T)


class OGENPromptClassifier(_OGEN):
    """Context vectors in front of class names (CoOp), tuned on known classes so that unknown names survive.

    X are frozen image features of the same image-text model. `predict` chooses among the known classes; `encode` gives the
    text features of any other names behind the learned context.

    Parameters
    ----------
    model : path, hub id or model
        An image-text model, as `FrozenEncoder` takes it. Its own weights are not trained.
    processor : optional
        The tokenizer of a model in memory.
    new_names : sequence of str, optional
        Names of unknown classes.
    names : sequence of str, optional
        Names of the sorted classes; by default the labels themselves.
    context : str, default="a photo of a"
        The words that the learned vectors start from.
    template : str, default="{} {}."
        How context and name make a prompt.
    synthetic, teacher, extrapolation, spread, detach_synthetic, k, num_heads, dropout, warmup, weights, distill_weight
    m_min, m_max, decay, epochs, batch_size, random_state
        As for `OGENClassifier`.
    learning_rate, momentum, weight_decay : float, default=0.002, 0.9, 5e-4
        Of SGD; one epoch at 1e-5, then a cosine.
    logit_scale : float, optional
        By default the model's own.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    context_ : ndarray of shape (n_context, width)
    text_features_, new_text_features_ : ndarray
        Unit rows, with the learned context.
    loss_curve_ : list of float, one an epoch
    n_features_in_, feature_names_in_

    Examples
    --------
    >>> clf = OGENPromptClassifier("openai/clip-vit-base-patch32", new_names=["fox", "owl"])   # doctest: +SKIP
    >>> clf.fit(FrozenEncoder(clf.model).transform(paths), labels)                             # doctest: +SKIP
    >>> clf.encode(["fox", "owl"]).shape                                                       # doctest: +SKIP
    (2, 512)
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        new_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        context: str = "a photo of a",
        template: str = "{} {}.",
        synthetic: str | None = "generator",
        teacher: str | None = "local",
        extrapolation: str = "joint",
        spread: str = "upward",
        detach_synthetic: bool = False,
        k: int = 3,
        num_heads: int = 4,
        dropout: float = 0.1,
        warmup: float = 0.2,
        weights: Sequence[float] = (0.25, 0.25, 0.5, 0.25),
        distill_weight: float = 1.0,
        m_min: int = 2,
        m_max: int = 9,
        decay: float = 0.9,
        epochs: int = 50,
        batch_size: int = 32,
        learning_rate: float = 2e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        logit_scale: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.new_names = new_names
        self.names = names
        self.context = context
        self.template = template
        self.synthetic = synthetic
        self.teacher = teacher
        self.extrapolation = extrapolation
        self.spread = spread
        self.detach_synthetic = detach_synthetic
        self.k = k
        self.num_heads = num_heads
        self.dropout = dropout
        self.warmup = warmup
        self.weights = weights
        self.distill_weight = distill_weight
        self.m_min = m_min
        self.m_max = m_max
        self.decay = decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.logit_scale = logit_scale
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> OGENPromptClassifier:
        """Tune the context.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Image features of `model`; normalised here.
        y : array-like of shape (n_samples,)
        """
        self._check()
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_labels(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class, {self.classes_.tolist()[0]!r}: at least two are needed")
        names = [str(name) for name in (self.classes_ if self.names is None else self.names)]
        if len(names) != len(self.classes_):
            raise ValueError(f"names has {len(names)} entries, y {len(self.classes_)} classes: give as many")
        new = [str(name) for name in (() if self.new_names is None else self.new_names)]
        class_labels([*names, *new], name="names with new_names")
        tower = self._tower()
        if self.logit_scale is None and tower.logit_scale is None:
            raise ValueError("logit_scale=None: the model has none of its own; give a number")
        self.logit_scale_ = float(tower.logit_scale if self.logit_scale is None else self.logit_scale)
        with torch.random.fork_rng(devices=[]), without_gradients(tower.model):
            torch.manual_seed(draw_seed(check_random_state(self.random_state)))
            vectors, encode = self._encoder(tower, [*names, *new])
            tuner = _Context(vectors, encode, len(names))
            with torch.no_grad():
                width = encode(vectors).shape[1]
            if width != X.shape[1]:
                raise ValueError(
                    f"X has {X.shape[1]} features, the model's texts {width}: encode both with one model"
                )
            how: dict[str, Any] = {
                "lr": self.learning_rate,
                "momentum": self.momentum,
                "weight_decay": self.weight_decay,
            }
            self._train(
                tuner,
                unit_rows(X),
                index,
                self.logit_scale_,
                lambda parameters: torch.optim.SGD(parameters, **how),
            )
            with torch.no_grad():
                base, other = (part.numpy().copy() for part in tuner.texts())
        self.context_ = tuner.vectors.detach().numpy().copy()
        self.text_features_, self.new_text_features_ = base, other
        return self

    def encode(self, names: Sequence[str]) -> np.ndarray:
        """Unit text features of any names behind the learned context, shape (len(names), n_features)."""
        check_is_fitted(self)
        tower = self._tower()
        with without_gradients(tower.model), torch.no_grad():
            _, encode = self._encoder(tower, [str(name) for name in class_labels(list(names), name="names")])
            return encode(torch.from_numpy(self.context_)).numpy().copy()

    def _tower(self) -> Any:
        from unfused.nn.frozen import describe, load

        source = describe(self.model, self.processor)
        if "image" not in source.modalities or "text" not in source.modalities:
            raise ValueError(f"model={source.name}: give an image-text model such as CLIP")
        return load(source, "text", device=None if source.model is not None else "cpu")

    def _encoder(self, tower: Any, names: list[str]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return context_encoder(tower.model, tower.tokenizer, self.context, self.template, names)

    def _logits(self, X: np.ndarray) -> np.ndarray:
        return self.logit_scale_ * unit_rows(X) @ self.text_features_.T.astype(X.dtype)
