"""Scratch: supervised training of a fresh encoder on the labels alone.

What a pretrained encoder must beat: the same architecture, augmentation, steps and care, from a random start.

Reference: none (a baseline).
Needs: labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unfused.finetune.fine_tune import FineTune

__all__ = ["scratch"]


def scratch(
    make_encoder: Callable[[], nn.Module], num_classes: int, seed: int = 0, **options: Any
) -> FineTune:
    """A `FineTune` objective on a freshly initialised encoder.

    Parameters
    ----------
    make_encoder : callable
        Builds an encoder with random weights.
    num_classes : int
    seed : int, default=0
        Of the weights of encoder and head. The global generator of torch is left as it was.
    **options
        `augment`, `dropout`, `label_smoothing` of `FineTune`.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> make = lambda: AudioNTT(n_mels=16, width=4, dim=8)
    >>> one, same = scratch(make, 3, seed=1), scratch(make, 3, seed=1)
    >>> all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FineTune(make_encoder(), num_classes, **options)
