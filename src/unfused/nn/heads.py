"""Projection heads: what stands between an encoder and a self-supervised or distillation loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

__all__ = ["projector"]


def projector(dims: Sequence[int], bias: bool = False, norm_last: bool = False) -> nn.Sequential:
    """`Linear - BatchNorm - ReLU` for every layer but the last, which is `Linear` alone.

    Parameters
    ----------
    dims : sequence of int
        Widths from input to output, two or more: `(2048,) * 4` is the three-layer projector of DeLoRes.
    bias : bool, default=False
        Whether the linear layers have a bias. Batch norm makes that of all but the last redundant.
    norm_last : bool, default=False
        Batch norm without affine weights on the output too.

    Returns
    -------
    nn.Sequential
        (batch, dims[0]) -> (batch, dims[-1]).

    Raises
    ------
    ValueError
        If `dims` has fewer than two widths.

    Examples
    --------
    >>> head = projector((8, 16, 4))
    >>> [type(layer).__name__ for layer in head]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    if len(dims) < 2:
        raise ValueError(f"dims={tuple(dims)} must hold an input and an output width at least")
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(dims[:-1]):
        layers += [
            nn.Linear(width_in, width_out, bias=bias),
            nn.BatchNorm1d(width_out),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=bias))
    if norm_last:
        layers.append(nn.BatchNorm1d(dims[-1], affine=False))
    return nn.Sequential(*layers)
