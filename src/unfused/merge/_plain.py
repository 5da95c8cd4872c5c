"""The plain merges that others are measured against: linear, slerp, task arithmetic, TIES, DARE.

With task vectors `d_t = theta_t - theta` and weights w:

    linear            sum w_t theta_t / sum w_t
    slerp             from theta_1 to theta_2 along the great circle, tensor by tensor
    task arithmetic   theta + scale sum d_t                             (Ilharco et al. 2023, arXiv:2212.04089)
    TIES              trim d_t to its largest entries, elect a sign per entry, average those that agree
                                                                        (Yadav et al. 2023, arXiv:2306.01708)
    DARE              drop entries of d_t at random, rescale the rest, then one of the two before
                                                                        (Yu et al. 2024, arXiv:2311.03099)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from unfused.merge._masks import between_ranks
from unfused.merge._method import merge_method, per_model, share

__all__ = ["dare", "linear", "slerp", "task_arithmetic", "ties"]

Tensor = torch.Tensor


@merge_method("linear", base="none", splits="elements")
def linear(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    *,
    weights: float | Sequence[float] = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Weighted average of the models.

    Parameters
    ----------
    base : None
    deltas : sequence of Tensor
        The models' tensors.
    weights : float or one per model, default=1.0
    normalize : bool, default=True
        Divide by the sum of the weights.

    Examples
    --------
    >>> linear(None, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], weights=[3, 1])
    tensor([1.5000, 3.0000])
    """
    numbers = per_model("weights", weights, len(deltas))
    total = math.fsum(numbers)
    if normalize and total == 0:
        raise ValueError(f"weights={weights!r} add up to 0: nothing to divide by (or normalize=False)")
    out = _sum(deltas, numbers)
    return out.div_(total) if normalize and total != 1 else out


@merge_method("slerp", base="none", models=(2, 2))
def slerp(base: Tensor | None, deltas: Sequence[Tensor], *, t: float = 0.5) -> Tensor:
    """Spherical interpolation of two models: direction and length turn evenly from the first to the second.

    `(sin((1 - t) w) a + sin(t w) b) / sin w` with w the angle between them; a straight line where they are parallel or one is
    zero.

    Parameters
    ----------
    base : None
    deltas : sequence of two Tensors
        The models' tensors.
    t : float in [0, 1], default=0.5

    Examples
    --------
    >>> slerp(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
    tensor([0.7071, 0.7071])
    """
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
        raise ValueError(f"t={t!r} must be a number in [0, 1]")
    a, b = deltas[0], deltas[1]
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    x, y = a.reshape(-1).double(), b.reshape(-1).double()
    lengths = float(x.norm() * y.norm())
    cosine = float(x @ y) / lengths if lengths else 1.0
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return a.mul_(1 - t).add_(b.mul_(t))
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return a.mul_(first).add_(b.mul_(second))


@merge_method("task-arithmetic", splits="elements")
def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], *, scale: float | Sequence[float] = 0.3
) -> Tensor:
    """The base plus the scaled sum of the task vectors.

    Parameters
    ----------
    base : Tensor
    deltas : sequence of Tensor
    scale : float or one per model, default=0.3
        Negative to take a task away.

    Examples
    --------
    >>> task_arithmetic(torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([4.0])], scale=0.5)
    tensor([4.])
    """
    return add_scaled(base, deltas, per_model("scale", scale, len(deltas)))


