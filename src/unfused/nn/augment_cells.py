"""Augmentation of table rows: cells replaced by draws from their column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CellCorruption"]


class CellCorruption(nn.Module):
    """Each cell is replaced, with probability `rate`, by the same column's cell of a random row of the batch.

    That is a draw from the column's own distribution, missing cells among them, so no cell ever holds what its column
    cannot. As with dropout, `eval()` switches it off. All draws come from torch's global generator.

    Parameters
    ----------
    rate : float, default=0.3
        Of each view. SCARF corrupts one of its two views, at 0.6; here both are, and the supervised stages too.

    References
    ----------
    SCARF: Self-Supervised Contrastive Learning using Random Feature Corruption, ICLR 2022, arXiv:2106.15147.

    Examples
    --------
    >>> x = torch.arange(12.0).reshape(4, 3)
    >>> y = CellCorruption(0.5)(x)
    >>> bool((y % 3 == x % 3).all()), bool(CellCorruption().eval()(x).equal(x))
    (True, True)
    """

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate}: give a share between 0 and 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Rows (batch, columns) to rows of the same shape."""
        if not self.training or not self.rate:
            return x
        if x.ndim != 2:
            raise ValueError(f"rows must have shape (batch, columns), got {tuple(x.shape)}")
        others = torch.randint(len(x), x.shape, device=x.device)
        corrupted = torch.rand(x.shape, device=x.device) < self.rate
        return torch.where(corrupted, x.gather(0, others), x)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
