"""What aTLAS's few-shot stage may add on the composed encoder's features: Tip-Adapter with trained keys, and LP++.

Features and text features have rows of norm 1; text logits are `100 x cosine` unless said otherwise. (In the paper's released
script neither head is trained; here both are.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TipHead(nn.Module):
    """`text logits + a exp(-b (1 - f K')) onehot`; the keys K, a and b are trained.

    Parameters
    ----------
    features : Tensor of shape (N, dim)
        Of the shots: the first keys.
    labels : Tensor of int64, shape (N,)
    text : Tensor of shape (C, dim)
        The zero-shot classifier.
    scale : float, default=100.0
        Of the text logits.
    """

    votes: Tensor
    text: Tensor

    def __init__(self, features: Tensor, labels: Tensor, text: Tensor, scale: float = 100.0) -> None:
        super().__init__()
        _check(features, labels, text)
        self.keys = nn.Parameter(F.normalize(features.float(), dim=-1))
        self.log_b, self.a = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("votes", F.one_hot(labels, len(text)).float())
        self.register_buffer("text", F.normalize(text.float(), dim=-1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        f = F.normalize(features.float(), dim=-1)
        near = torch.exp(-self.log_b.exp() * (1 - f @ F.normalize(self.keys, dim=-1).T))
        return self.scale * f @ self.text.T + self.a * near @ self.votes


class LinearTextHead(nn.Module):
    """LP++: `W f + b + alpha_c text_c`, with `text_c` the cosine to the class's text feature; see `fit_lp_plus`."""

    text: Tensor

    def __init__(self, weight: Tensor, alpha: Tensor, text: Tensor) -> None:
        super().__init__()
        self.weight, self.alpha = nn.Parameter(weight), nn.Parameter(alpha)
        self.bias = nn.Parameter(torch.zeros(len(weight)))
        self.register_buffer("text", text)

    def forward(self, features: Tensor) -> Tensor:
        f = F.normalize(features.float(), dim=-1)
        return f @ self.weight.T + self.bias + self.alpha * (f @ self.text.T)


def fit_tip(
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    scale: float = 100.0,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> TipHead:
    """Tip-Adapter on the shots' features: AdamW, cosine to 0.

    Parameters
    ----------
    features, labels, text, scale
        As for `TipHead`.
    epochs : int, default=10
    lr : float, default=1e-3
    batch_size : int, default=128
    seed : int
        Of the order.
    """
    head = TipHead(features, labels, text, scale)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, eps=1e-4)
    steps = epochs * math.ceil(len(labels) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).to(labels.device).split(batch_size):
            loss = F.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.requires_grad_(False)


def fit_lp_plus(features: Tensor, labels: Tensor, text: Tensor, passes: int = 300) -> LinearTextHead:
    """LP++ on the shots' features: full gradients, steps from the curvature, no learning rate to choose.

    W begins at the sums of each class's features, alpha at `250 / shots` times the mean cosine of its samples to its text;
    W's step is `4 N / lambda_max(F' F)`, alpha's `2 N / max_c sum_i (f_i t_c)^2`.

    Parameters
    ----------
    features : Tensor of shape (N, dim)
    labels : Tensor of int64, shape (N,)
    text : Tensor of shape (C, dim)
    passes : int, default=300
    """
    _check(features, labels, text)
    f, t = F.normalize(features.float(), dim=-1), F.normalize(text.float(), dim=-1)
    onehot = F.one_hot(labels, len(t)).float()
    counts = onehot.sum(0)
    cosines = f @ t.T
    near = (onehot * cosines).sum(0) / counts.clamp_min(1)
    near = torch.where(
        counts > 0, near, near[counts > 0].mean()
    )  # a class without shots trusts its text as the others
    shots = counts[counts > 0].mean()
    head = LinearTextHead(onehot.T @ f, 250 / shots * near, t)
    n = len(f)
    step_w = 4 * n / torch.linalg.matrix_norm(f, 2) ** 2
    step_alpha = 2 * n / cosines.square().sum(0).max().clamp_min(1e-12)
    for _ in range(passes):
        loss = F.cross_entropy(head(f), labels)
        for parameter, grad in zip(
            (head.weight, head.alpha, head.bias),
            torch.autograd.grad(loss, (head.weight, head.alpha, head.bias)),
            strict=True,
        ):
            with torch.no_grad():
                parameter.sub_(grad, alpha=float(step_alpha if parameter is head.alpha else step_w))
    return head.requires_grad_(False)


def _check(features: Tensor, labels: Tensor, text: Tensor) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)}: one row for each label"
        )
    if text.ndim != 2 or text.shape[1] != features.shape[1]:
        raise ValueError(
            f"text has shape {tuple(text.shape)}: one row a class, {features.shape[1]} columns as features"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= len(text):
        raise ValueError(f"labels reach {int(labels.max())}: text has {len(text)} classes")
