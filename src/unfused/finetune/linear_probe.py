"""Linear probe: a linear classifier on the features of a frozen encoder.

Says what an encoder already knows. Two routes to the same model:
`fit_linear_probe` on features computed once (seconds, exact, the strength of the penalty chosen on the
labelled points alone), and `LinearProbe`, an objective for gradient descent that augments every batch anew.

Reference: none (a baseline).
Needs: labels, an encoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.pipeline import Pipeline
from torch import nn

from unfused.finetune._logistic import check, choose_penalty, logistic
from unfused.finetune.fine_tune import FineTune

__all__ = ["LinearProbe", "as_linear", "fit_linear_probe"]


class LinearProbe(FineTune):
    """`FineTune` with the encoder frozen and always in eval mode: only the head learns.

    Parameters
    ----------
    encoder, num_classes, augment, dropout, label_smoothing
        As for `FineTune`. The encoder's parameters are set to `requires_grad=False`.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> probe = LinearProbe(AudioNTT(n_mels=16, width=4, dim=8), num_classes=3).train()
    >>> probe.encoder.training, [name for name, p in probe.named_parameters() if p.requires_grad]
    (False, ['head.weight', 'head.bias'])
    """

    def __init__(self, encoder: nn.Module, num_classes: int, **options: Any) -> None:
        super().__init__(encoder, num_classes, **options)
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def embed(self, input_values: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return super().embed(input_values, **inputs)


def fit_linear_probe(features: Any, labels: Any, seed: int = 0, groups: Any = None) -> Pipeline:
    """Multinomial logistic regression, its L2 penalty chosen by cross-validation on the labelled points only.

    Parameters
    ----------
    features : array of shape (n, d)
        Standardised here, per dimension.
    labels : array of shape (n,)
        Ints or strings, at least two classes.
    seed : int, default=0
        Of the folds.
    groups : array of shape (n,), optional
        Speakers, sites ...: a group is never on both sides of a fold, so that the penalty suits unseen ones.

    Returns
    -------
    sklearn Pipeline
        With `predict`, `predict_proba`, `classes_`; `as_linear` turns it into an `nn.Linear`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = np.concatenate([rng.normal(-1, 1, (20, 5)), rng.normal(1, 1, (20, 5))])
    >>> probe = fit_linear_probe(x, np.repeat(["low", "high"], 20))
    >>> probe.predict(np.full((1, 5), 2.0))
    array(['high'], dtype='<U4')
    """
    x, y = check(features, labels)
    return logistic(choose_penalty(x, y, groups, seed)[0]).fit(x, y)


def as_linear(probe: Pipeline) -> nn.Linear:
    """A fitted probe as one linear layer with the same class probabilities (softmax of its outputs).

    Parameters
    ----------
    probe : Pipeline
        From `fit_linear_probe`; the layer's outputs are in the order of `probe.classes_`.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(30, 4))
    >>> probe = fit_linear_probe(x, np.arange(30) % 3)
    >>> same = as_linear(probe)(torch.tensor(x, dtype=torch.float32)).softmax(-1)
    >>> np.allclose(same.detach(), probe.predict_proba(x), atol=1e-5)
    True
    """
    scale, rotate, classify = (step for _, step in probe.steps)
    weight = classify.coef_ @ rotate.components_  # (classes, d), on standardised features
    bias = classify.intercept_ - weight @ rotate.mean_
    weight = weight / scale.scale_
    bias = bias - weight @ scale.mean_
    if len(classify.classes_) == 2:  # scikit-learn keeps one row for two classes
        weight, bias = np.vstack([0 * weight, weight]), np.append(0 * bias, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer
