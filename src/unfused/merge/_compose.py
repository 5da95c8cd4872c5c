"""Weights as weighted sums of other weights, with gradients in the weights of the sum alone: learned soups and aTLAS.

`Block` holds one tensor of all models; `block(coefficients)` is `base + sum_i c_i tau_i`, one coefficient for a tensor or one
for each of its groups of entries. The backward pass is n inner products: no product `c_i tau_i` is kept for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unfused.data.lora_io import LowRank

Weights = Mapping[str, Tensor]


class Block(nn.Module):
    """One tensor of n models.

    Parameters
    ----------
    base : Tensor or None
        Where coefficients of 0 lead; None: zero.
    deltas : sequence of n Tensors or LowRank
    groups : Tensor of int64, shape of the tensor, optional
        The group of every entry.
    dtype : torch.dtype, default=torch.float32
        In which the n tensors are kept.
    """

    def __init__(
        self,
        base: Tensor | None,
        deltas: Sequence[Tensor | LowRank],
        groups: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape, self.base, self.count = deltas[0].shape, base, len(deltas)
        self.groups = None if groups is None else groups.reshape(-1)
        self.low: list[LowRank] | None = None
        self.stack: Tensor | None = None  # (n, numel)
        if all(isinstance(delta, LowRank) for delta in deltas):
            self.low = list(deltas)  # type: ignore[arg-type]
        else:
            self.stack = torch.stack(
                [(d.dense() if isinstance(d, LowRank) else d).reshape(-1).to(dtype) for d in deltas]
            )

    def forward(self, coefficients: Tensor) -> Tensor:
        """(n,), or (n, K) with groups, to the tensor; on the coefficients' device, in float32."""
        return _Compose.apply(coefficients, self)

    def row(self, i: int, device: torch.device) -> Tensor:
        found = self.low[i].dense().reshape(-1) if self.low else self.stack[i]  # type: ignore[index]
        return found.to(device, torch.float32)


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, block: Block) -> Tensor:
        ctx.block = block
        device = coefficients.device
        start = block.base
        out = (
            torch.zeros(block.shape, device=device)
            if start is None
            else start.to(device, torch.float32, copy=True)
        ).reshape(-1)
        c = coefficients.detach().float()
        if block.groups is None and block.stack is not None and block.stack.dtype == torch.float32:
            out.addmv_(block.stack.to(device).T, c)
        else:
            groups = None if block.groups is None else block.groups.to(device)
            for i in range(block.count):
                if groups is None:
                    out.add_(block.row(i, device), alpha=float(c[i]))
                else:
                    out.addcmul_(block.row(i, device), c[i][groups])
        return out.view(block.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        block: Block = ctx.block
        grad = grads[0].detach().reshape(-1).float()
        if block.groups is None:
            if block.stack is not None and block.stack.dtype == torch.float32:
                return block.stack.to(grad.device) @ grad, None
            if block.low:
                square = grad.view(block.shape)  # <G, B A> = <B' G, A>
                inner = [x.scale * ((x.b.to(grad).T @ square) * x.a.to(grad)).sum() for x in block.low]
                return torch.stack(inner), None
            return torch.stack([block.row(i, grad.device) @ grad for i in range(block.count)]), None
        groups = block.groups.to(grad.device)
        size = int(groups.max()) + 1
        rows = [
            torch.bincount(groups, block.row(i, grad.device) * grad, minlength=size)
            for i in range(block.count)
        ]
        return torch.stack(rows).to(grad.dtype), None


def weights_of(model: nn.Module | Weights, name: str = "model") -> Weights:
    """A mapping of names to tensors: a state dict or an open checkpoint as it is, a module's state dict."""
    if isinstance(model, nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    raise TypeError(f"{name} is a {type(model).__name__}: give a state dict, a model or an open checkpoint")


def check_names(models: Sequence[Weights], first: Weights | None = None, what: str = "models") -> list[str]:
    """The names that all have; an error names the first that one lacks."""
    reference = models[0] if first is None else first
    names = list(reference)
    wanted = set(names)
    for i, model in enumerate(models):
        found = set(model)
        if missing := sorted(wanted - found):
            raise ValueError(
                f"{what}[{i}] lacks {missing[0]!r} ({len(missing)} tensors in all): one architecture only"
            )
        if extra := sorted(found - wanted):
            raise ValueError(
                f"{what}[{i}] has {extra[0]!r} ({len(extra)} tensors in all), which the others lack: one architecture only"
            )
    return names


def check_tensor(tensor: Tensor, like: Tensor, name: str, which: str) -> Tensor:
    """The tensor, if it has the shape of `like` and is finite."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{which}: {name!r} has shape {tuple(tensor.shape)}, the first model's is {tuple(like.shape)}"
        )
    if tensor.is_floating_point() != like.is_floating_point():
        raise ValueError(f"{which}: {name!r} is {tensor.dtype}, the first model's is {like.dtype}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{which}: {name!r} has values that are not finite: leave this model out")
    return tensor


class Descent:
    """Cosines of weight matrices between models and the first (or the base), to tell fine-tunings of one base from others."""

    LEAST = 0.3

    def __init__(self, count: int) -> None:
        self.sums = torch.zeros(count, 3, dtype=torch.float64)

    def add(self, i: int, tensor: Tensor, reference: Tensor) -> None:
        """Vectors and norms say nothing: those of two unrelated models are all near 1 or 0."""
        if tensor.ndim > 1 and tensor.is_floating_point() and tensor.numel():
            x, y = tensor.detach().reshape(-1).float().cpu(), reference.detach().reshape(-1).float().cpu()
            self.sums[i] += torch.stack([x @ y, x @ x, y @ y]).double()

    def check(self, which: str = "models", to: str = "the first model") -> None:
        dot, xx, yy = self.sums.T
        for i, (d, x, y) in enumerate(zip(dot.tolist(), xx.tolist(), yy.tolist(), strict=True)):
            if x > 0 and y > 0 and d / (x * y) ** 0.5 < self.LEAST:
                raise ValueError(
                    f"{which}[{i}]: its weights have cosine {d / (x * y) ** 0.5:.2f} to those of {to}: they do not descend "
                    "from one base, and an average of them is worthless; check_descent=False merges all the same"
                )


def forward_logits(output: Any) -> Tensor:
    """Of a transformers output or a plain tensor."""
    return output if isinstance(output, Tensor) else output.logits


def split_batch(
    batch: Any, device: torch.device | str
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Arguments, keyword arguments and labels of a dict (with "labels"), of a pair (inputs, labels) or of inputs alone."""
    if isinstance(batch, Mapping):
        inputs = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        return (), inputs, inputs.pop("labels", None)
    if isinstance(batch, list | tuple):
        if len(batch) == 2:
            return (batch[0].to(device),), {}, batch[1].to(device)
        batch = batch[0]
    return (batch.to(device),), {}, None


def check_batches(batches: Iterable[Any], name: str = "batches") -> None:
    """Several passes are made: an iterator would be empty in the second."""
    if isinstance(batches, Iterator):
        raise TypeError(f"{name} can be read only once: give a DataLoader or a list")
    if not hasattr(batches, "__iter__"):
        raise TypeError(f"{name} is a {type(batches).__name__}: give a DataLoader or a list of batches")


def block_of(name: str) -> str:
    """The layer of a tensor: its name up to the first number, "encoder.layer.3", else up to the first dot.

    Examples
    --------
    >>> block_of("encoder.layer.3.attention.query.weight"), block_of("classifier.weight")
    ('encoder.layer.3', 'classifier')
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group(0) if found else name.split(".")[0]


def tensor_hash(tensor: Tensor) -> str:
    """16 hex digits of a tensor's shape and bytes."""
    array = tensor.detach().cpu().contiguous()
    total = hashlib.blake2b(str((tuple(array.shape), array.dtype)).encode(), digest_size=8)
    if array.numel():
        total.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
