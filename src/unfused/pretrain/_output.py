"""What the self-supervised objectives return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ObjectiveOutput(ModelOutput):
    """`loss`, a scalar with gradients, and `terms`, its parts by name, detached."""

    loss: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] | None = None
