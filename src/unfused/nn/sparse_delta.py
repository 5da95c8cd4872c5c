"""Sparse changes of frozen weights: values at chosen positions, trained without a dense gradient that outlives its layer.

The effective weight is `W' = W + scatter(values)`. `W'` is made when a layer runs and made again in its backward pass, so
that neither `W'` nor a dense gradient is kept: what is stored for backward is the frozen weight itself (no copy), the
values, and of the layer's input only the channels that the chosen positions read. Of the weight's gradient the chosen
entries alone are gathered; where they are few, they alone are computed.

Values are float32, whatever the weight's type: changes of 1e-4 are lost in bfloat16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ["SparseDelta", "add_sparse", "check_sparse", "sparse_conv2d", "sparse_embedding", "sparse_linear"]

Tensors = torch.Tensor | Sequence[torch.Tensor]

SAMPLED_DENSITY = 0.15
"""Below this share of chosen entries, computing them alone is faster than the dense product (CPU, float32; measured)."""


class SparseDelta(nn.Module):
    """A trainable change of a tensor at fixed positions.

    Parameters
    ----------
    shape : sequence of int
        Of the tensor that is changed.
    index : int64 tensor (k,)
        Flat (row-major) positions, ascending, without duplicates.
    values : tensor (k,), optional
        The change; zeros by default.

    Attributes
    ----------
    values : Parameter (k,)
        Stays float32 (or wider) when the model around it is cast to a half type.
    index : persistent buffer (k,)

    Raises
    ------
    ValueError
        If the positions are out of range, not ascending, or do not match the values.

    Examples
    --------
    >>> delta = SparseDelta((2, 3), torch.tensor([1, 5]), torch.tensor([10.0, 20.0]))
    >>> delta.add_to(torch.ones(2, 3)).tolist()
    [[1.0, 11.0, 1.0], [1.0, 1.0, 21.0]]
    >>> delta.resize_(torch.tensor([0, 5])).values.tolist()
    [0.0, 20.0]
    """

    index: torch.Tensor

    def __init__(self, shape: Sequence[int], index: torch.Tensor, values: torch.Tensor | None = None) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        if values is None:
            values = torch.zeros(len(index), device=index.device)
        check_sparse(index, values, self.shape)
        self.register_buffer("index", index)
        self.values = nn.Parameter(values if values.dtype == torch.float64 else values.float())

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The change as a dense tensor of `shape`; differentiable."""
        values = self.values if dtype is None else self.values.to(dtype)
        flat = values.new_zeros(math.prod(self.shape))
        return flat.index_put((self.index,), values).view(self.shape)

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """A new tensor, `weight` changed; differentiable in both."""
        return add_sparse(weight, self.values, self.index)

    def resize_(self, index: torch.Tensor) -> SparseDelta:
        """Take other positions, in place: values of positions that stay are kept, the others start at 0."""
        check_sparse(index, index, self.shape)
        values = torch.zeros(len(index), dtype=self.values.dtype, device=self.values.device)
        if values.device.type != "meta" and len(self.index) and len(index):
            old = self.index.to(index.device)
            at = torch.searchsorted(old, index).clamp(max=len(old) - 1)
            values = torch.where(
                old[at] == index, self.values.detach().to(index.device)[at], values.to(index.device)
            ).to(self.values.device)
        self.values.data, self.values.grad = values, None
        self.index = index.to(self.index.device)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> SparseDelta:
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if new.dtype in (torch.float16, torch.bfloat16) else new

        return super()._apply(keep_wide, recurse)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {tuple(self.shape)}"


