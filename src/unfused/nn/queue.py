"""A first-in, first-out memory of past keys: MoCo's negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unfused.nn.losses import gather

__all__ = ["MemoryQueue"]


class MemoryQueue(nn.Module):
    """The last `size` normalised keys of all processes, in buffers that a checkpoint keeps.

    Parameters
    ----------
    dim : int
        Width of a key.
    size : int
        Keys remembered. Keep it below the number of items that are trained on: an item which meets its own
        older keys is pushed away from itself.

    Attributes
    ----------
    keys : tensor of shape (size, dim)
        Random directions until real keys have replaced them.
    position : tensor, int64 scalar
        Row that the next key overwrites.

    Examples
    --------
    >>> queue = MemoryQueue(dim=2, size=3)
    >>> queue.enqueue(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    >>> queue.keys[:2].tolist(), queue.position.item()
    ([[1.0, 0.0], [0.0, 1.0]], 2)
    """

    keys: torch.Tensor
    position: torch.Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        if dim < 1 or size < 1:
            raise ValueError(f"dim={dim} and size={size} must be at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def negatives(self) -> torch.Tensor:
        """A copy of the keys, (size, dim): autograd holds on to it while `enqueue` overwrites the queue."""
        return self.keys.clone()

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys by those of all processes, (batch, dim); any batch size."""
        size = len(self.keys)
        keys = F.normalize(gather(keys.detach().float()), dim=1)
        rows = self.position + torch.arange(len(keys), device=self.position.device)
        self.keys[rows[-size:] % size] = keys[-size:].to(self.keys)
        self.position.copy_((self.position + len(keys)) % size)
