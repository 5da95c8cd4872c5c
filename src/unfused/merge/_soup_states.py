"""What soups are made of: state dicts of one architecture, checked, and the mean of one tensor of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unfused.merge._compose import Descent, Weights, check_names, check_tensor, weights_of


def average_tensors(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The soup of one tensor: a weighted mean, accumulated in float32, in the dtype of the first.

    Parameters
    ----------
    tensors : sequence of k Tensors of one shape
        Those that are not floating point are not averaged: the first is copied.
    weights : sequence of k floats, optional
        Divided by their sum; by default equal.

    Examples
    --------
    >>> average_tensors([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]).tolist()
    [2.0, 3.0]
    """
    if not tensors:
        raise ValueError("tensors is empty: give at least one")
    shares = shares_of(weights, len(tensors))
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    total = torch.zeros(first.shape, dtype=wide(first.dtype, len(tensors)), device=first.device)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(total), alpha=share)
    return total.div_(sum(shares)).to(first.dtype)


def wide(dtype: torch.dtype, count: int) -> torch.dtype:
    """The dtype of a sum."""
    if dtype == torch.float64 or (count > 100 and dtype.itemsize < 4):
        return torch.float64
    return torch.float32


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    shares = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(shares) != count:
        raise ValueError(f"weights has {len(shares)} numbers for {count} models")
    if not all(map(math.isfinite, shares)) or abs(sum(shares)) < 1e-12:
        raise ValueError(f"weights={shares}: finite numbers that do not add up to 0")
    return shares


def states_of(models: Sequence[nn.Module | Weights]) -> tuple[list[Weights], list[str]]:
    if isinstance(models, nn.Module | Mapping):
        raise TypeError("models: give a list of models, not one")
    states = [weights_of(model, f"models[{i}]") for i, model in enumerate(models)]
    if not states:
        raise ValueError("models is empty: give at least one")
    names = check_names(states)
    if lora := next((name for name in names if ".lora_A." in name or ".lora_B." in name), None):
        raise ValueError(
            f"models[0] has LoRA factors ({lora!r}), whose mean is not the mean of the products: merge each adapter first"
        )
    return states, names


def check_descent_of(
    states: Sequence[Weights], names: Sequence[str], base: nn.Module | Weights | None
) -> None:
    reference = states[0] if base is None else weights_of(base, "base")
    descent = Descent(len(states))
    for name in names:
        first = states[0][name]
        like = reference[name] if name in reference else None
        for i, state in enumerate(states):
            tensor = check_tensor(state[name], first, name, f"models[{i}]")
            if like is not None and like.shape == tensor.shape:
                descent.add(i, tensor, like)
    descent.check(to="the first model" if base is None else "the base")


def twins(state: Weights, names: Sequence[str]) -> Iterable[tuple[str, str | None]]:
    """Each name, and the earlier one that it shares its memory with."""
    if not isinstance(state, dict):  # what is read from a file shares nothing
        yield from ((name, None) for name in names)
        return
    seen: dict[Any, str] = {}
    for name in names:
        tensor = state[name]
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        yield name, seen.get(key)
        seen.setdefault(key, name)
