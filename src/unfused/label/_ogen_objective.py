"""OGEN's objective: the generator of image features, and the losses that it serves. The formulas are in `ogen.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

__all__ = ["FeatureGenerator", "OGENOutput", "OGENRegularizer"]


class FeatureGenerator(nn.Module):
    """Unit image features of classes, from their texts and what is known of related classes.

    Parameters
    ----------
    dim : int
    num_heads : int, default=4
        Of the one attention; a divisor of `dim`.
    dropout : float, default=0.1
        Of attention weights.
    layer_norm : bool, default=False
        The paper's LayerNorm and dropout around the attention; the release leaves them out.

    Examples
    --------
    >>> generator = FeatureGenerator(8)
    >>> made = generator(torch.randn(5, 1, 8), torch.randn(5, 3, 8), torch.randn(5, 3, 8))
    >>> made.shape, torch.allclose(made.norm(dim=-1), torch.ones(5, 1))
    (torch.Size([5, 1, 8]), True)
    """

    def __init__(self, dim: int, num_heads: int = 4, dropout: float = 0.1, layer_norm: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.around = nn.Sequential(nn.Dropout(dropout), nn.LayerNorm(dim)) if layer_norm else nn.Identity()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Texts (n, q, dim), texts and features of k known classes (n, k, dim) each, to features (n, q, dim)."""
        attended, _ = self.attention(query, key, value, need_weights=False)
        return F.normalize(self.mlp(query) + self.around(attended), dim=-1)


@dataclass
class OGENOutput(ModelOutput):
    """What `OGENRegularizer` gives: the loss and its parts, the latter without weights and None where not taken."""

    loss: Tensor | None = None
    mse_known: Tensor | None = None
    mse_reverse: Tensor | None = None
    ce_known: Tensor | None = None
    ce_reverse: Tensor | None = None
    ce_unknown: Tensor | None = None
    ce: Tensor | None = None
    distillation: Tensor | None = None


