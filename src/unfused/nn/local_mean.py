"""A teacher that averages only the last few epochs' weights, few early in training and more later."""

from __future__ import annotations

import math
from collections import deque
from copy import deepcopy

import torch
from torch import nn

from unfused.nn.ema import EMA

__all__ = ["LocalMeanTeacher"]


class LocalMeanTeacher:
    """Exponential average of a module's checkpoints inside a window, started anew at every update.

    At epoch t of T the window is `m_t = floor((1 + cos(pi (T + t) / T)) / 2 * (m_max - m_min)) + m_min` epochs long; the
    average starts at the checkpoint of epoch t - m_t and takes in those after it one by one. A long average from the start
    would keep weights that had not learned anything yet; the last checkpoint alone remembers nothing.

    Parameters
    ----------
    m_min, m_max : int, default=2, 9
        Length of the window at the first and the last epoch.
    decay : float, default=0.9
        Share of the old average that each checkpoint keeps.

    Attributes
    ----------
    module : nn.Module
        The average, without gradients, in eval mode. It is another module after every update.
    checkpoints : deque of dict
        State dicts, at most m_max + 1. They are not written anywhere: after a resumed run the window begins anew.

    Raises
    ------
    ValueError
        For a decay outside of [0, 1], or unless 0 <= m_min <= m_max.

    Examples
    --------
    >>> teacher = LocalMeanTeacher()
    >>> [teacher.window(epoch, 50) for epoch in (0, 20, 35, 50)]
    [2, 4, 7, 9]
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> for epoch, weight in enumerate([1.0, 2.0]):
    ...     _ = nn.init.constant_(layer.weight, weight)
    ...     teacher.update(layer, epoch, 50)
    >>> round(teacher.module.weight.item(), 4)
    1.1
    """

    def __init__(self, m_min: int = 2, m_max: int = 9, decay: float = 0.9) -> None:
        if not 0 <= m_min <= m_max:
            raise ValueError(f"m_min={m_min}, m_max={m_max}: give 0 <= m_min <= m_max")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay!r} must lie in [0, 1]")
        self.m_min, self.m_max, self.decay = m_min, m_max, decay
        self.checkpoints: deque[dict[str, torch.Tensor]] = deque(maxlen=m_max + 1)
        self._module: nn.Module | None = None

    def window(self, epoch: int, num_epochs: int) -> int:
        """How many epochs the average reaches back."""
        rise = 0.5 * (1 + math.cos(math.pi * (num_epochs + epoch) / num_epochs))
        return math.floor(rise * (self.m_max - self.m_min) + 1e-9) + self.m_min

    def update(self, module: nn.Module, epoch: int, num_epochs: int) -> None:
        """Take in the weights as they are at the end of `epoch`, counted from 0.

        Parameters
        ----------
        module : nn.Module
            What is trained, without its frozen backbone: up to m_max + 1 copies of its state are kept.
        epoch, num_epochs : int
        """
        self.checkpoints.append({name: value.detach().clone() for name, value in module.state_dict().items()})
        recent = list(self.checkpoints)[-(self.window(epoch, num_epochs) + 1) :]
        online = deepcopy(module)
        online.load_state_dict(recent[0])
        average = EMA(online, self.decay)
        for checkpoint in recent[1:]:
            online.load_state_dict(checkpoint)
            average.update()
        self._module = average.module.eval()

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise RuntimeError("there is no teacher before the first update")
        return self._module
