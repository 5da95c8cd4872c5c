"""Which entries of a change survive: chosen by rank, never by a threshold alone, so that ties do not add entries."""

from __future__ import annotations

import math

import numpy as np
import torch

__all__ = ["as_rows", "between_ranks", "floor_share", "top"]


def floor_share(share: float, count: int) -> int:
    """`floor(share * count)`, safe against 0.29 * 100 being a little less than 29."""
    return min(count, math.floor(share * count + 1e-9))


def as_rows(tensor: torch.Tensor, granularity: str) -> torch.Tensor:
    """The tensor as (groups, entries): rows of the first dimension, or all in one; vectors are one group."""
    if granularity == "tensor" or tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(len(tensor), -1) if tensor.numel() else tensor.reshape(0, 1)


def top(size: torch.Tensor, *counts: int) -> list[torch.Tensor]:
    """Masks of the `count` largest entries of each row, the first ones among equals; for several counts at once.

    Parameters
    ----------
    size : Tensor (rows, entries)
    *counts : int

    Examples
    --------
    >>> top(torch.tensor([[3.0, 1.0, 3.0, 3.0]]), 2)[0].int().tolist()
    [[1, 0, 1, 0]]
    """
    entries = size.shape[1]
    inner = sorted({entries - count for count in counts if 0 < count < entries})
    # Linear time: only the elements of these ranks come to their places.
    split = torch.from_numpy(np.partition(size.numpy(), inner, axis=1)[:, inner]) if inner else None
    masks = []
    for count in counts:
        if split is None or not 0 < count < entries:
            masks.append(torch.full_like(size, count >= entries and count > 0, dtype=torch.bool))
            continue
        bound = split[:, inner.index(entries - count), None]
        mask = size > bound
        missing = count - mask.sum(1)
        row, column = (size == bound).nonzero(as_tuple=True)
        starts = torch.bincount(row, minlength=len(size)).cumsum(0).roll(1)
        starts[:1] = 0
        first = torch.arange(len(row)) - starts[row] < missing[row]
        mask[row[first], column[first]] = True
        masks.append(mask)
    return masks


def between_ranks(delta: torch.Tensor, drop: float, keep: float, granularity: str) -> torch.Tensor:
    """Zero all but the entries whose |.| ranks in `(drop n, (drop + keep) n]` of its group; in place where it can be.

    At least one entry of each group survives. A scalar is left as it is.
    """
    if delta.ndim == 0 or not delta.numel():
        return delta
    rows = as_rows(delta, granularity)
    entries = rows.shape[1]
    dropped = min(floor_share(drop, entries), entries - 1)
    kept = max(1, floor_share(keep, entries))
    if dropped == 0 and kept >= entries:
        return delta
    inside, outliers = top(rows.abs(), dropped + kept, dropped)
    return (rows * (inside ^ outliers)).view(delta.shape)
