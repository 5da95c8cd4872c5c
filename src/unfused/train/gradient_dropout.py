"""Gradient dropout: lets a task's gradient through where it agrees with what a second loss wants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = ["gradient_dropout"]

EPSILON = 1e-8


@torch.no_grad()
def gradient_dropout(
    params: Iterable[torch.Tensor],
    grads_task: Sequence[torch.Tensor | None],
    grads_reg: Sequence[torch.Tensor | None],
    lam: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Set `.grad` of every parameter to its task gradient `a`, damped at random where the regulariser's `b` opposes it.

    Element by element, an entry is kept with probability

        P = (1 + sign(a) (a + b) / (|a| + |b| + 1e-8)) / 2

    which is 1 where the signs agree and |a| / (|a| + |b|) where they do not; an entry that is not kept counts `1 - lam`.

    Parameters
    ----------
    params : iterable of Tensor
    grads_task : sequence of Tensor or None
        `a`, of the shapes of `params`. None: this parameter got no gradient; its `.grad` stays as it is.
    grads_reg : sequence of Tensor or None
        `b`. None: nothing speaks against `a`, all of it is kept.
    lam : float, default=1.0
        In [0, 1]. 1 drops entirely, 0.3 leaves 0.7 of what is dropped, 0 leaves the task gradient alone.
    generator : torch.Generator, optional
        Of the uniform numbers; drawn on its device.

    Raises
    ------
    ValueError
        If `lam` is outside [0, 1], or the three differ in length.

    Examples
    --------
    >>> w = torch.zeros(3, requires_grad=True)
    >>> gradient_dropout([w], [torch.tensor([1.0, 1.0, -2.0])], [torch.tensor([5.0, -1e9, -1.0])])
    >>> w.grad  # agree, hopelessly opposed, agree
    tensor([ 1.,  0., -2.])
    """
    if not 0 <= lam <= 1:
        raise ValueError(
            f"lam={lam}: give a number in [0, 1], the share of a dropped gradient that is taken away"
        )
    for parameter, a, b in zip(params, grads_task, grads_reg, strict=True):
        if a is None:
            continue
        if b is None or lam == 0:
            parameter.grad = a
            continue
        keep_probability = (1 + a.sign() * (a + b) / (a.abs() + b.abs() + EPSILON)) / 2
        where = a.device if generator is None else generator.device
        uniform = torch.rand(a.shape, generator=generator, device=where).to(a.device)
        parameter.grad = a * torch.where(keep_probability > uniform, 1.0, 1.0 - lam).to(a.dtype)
