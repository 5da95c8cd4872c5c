"""A slowly following copy of a module: the momentum encoder of MoCo, BYOL and their kin."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

__all__ = ["EMA"]


class EMA(nn.Module):
    """Exponential moving average of a module's parameters, with its buffers copied.

    Parameters
    ----------
    online : nn.Module
        The module that is trained. It is not registered here, so it stays once in a state dict.
    momentum : float or callable, default=0.999
        Share of the old average that an update keeps; or a function of the number of updates so far.

    Attributes
    ----------
    module : nn.Module
        The average, without gradients.
    updates : tensor, int64 scalar
        How often it was updated; in the state dict, so that a schedule resumes.

    Raises
    ------
    ValueError
        If a constant momentum is not in [0, 1].

    Examples
    --------
    >>> online = nn.Linear(1, 1, bias=False)
    >>> teacher = EMA(online, momentum=0.9)
    >>> _ = nn.init.constant_(teacher.module.weight, 1.0), nn.init.constant_(online.weight, 2.0)
    >>> teacher.update()
    >>> round(teacher.module.weight.item(), 4)
    1.1
    """

    updates: torch.Tensor

    def __init__(self, online: nn.Module, momentum: float | Callable[[int], float] = 0.999) -> None:
        super().__init__()
        if not callable(momentum) and not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum!r} must lie in [0, 1]")
        self._online = (online,)  # in a tuple: a plain attribute would register it as a submodule
        self.momentum = momentum
        self.module = deepcopy(online).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the online module: `average = m * average + (1 - m) * online`."""
        (online,) = self._online
        # The count is read only where a schedule needs it: on a GPU that would wait for the device.
        momentum = self.momentum(int(self.updates)) if callable(self.momentum) else self.momentum
        averages: list[torch.Tensor] = [*self.module.parameters()]
        parameters: list[torch.Tensor] = [*online.parameters()]
        torch._foreach_lerp_(averages, parameters, 1 - momentum)
        for mine, theirs in zip(self.module.buffers(), online.buffers(), strict=True):
            mine.copy_(theirs)
        self.updates += 1

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
