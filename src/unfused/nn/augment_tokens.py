"""Augmentation of texts on their ids: tokens left out, and spans masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["TokenAugment"]


class TokenAugment(nn.Module):
    """Leaves out single tokens, closing the gap, and replaces short spans by the mask.

    At least one token of every text stays as it is. As with dropout, `eval()` switches it off. All draws come from torch's
    global generator.

    Parameters
    ----------
    pad, mask : int
        Ids. The former fills the end of a row.
    marks : sequence of int
        Ids that are never touched: those of `[CLS]` and `[SEP]`.
    drop : float, default=0.15
        Probability that a token is left out.
    span : float, default=0.05
        Probability that a masked span begins at a token.
    longest : int, default=3
        Tokens of a span, at most.

    Examples
    --------
    >>> ids = torch.tensor([[2, 10, 11, 12, 3, 0], [2, 10, 3, 0, 0, 0]])
    >>> y = TokenAugment(pad=0, mask=4, marks=(2, 3), drop=1.0)(ids)
    >>> [sum(i not in (0, 2, 3) for i in row) for row in y.tolist()], y[1].tolist()
    ([1, 1], [2, 10, 3, 0, 0, 0])
    """

    def __init__(
        self,
        pad: int,
        mask: int,
        marks: Sequence[int],
        drop: float = 0.15,
        span: float = 0.05,
        longest: int = 3,
    ) -> None:
        super().__init__()
        if not 0 <= drop <= 1 or not 0 <= span <= 1:
            raise ValueError(f"drop={drop}, span={span}: give shares between 0 and 1")
        self.pad, self.mask, self.marks = pad, mask, tuple(marks)
        self.drop, self.span, self.longest = drop, span, longest

    def forward(self, x: Tensor) -> Tensor:
        """Ids (batch, tokens) to ids of the same shape."""
        if not self.training:
            return x
        if x.ndim != 2 or x.is_floating_point():
            raise ValueError(f"ids must be whole numbers (batch, tokens), got {x.dtype} {tuple(x.shape)}")
        words = x != self.pad
        for mark in self.marks:
            words &= x != mark
        order = torch.rand(x.shape, device=x.device)
        kept = torch.zeros_like(words).scatter_(
            1, (order * words).argmax(1, keepdim=True), True
        )  # one of each text
        starts = torch.rand(x.shape, device=x.device) < self.span
        reach = torch.randint(1, self.longest + 1, x.shape, device=x.device)
        covered = starts
        for step in range(1, self.longest):
            covered = covered | (starts & (reach > step)).roll(step, 1)
        x = torch.where(covered & words & ~kept, self.mask, x)
        dropped = (torch.rand(x.shape, device=x.device) < self.drop) & words & ~kept
        x = torch.where(dropped, self.pad, x)
        return x.gather(
            1, (x == self.pad).to(torch.uint8).argsort(dim=1, stable=True)
        )  # the gaps go to the end

    def extra_repr(self) -> str:
        return f"drop={self.drop}, span={self.span}, longest={self.longest}"