class OGENRegularizer(nn.Module):
    """The whole objective, for any tuner: a prompt, an adapter, a text or an image encoder that is trained.

    Its parameters (the generator's) go into the optimizer beside the tuner's. Call `fit_statistics` first.

    Parameters
    ----------
    dim : int
    k : int, default=3
        Related classes; no more than there are.
    num_heads, dropout, layer_norm
        See `FeatureGenerator`.
    warmup : float, default=0.2
        Share of the epochs for the generator alone.
    weights : 4 floats, default=(0.25, 0.25, 0.5, 0.25)
        Of the cross-entropies of z1, z2, z3 (the latter two over k) and z.
    distill_weight : float, default=1.0
    extrapolation : {"joint", "single"}, default="joint"
        How z3 is made, see the module.
    spread : {"upward", "symmetric"}, default="upward"
        u from [0, 1), as published, which only ever adds part of a deviation, or from [-1, 1).
    detach_synthetic : bool, default=False
        Keep the cross-entropies from training the generator, which could otherwise please them by copying the texts.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> z, y = F.normalize(torch.randn(40, 8), dim=-1), torch.arange(40) % 4
    >>> known, unknown = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    >>> regularizer = OGENRegularizer(8).fit_statistics(z, y)
    >>> out = regularizer(z, y, known, unknown, logit_scale=20.0, epoch=0, num_epochs=10)
    >>> sorted(out)
    ['loss', 'mse_known', 'mse_reverse']
    >>> out = regularizer(z, y, known, unknown, logit_scale=20.0, epoch=2, num_epochs=10)
    >>> out.ce_unknown is not None
    True
    """

    means: Tensor
    deviations: Tensor
    neighbors: Tensor

    def __init__(
        self,
        dim: int,
        k: int = 3,
        num_heads: int = 4,
        dropout: float = 0.1,
        layer_norm: bool = False,
        warmup: float = 0.2,
        weights: Sequence[float] = (0.25, 0.25, 0.5, 0.25),
        distill_weight: float = 1.0,
        extrapolation: str = "joint",
        spread: str = "upward",
        detach_synthetic: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("extrapolation", extrapolation, ("joint", "single")),
            ("spread", spread, ("upward", "symmetric")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
        if k < 1 or not 0 <= warmup <= 1 or len(weights) != 4:
            raise ValueError(
                f"k={k}, warmup={warmup}, weights={weights}: give k >= 1, a share, and four weights"
            )
        self.generator = FeatureGenerator(dim, num_heads, dropout, layer_norm)
        self.dim, self.k, self.warmup, self.weights = dim, k, warmup, tuple(weights)
        self.distill_weight, self.extrapolation, self.spread = distill_weight, extrapolation, spread
        self.detach_synthetic = detach_synthetic
        self.register_buffer("means", torch.empty(0, dim), persistent=False)
        self.register_buffer("deviations", torch.empty(0, dim), persistent=False)
        self.register_buffer("neighbors", torch.empty(0, k, dtype=torch.long), persistent=False)

    def fit_statistics(self, features: Any, labels: Any) -> OGENRegularizer:
        """Means, deviations and neighbours of the known classes, from the few labelled features that training sees.

        Parameters
        ----------
        features : Tensor or array of shape (n, dim)
            Normalised here. The means of unit vectors are not.
        labels : Tensor or array of int, shape (n,)
            0 to C - 1, each at least once; a class of one sample has deviation 0.
        """
        device = self.means.device
        z = F.normalize(torch.as_tensor(features, dtype=torch.float32, device=device), dim=-1)
        y = torch.as_tensor(labels, dtype=torch.long, device=device)
        counts = torch.bincount(y)
        if len(counts) < 2 or not counts.all():
            raise ValueError(
                f"labels: {len(counts)} classes, {int((counts == 0).sum())} without a sample; give 2 or more"
            )
        n = counts[:, None].to(z)
        self.means = torch.zeros(len(counts), self.dim, device=device).index_add_(0, y, z) / n
        squares = torch.zeros_like(self.means).index_add_(0, y, (z - self.means[y]).square())
        self.deviations = (squares / (n - 1).clamp(min=1)).sqrt()
        unit = F.normalize(self.means, dim=-1)
        similar = (unit @ unit.T).fill_diagonal_(-torch.inf)
        self.neighbors = similar.topk(min(self.k, len(counts) - 1)).indices  # (C, k)
        return self

    def forward(
        self,
        image_features: Tensor,
        labels: Tensor,
        text_base: Tensor,
        text_new: Tensor | None = None,
        logit_scale: float | Tensor = 100.0,
        *,
        epoch: int,
        num_epochs: int,
        adapt: Callable[[Tensor], Tensor] | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> OGENOutput:
        """The loss of a batch.

        Parameters
        ----------
        image_features : Tensor of shape (B, dim)
        labels : Tensor of int, shape (B,)
        text_base, text_new : Tensor of shape (C, dim), (C_new, dim)
            Unit text features with gradient to the tuner. Without new classes nothing is generated for them.
        logit_scale : float
        epoch, num_epochs : int
            From 0; says whether the generator still warms up.
        adapt : callable, optional
            What an image-side tuner does to unit features (n, dim), giving unit features: applied to real and generated
            features before they are classified.
        teacher : callable, optional
            Unit features (n, dim) to the teacher's logits (n, C + C_new).
        """
        if not len(self.means):
            raise RuntimeError("fit_statistics has not been called")
        unit = F.normalize(image_features, dim=-1)
        z, known = unit.detach(), text_base.detach()
        near = self.neighbors[labels]  # (B, k)
        values = self._around(near, self._draw(z))  # (B, k, dim)
        own = known[labels][:, None]
        z1 = self.generator(own, known[near], values)[:, 0]
        z2 = self.generator(known[near], own, z[:, None])  # (B, k, dim)
        out = OGENOutput(mse_known=F.mse_loss(z1, z), mse_reverse=F.mse_loss(z2, values))
        loss = self.dim * (out.mse_known + out.mse_reverse)  # type: ignore[operator]
        if epoch < self.warmup * num_epochs:
            out.loss = loss
            return out
        made = [z1, z2.flatten(0, 1)]
        targets = [labels, near.flatten()]
        if text_new is not None and len(text_new):
            z3, new = self.extrapolate(z, labels, text_base, text_new)
            made.append(z3.flatten(0, 1))
            targets.append(new.flatten())
        if self.detach_synthetic:
            made = [features.detach() for features in made]
        seen = [features if adapt is None else adapt(features) for features in (*made, unit)]
        texts = [text_base, text_base, text_new][: len(made)]
        losses = [
            F.cross_entropy(logit_scale * features @ text.T, target)  # type: ignore[union-attr]
            for features, text, target in zip(seen, texts, targets, strict=False)
        ]
        out.ce = F.cross_entropy(logit_scale * seen[-1] @ text_base.T, labels)
        out.ce_known, out.ce_reverse = losses[:2]
        first, reverse, unknown, real = self.weights
        k = near.shape[1]
        loss = loss + first * losses[0] + reverse / k * losses[1] + real * out.ce
        if len(made) == 3:
            out.ce_unknown = losses[2]
            loss = loss + unknown / k * losses[2]
        if teacher is not None:
            everything = text_base if text_new is None else torch.cat([text_base, text_new])
            said = (logit_scale * torch.cat(seen[:-1]) @ everything.T).softmax(-1)
            with torch.no_grad():
                taught = teacher(torch.cat(made).detach()).softmax(-1)
            out.distillation = (said - taught).square().sum(-1).mean()
            loss = loss + self.distill_weight * out.distillation
        out.loss = loss
        return out

    def extrapolate(
        self, z: Tensor, labels: Tensor, text_base: Tensor, text_new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of the k unknown classes nearest to each sample's class, (B, k, dim), and which they are, (B, k)."""
        known, unknown = text_base.detach(), text_new.detach()
        ranked = (known @ unknown.T).topk(min(self.k, len(unknown))).indices  # (C, k)
        new = ranked[labels]
        if self.extrapolation == "single":
            return self.generator(text_new[new], known[labels][:, None], z[:, None]), new
        wanted, place = new.unique(return_inverse=True)  # joint: it does not depend on the sample
        related = (unknown[wanted] @ known.T).topk(min(self.k, len(known))).indices  # (n, k)
        values = self._around(related, self._draw(z))
        return self.generator(text_new[wanted][:, None], known[related], values)[:, 0][place], new

    def _draw(self, z: Tensor) -> Tensor:
        u = torch.rand(self.dim, device=z.device, dtype=z.dtype)
        return u if self.spread == "upward" else 2 * u - 1

    def _around(self, classes: Tensor, u: Tensor) -> Tensor:
        return self.means[classes] + u * self.deviations[classes]
