"""GreBsmo: greedy decomposition of a matrix into low rank and sparse.

    W ~ U V + S,   U <- orth((W - S) V^T),   V <- U^T (W - S),   S <- what of W - U V is above a threshold

twice at each rank; then the rank grows along what neither explains. S is carried from one rank to the next: begun anew, it
would lose its entries to U V as soon as the rank allows.
"""

from __future__ import annotations

import torch

__all__ = ["grebsmo"]


def grebsmo(
    weight: torch.Tensor,
    iterations: int = 100,
    growth: int = 5,
    threshold: float = 0.01,
    max_rank: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """What the low-rank part leaves, `W - U V`; its entries above the threshold are S.

    Parameters
    ----------
    weight : tensor (m, n)
    iterations : int, default=100
    growth : int, default=5
        The rank grows by as many at a time, the first rows of R in a QR decomposition of `W - U V - S`.
    threshold : float, default=0.01
    max_rank : int, optional
        By default full rank.
    seed : int, default=0
        Of the first direction.

    Examples
    --------
    >>> weight = torch.outer(torch.linspace(-1, 1, 20), torch.linspace(-1, 1, 30))
    >>> weight[2, 3] += 5
    >>> divmod(int(grebsmo(weight).abs().argmax()), 30)
    (2, 3)
    """
    weight = weight.detach().float()
    limit = max_rank or min(weight.shape)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, weight.shape[1], generator=generator).to(weight.device)
    left = sparse = torch.zeros_like(weight)
    for _ in range(iterations):
        for _ in range(2):
            u = torch.linalg.qr((weight - sparse) @ v.t()).Q  # (m, rank)
            v = u.t() @ (weight - sparse)
            left = weight - u @ v
            sparse = torch.where(left.abs() < threshold, 0, left)
        if len(v) >= limit:
            break
        v = torch.cat([v, torch.linalg.qr(left - sparse).R[:growth]])[:limit]
    return left