@merge_method("ties")
def ties(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    scale: float = 1.0,
    keep: float | Sequence[float] = 0.2,
    weights: float | Sequence[float] = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Trim, elect sign, merge disjointly.

    Parameters
    ----------
    base : Tensor
    deltas : sequence of Tensor
    scale : float, default=1.0
    keep : float or one per model, default=0.2
        Share of each task vector's entries, the largest, that survives.
    weights : float or one per model, default=1.0
    normalize : bool, default=True
        Average those that agree with the elected sign; else their sum.

    Examples
    --------
    >>> ties(torch.zeros(2), [torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])], keep=1)
    tensor([3.0000, 1.5000])
    """
    (factor,) = per_model("scale", scale, 1)
    shares = [share("keep", k) for k in per_model("keep", keep, len(deltas))]
    numbers = per_model("weights", weights, len(deltas))
    trimmed = (between_ranks(d, 0.0, k, "tensor") for d, k in zip(deltas, shares, strict=True))
    return _elected(base, trimmed, numbers, normalize).mul_(factor).add_(base)


@merge_method("dare", random=True)
def dare(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 0.3,
    keep: float | Sequence[float] = 0.1,
    rescale: bool = True,
    elect_sign: bool = False,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop entries at random and rescale the rest; then add them, or elect signs as TIES does.

    Parameters
    ----------
    base : Tensor
    deltas : sequence of Tensor
    scale : float or one per model, default=0.3
    keep : float or one per model, default=0.1
        Chance of each entry to survive; the paper's drop rate is `1 - keep`.
    rescale : bool, default=True
        Divide survivors by `keep`, so that the expected change is the whole one.
    elect_sign : bool, default=False
        Add only those that have the sign of the entry's weighted sum.
    seed : int, default=0
    generator : torch.Generator, optional
        The engine's, seeded by `seed` and the tensor's name; by default seeded by `seed`.

    Examples
    --------
    >>> out = dare(torch.zeros(1000), [torch.ones(1000)], scale=1.0, keep=0.25)
    >>> sorted(set(out.tolist())), 200 < int((out > 0).sum()) < 300
    ([0.0, 4.0], True)
    """
    numbers = per_model("scale", scale, len(deltas))
    shares = [share("keep", k) for k in per_model("keep", keep, len(deltas))]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be a whole number")
    draw = torch.Generator().manual_seed(seed) if generator is None else generator

    def thinned() -> Iterable[Tensor]:
        for delta, chance in zip(deltas, shares, strict=True):
            delta.mul_(torch.rand(delta.shape, generator=draw) < chance)
            yield delta.div_(chance) if rescale and chance < 1 else delta

    if elect_sign:
        return _elected(base, thinned(), numbers, False).add_(base)
    return add_scaled(base, thinned(), numbers)


def _sum(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum; the tensors are used up. Multiplied and added in two steps, so that no piece of a tensor rounds otherwise
    than the whole (a fused step is taken or not by an entry's place)."""
    total = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight != 1:
            tensor.mul_(weight)
        total = tensor.clone() if total is None else total.add_(tensor)
    if total is None:
        raise ValueError("no models: give at least one")
    return total


def add_scaled(base: Tensor, deltas: Iterable[Tensor], scales: Sequence[float]) -> Tensor:
    """`base + sum scale_t delta_t`; with one scale for all, `base + scale sum delta_t`."""
    if len(set(scales)) == 1:
        return _sum(deltas, [1.0] * len(scales)).mul_(scales[0]).add_(base)
    return _sum(deltas, scales).add_(base)


def _elected(base: Tensor, deltas: Iterable[Tensor], weights: Sequence[float], normalize: bool) -> Any:
    """Per entry the sum (or mean) of the changes whose sign is that of the sum, in one pass over the models."""
    up, down = torch.zeros_like(base), torch.zeros_like(base)
    alike = len(set(weights)) == 1 and len(weights) < 256  # then it is enough to count, in a byte each
    kind, factor = (torch.uint8, 1) if alike else (base.dtype, None)
    up_weight, down_weight = (torch.zeros_like(base, dtype=kind) if normalize else None for _ in range(2))
    for delta, weight in zip(deltas, weights, strict=True):
        delta = delta * weight if weight != 1 else delta
        up.add_(delta.clamp(min=0))
        down.add_(delta.clamp(max=0))
        if up_weight is not None and down_weight is not None:
            up_weight.add_((delta > 0).to(kind).mul_(factor or weight))
            down_weight.add_((delta < 0).to(kind).mul_(factor or weight))
    positive = up + down >= 0
    out = torch.where(positive, up, down)
    if up_weight is not None and down_weight is not None:
        weight_of = torch.where(positive, up_weight, down_weight).to(base.dtype)
        if alike:
            weight_of.mul_(weights[0])
        out.div_(torch.where(weight_of == 0, 1.0, weight_of))
    return out
