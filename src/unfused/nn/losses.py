"""Losses that several methods share. All compute in float32, also under autocast.

In a distributed run the losses that compare items of a batch with each other see the batch of all processes,
so the averaged gradient is the one that a single process would have computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

__all__ = [
    "barlow_twins",
    "cosine_mse",
    "gather",
    "info_nce",
    "kl_from_logits",
    "nt_xent",
    "soft_cross_entropy",
]


Loss = TypeVar("Loss", bound=Callable[..., torch.Tensor])


def _in_float32(loss: Loss) -> Loss:
    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        def cast(value: Any) -> Any:
            return value.float() if isinstance(value, torch.Tensor) else value

        device = next(value.device.type for value in (*args, *kwargs.values()) if hasattr(value, "device"))
        with torch.autocast(device, enabled=False):
            return loss(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return wrapped  # type: ignore[return-value]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """All processes' rows; the gradient of a row is the sum of what all processes send back to it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in rank order, with gradients; `x` itself where there is one process.

    Parameters
    ----------
    x : tensor of shape (batch, ...)
        The same shape in every process.

    Returns
    -------
    tensor of shape (processes * batch, ...)

    Examples
    --------
    >>> gather(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    return _Gather.apply(x) if _distributed() else x


@_in_float32
def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy with distributions as targets, weighted mean over the batch.

    Parameters
    ----------
    logits, targets : tensor of shape (batch, classes)
    weights : tensor of shape (batch,), optional
        Non-negative; 0 leaves an item out. If all are 0 the loss is 0.

    Returns
    -------
    tensor, scalar

    Examples
    --------
    >>> round(soft_cross_entropy(torch.zeros(2, 4), torch.full((2, 4), 0.25)).item(), 4)  # log 4
    1.3863
    """
    loss = -(targets * F.log_softmax(logits, dim=1)).sum(1)
    if weights is None:
        return loss.mean()
    return (weights * loss).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


@_in_float32
def kl_from_logits(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)), mean over the batch; both get gradients.

    Parameters
    ----------
    teacher, student : tensor of shape (batch, classes)

    Examples
    --------
    >>> kl_from_logits(torch.ones(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    log_p = F.log_softmax(teacher, dim=1)
    return (log_p.exp() * (log_p - F.log_softmax(student, dim=1))).sum(1).mean()


@_in_float32
def cosine_mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distance of the normalised rows, mean of `2 - 2 cos(a_i, b_i)`.

    Parameters
    ----------
    a, b : tensor of shape (batch, dim)

    Examples
    --------
    >>> cosine_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
    2.0
    """
    return (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean()


@_in_float32
def nt_xent(
    z1: torch.Tensor, z2: torch.Tensor, temperature: float = 0.1, distributed: bool = True
) -> torch.Tensor:
    """SimCLR's loss: each view must tell its other view from all other views in the batch.

    Parameters
    ----------
    z1, z2 : tensor of shape (batch, dim)
        Projections of two views of the same items; normalised here.
    temperature : float, default=0.1
    distributed : bool, default=True
        Whether other processes hold other rows; False where all hold the same.

    Returns
    -------
    tensor, scalar
        Mean over the views of this process; the negatives are the views of all processes.

    References
    ----------
    Chen et al., ICML 2020, arXiv:2002.05709, equation 1.

    Examples
    --------
    >>> z = torch.eye(4)
    >>> nt_xent(z, z, temperature=0.05).item() < 1e-6
    True
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    mine, views, first = torch.cat([z1, z2]), torch.cat([z1, z2]), 0
    if distributed and _distributed():
        views, first = torch.cat([gather(z1), gather(z2)]), dist.get_rank() * len(z1)
    items = len(views) // 2
    own = torch.arange(first, first + len(z1), device=views.device)
    own = torch.cat([own, own + items])  # where this process's views stand among all
    logits = (mine @ views.T / temperature).scatter(1, own[:, None], -torch.inf)
    return F.cross_entropy(logits, (own + items) % len(views))


@_in_float32
def info_nce(
    queries: torch.Tensor, keys: torch.Tensor, negatives: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    """MoCo's loss: each query must tell its key from a queue of earlier keys.

    Parameters
    ----------
    queries, keys : tensor of shape (batch, dim)
    negatives : tensor of shape (size, dim)
        Keys of other items. All three are normalised here.
    temperature : float, default=0.07

    References
    ----------
    He et al., CVPR 2020, arXiv:1911.05722, equation 1.

    Examples
    --------
    >>> q = torch.eye(3)[:2]
    >>> info_nce(q, q, torch.eye(3)[2:], temperature=0.05).item() < 1e-6
    True
    """
    queries, keys, negatives = (F.normalize(z, dim=1) for z in (queries, keys, negatives))
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@_in_float32
def barlow_twins(
    z1: torch.Tensor, z2: torch.Tensor, lambd: float = 5e-5, scale: float = 1 / 32, eps: float = 1e-5
) -> torch.Tensor:
    """Barlow Twins: the cross-correlation of two views' projections shall be the identity.

    `scale * (sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2)` with `C = norm(z1)' norm(z2) / batch`, where
    `norm` standardises each dimension over the batch.

    Parameters
    ----------
    z1, z2 : tensor of shape (batch, dim)
        Two items at least.
    lambd : float, default=5e-5
        Weight of the off-diagonal, of that alone.
    scale : float, default=1/32
    eps : float, default=1e-5
        Added to the variances.

    References
    ----------
    Zbontar et al., ICML 2021, arXiv:2103.03230.

    Examples
    --------
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> barlow_twins(z, z).item() < 1e-9
    True
    """
    z1, z2 = (F.batch_norm(gather(z), None, None, training=True, eps=eps) for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)  # (dim, dim)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return scale * ((diagonal - 1).square().sum() + lambd * off_diagonal)
