"""A short name for a model's weights, to tell whether what was computed with them still holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> str:
    """Hash (16 hex digits) of names, types, shapes and bytes of parameters and buffers.

    Parameters
    ----------
    model : nn.Module
    keep : callable (name) -> bool, optional
        Which of them count; by default all.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> before = fingerprint(layer)
    >>> _ = nn.init.constant_(layer.bias, 3.0)
    >>> before == fingerprint(layer), fingerprint(layer, lambda name: name == "weight") == before
    (False, False)
    """
    total = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if keep(name) and isinstance(tensor, torch.Tensor):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            total.update(plain.view(torch.uint8).numpy().data)
    return total.hexdigest()
