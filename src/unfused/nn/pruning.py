"""Pruned linear maps: masks of one bit a weight, and matrices that lose rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import attention_heads, module_at, transformer_blocks

__all__ = [
    "SparseLowRankLinear",
    "add_sparse_product",
    "masked",
    "masked_linear",
    "pack_mask",
    "set_heads",
    "shrink_linear",
    "unpack_mask",
]


def pack_mask(on: torch.Tensor) -> torch.Tensor:
    """One bit a weight, the first in the highest bit, (ceil(numel / 8),) uint8.

    Examples
    --------
    >>> pack_mask(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist()
    [144, 128]
    """
    bits = F.pad(on.reshape(-1).to(torch.uint8), (0, -on.numel() % 8)).view(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=on.device)
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The bool mask of a shape."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    size = torch.Size(shape).numel()
    return bits.view(-1)[:size].view(torch.bool).view(shape)


def masked(weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """The weight times its mask."""
    return weight * unpack_mask(packed, weight.shape)


def masked_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """`x (W * S1)^T + b`; the product is made again in backward, so that no copy of the weight is kept."""
    if weight.requires_grad:
        weight = masked(weight, packed)
        return F.linear(x, weight.t() if transposed else weight, bias)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return _MaskedLinear.apply(
        x.to(dtype), weight, None if bias is None else bias.to(dtype), packed, transposed
    )


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        packed: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, packed)
        ctx.transposed = transposed
        with torch.autocast(x.device.type, enabled=False):
            kept = masked(weight, packed).to(x.dtype)
            return F.linear(x, kept.t() if transposed else kept, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept = masked(*ctx.saved_tensors).to(grad.dtype)
        grad_x = grad @ (kept.t() if ctx.transposed else kept) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None


def add_sparse_product(
    y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """`y + x S^T` for a few entries of S at flat positions in (out, in); reads and keeps their channels alone."""
    into = x.shape[-1]
    product = x.index_select(-1, index % into) * values.to(x.dtype)  # (..., N)
    return y.index_add(-1, torch.div(index, into, rounding_mode="floor"), product.to(y.dtype))


class SparseLowRankLinear(nn.Module):
    """A sparse matrix and an update that would fill its zeros, kept apart: `x W^T + b + x (U V + S)^T`.

    Parameters
    ----------
    linear : nn.Linear or Conv1D
    up, down : tensor (out, r), (r, in)
    values, index : tensor (N,)
        Of the sparse part S, and its flat positions in (out, in).

    Examples
    --------
    >>> up, down = torch.ones(2, 1), torch.ones(1, 3)
    >>> linear = SparseLowRankLinear(nn.Linear(3, 2), up, down, torch.tensor([5.0]), torch.tensor([4]))
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> (linear(x) - linear.linear(x)).round().tolist()
    [[6.0, 16.0]]
    """

    up: torch.Tensor
    down: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor

    def __init__(
        self,
        linear: nn.Module,
        up: torch.Tensor,
        down: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor,
    ) -> None:
        super().__init__()
        self.linear = linear
        for name, value in (("up", up), ("down", down), ("values", values), ("index", index)):
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y = y + F.linear(F.linear(x.to(self.down.dtype), self.down), self.up).to(y.dtype)
        return add_sparse_product(y, x, self.values, self.index)

    def shrink(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Keep these rows and columns (bool masks) alone."""
        row, column = self.index // len(columns), self.index % len(columns)
        stay = rows[row] & columns[column]
        row, column = (rows.cumsum(0) - 1)[row[stay]], (columns.cumsum(0) - 1)[column[stay]]
        self.values, self.index = self.values[stay], row * int(columns.sum()) + column
        self.up, self.down = self.up[rows], self.down[:, columns]
        shrink_linear(self.linear, rows, columns)


def shrink_linear(module: Any, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Leave these rows and columns (bool masks) of a Linear, Conv1D or `SparseLowRankLinear` alone, in place."""
    if isinstance(module, SparseLowRankLinear):
        module.shrink(rows, columns)
        return
    transposed = isinstance(module, Conv1D)
    first, second = (columns, rows) if transposed else (rows, columns)
    module.weight = nn.Parameter(
        module.weight.data[first][:, second].contiguous(), module.weight.requires_grad
    )
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[rows], module.bias.requires_grad)
    out, into = int(rows.sum()), int(columns.sum())
    if transposed:
        module.nf, module.nx = out, into
    else:
        module.out_features, module.in_features = out, into


def set_heads(model: nn.Module, kept: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Tell attention modules how many heads they have after `shrink_linear`: `kept` is by matrix (rows, columns)."""
    for block in transformer_blocks(model):
        if block.attention_out in kept and not (columns := kept[block.attention_out][1]).all():
            heads = attention_heads(model, block)
            left = int(columns.view(heads, -1).any(1).sum())
            attention: Any = module_at(model, block.attention)
            for module in filter(None, (attention, getattr(attention, "self", None))):
                for name in ("num_attention_heads", "num_heads", "n_head"):
                    if hasattr(module, name):
                        setattr(module, name, left)
                if hasattr(module, "all_head_size"):
                    module.all_head_size = int(columns.sum())