def check_sparse(index: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `index` holds ascending flat positions in a tensor of `shape`, one for each of `values`."""
    size = math.prod(shape)
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be a vector of int64, not {index.dtype} of shape {tuple(index.shape)}")
    if values.shape != index.shape:
        raise ValueError(f"index has shape {tuple(index.shape)}, values {tuple(values.shape)}")
    if len(index) and index.device.type != "meta":
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise ValueError(
                f"index holds positions from {int(index.min())} to {int(index.max())}; the weight of shape {tuple(shape)} has "
                f"0 to {size - 1}"
            )
        if (index.diff() <= 0).any():
            raise ValueError("index must be ascending without duplicates")


def add_sparse(weight: torch.Tensor, values: Tensors, index: Tensors) -> torch.Tensor:
    """`weight` plus values at flat positions; several changes are given as sequences.

    The gradient of `values` is gathered; `weight` gets one only if it requires it.
    """
    deltas = _pairs(values, index)
    return _AddSparse.apply(weight, *(t for pair in deltas for t in pair)) if deltas else weight


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    values: Tensors,
    index: Tensors,
    fan_in_fan_out: bool = False,
) -> torch.Tensor:
    """`x W'^T + b` with `W' = weight + scatter(values)`.

    Parameters
    ----------
    x : tensor (..., in)
    weight : tensor (out, in), or (in, out) with `fan_in_fan_out`
        Frozen; where it requires a gradient, the plain dense path is taken.
    bias : tensor (out,), optional
    values, index : tensor (k,), or sequences of them
        Changes; `index` must be ascending and unique within each.
    fan_in_fan_out : bool, default=False
        The layout of transformers' Conv1D.
    """
    deltas = _pairs(values, index)
    if weight.requires_grad or not deltas:
        weight = add_sparse(weight, values, index)
        return F.linear(x, weight.t() if fan_in_fan_out else weight, bias)
    dtype = _compute_dtype(x, weight)
    if dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    flat = (t for pair in deltas for t in pair)
    return _SparseLinear.apply(x, weight, bias, fan_in_fan_out, dtype, *flat)


def sparse_conv2d(x: torch.Tensor, base: nn.Conv2d, values: Tensors, index: Tensors) -> torch.Tensor:
    """The convolution `base` with its weight (out, in / groups, height, width) changed; its bias is left out."""
    deltas = _pairs(values, index)
    padding: Any = base.padding
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), (0, 0)
    weight, options = base.weight, (base.stride, padding, base.dilation, base.groups)
    if weight.requires_grad or not deltas:
        return F.conv2d(x, add_sparse(weight, values, index), None, *options)
    dtype = _compute_dtype(x, weight)
    return _SparseConv2d.apply(
        x.to(dtype) if torch.is_autocast_enabled(x.device.type) else x,
        weight,
        options,
        dtype,
        *(t for pair in deltas for t in pair),
    )


def sparse_embedding(
    ids: torch.Tensor,
    shape: Sequence[int],
    values: torch.Tensor,
    index: torch.Tensor,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """What a sparse change of an embedding table adds to `table[ids]`, in time and memory of the ids, not of the table.

    Parameters
    ----------
    ids : int tensor (...)
    shape : (rows, dim)
    values, index : tensor (k,)
    padding_idx : int, optional
        This row's change gets no gradient, as in `nn.Embedding`.

    Returns
    -------
    tensor (..., dim)
    """
    rows, dim = shape
    used, inverse = ids.unique(return_inverse=True)
    place = torch.full((rows,), -1, dtype=torch.int64, device=ids.device)
    place[used] = torch.arange(len(used), device=ids.device)
    row = torch.div(index, dim, rounding_mode="floor")
    at = place[row]
    keep = (at >= 0).nonzero().squeeze(1)
    if padding_idx is not None:
        values = torch.where(row == padding_idx, values.detach(), values)
    flat = values.new_zeros(len(used) * dim)
    flat = flat.index_put((at[keep] * dim + index[keep] % dim,), values[keep])
    return F.embedding(inverse, flat.view(-1, dim))


# -- the maths -------------------------------------------------------------------------------------------------------


def _pairs(values: Tensors, index: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Changes that do something: an empty one that is trained stays, so that it takes part in the graph."""
    if isinstance(values, torch.Tensor):
        values, index = [values], [index]  # type: ignore[list-item]
    return [(v, i) for v, i in zip(values, index, strict=True) if len(v) or v.requires_grad]


def _compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _effective(
    weight: torch.Tensor, deltas: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> torch.Tensor:
    out = weight.detach().clone(memory_format=torch.contiguous_format)
    flat = out.view(-1)
    for values, index in deltas:
        if values.dtype == flat.dtype:
            flat.index_add_(0, index, values.detach())
        else:  # add in the wider type, round once
            entries = flat.index_select(0, index).to(values.dtype) + values.detach()
            flat.index_copy_(0, index, entries.to(flat.dtype))
    return out.to(dtype)


def _unflatten(flat: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@dataclass
class _Layout:
    """Which rows and columns of a matrix the positions lie in (None: all), and where in that smaller matrix."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    position: torch.Tensor | None
    size: tuple[int, int]
    csr: torch.Tensor | None = None

    def sampled(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The chosen entries of `left^T right`; left (n, rows), right (n, columns)."""
        rows, columns = self.size
        if self.position is None:
            return (left.t() @ right).view(-1)
        few = len(self.position) < SAMPLED_DENSITY * rows * columns
        if (
            few
            and left.device.type == "cpu"
            and left.dtype == torch.float32
            and torch.backends.mkl.is_available()
        ):
            if self.csr is None:
                starts = torch.searchsorted(
                    self.position, torch.arange(rows + 1, device=self.position.device) * columns
                )
                zeros = torch.zeros(len(self.position))
                with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
                    warnings.simplefilter("ignore")
                    self.csr = torch.sparse_csr_tensor(
                        starts, self.position % columns, zeros, self.size, check_invariants=False
                    )
            return torch.sparse.sampled_addmm(self.csr, left.t(), right, beta=0.0).values()
        return (left.t() @ right).view(-1).index_select(0, self.position)


def _layout(index: torch.Tensor, rows: int, columns: int) -> _Layout:
    """Computed once for each version of an index tensor, and kept on it."""
    key = None if index.is_inference() else (index._version, rows, columns)
    known = getattr(index, "_unfused_layout", None)
    if known is not None and known[0] == key and key is not None:
        return known[1]
    row, column = torch.div(index, columns, rounding_mode="floor"), index % columns
    used_rows, row = _used(row, rows)
    used_columns, column = _used(column, columns)
    size = (
        rows if used_rows is None else len(used_rows),
        columns if used_columns is None else len(used_columns),
    )
    position = None if len(index) == size[0] * size[1] else row * size[1] + column
    found = _Layout(used_rows, used_columns, position, size)
    if key is not None:
        index._unfused_layout = (key, found)  # type: ignore[attr-defined]
    return found


def _used(positions: torch.Tensor, size: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Sorted distinct positions (None: all of them), and each position's rank among these."""
    mask = torch.zeros(size, dtype=torch.bool, device=positions.device)
    mask[positions] = True
    used = mask.nonzero().squeeze(1)
    return (None, positions) if len(used) == size else (used, (mask.cumsum(0) - 1)[positions])


def _take(matrix: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    return matrix if columns is None else matrix.index_select(1, columns)


class _AddSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*flat)
        return _effective(weight, _unflatten(flat), weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grads: list[torch.Tensor | None] = [grad if ctx.needs_input_grad[0] else None]
        for n, (values, index) in enumerate(_unflatten(ctx.saved_tensors)):
            wanted = ctx.needs_input_grad[1 + 2 * n]
            grads += [grad.reshape(-1).index_select(0, index).to(values.dtype) if wanted else None, None]
        return tuple(grads)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        fan_in_fan_out: bool,
        dtype: torch.dtype,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        deltas = _unflatten(flat)
        changed = _effective(weight, deltas, dtype)
        inputs = x.reshape(-1, x.shape[-1])  # (tokens, in)
        kept = []
        for n, (_, index) in enumerate(deltas):
            if ctx.needs_input_grad[5 + 2 * n]:
                layout = _layout(index, *weight.shape)
                kept.append(_take(inputs, layout.rows if fan_in_fan_out else layout.columns))
        ctx.options = fan_in_fan_out, dtype, len(flat)
        ctx.save_for_backward(weight, *flat, *kept)
        return F.linear(x, changed.t() if fan_in_fan_out else changed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        fan_in_fan_out, dtype, count = ctx.options
        weight, *rest = ctx.saved_tensors
        deltas, kept = _unflatten(rest[:count]), iter(rest[count:])
        outer = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            changed = _effective(weight, deltas, dtype)
            grad_x = grad @ (changed.t() if fan_in_fan_out else changed)
        if ctx.needs_input_grad[2]:
            grad_bias = outer.sum(0)
        grads: list[torch.Tensor | None] = []
        for n, (values, index) in enumerate(deltas):
            found = None
            if ctx.needs_input_grad[5 + 2 * n]:
                layout, inputs = _layout(index, *weight.shape), next(kept)
                if fan_in_fan_out:
                    found = layout.sampled(inputs, _take(outer, layout.columns))
                else:
                    found = layout.sampled(_take(outer, layout.rows), inputs)
            grads += [None if found is None else found.to(values.dtype), None]
        return grad_x, None, grad_bias, None, None, *grads


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, options: Any, dtype: torch.dtype, *flat: torch.Tensor
    ) -> torch.Tensor:
        ctx.options = options, dtype
        ctx.save_for_backward(x, weight, *flat)
        return F.conv2d(x, _effective(weight, _unflatten(flat), dtype), None, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (stride, padding, dilation, groups), dtype = ctx.options
        x, weight, *flat = ctx.saved_tensors
        deltas = _unflatten(flat)
        wanted = [ctx.needs_input_grad[4 + 2 * n] for n in range(len(deltas))]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            _effective(weight, deltas, dtype),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [ctx.needs_input_grad[0], any(wanted), False],
        )
        grads: list[torch.Tensor | None] = []
        for (values, index), needed in zip(deltas, wanted, strict=True):
            entries = grad_weight.reshape(-1).index_select(0, index).to(values.dtype) if needed else None
            grads += [entries, None]
        return grad_x, None, None, None, *grads
