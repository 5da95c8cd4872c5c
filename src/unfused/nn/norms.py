"""Normalisation layers by kind: every model family of transformers brings an RMSNorm class of its own."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["NORMS", "is_rms_norm"]


class _RmsNormMeta(type):
    def __instancecheck__(cls, module: object) -> bool:
        return (
            isinstance(module, nn.Module)
            and type(module).__name__.endswith("RMSNorm")
            and isinstance(getattr(module, "weight", None), torch.Tensor)
        )


class RMSNorm(metaclass=_RmsNormMeta):
    """Any RMSNorm with a weight: `nn.RMSNorm`, `LlamaRMSNorm`, ... (`isinstance` goes by the class name)."""


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, RMSNorm)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm with a weight.

    Examples
    --------
    >>> is_rms_norm(nn.RMSNorm(4)), is_rms_norm(nn.LayerNorm(4))
    (True, False)
    """
    return isinstance(module, RMSNorm)
