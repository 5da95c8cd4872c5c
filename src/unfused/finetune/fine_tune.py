"""Fine-tune: a linear head on an encoder, all of it trained on the labels.

The baseline of every other way to use a pretrained encoder, and the last stage of UnFuSeD:
    logits = W dropout(embedding(augment(x))) + b,    loss = cross-entropy(logits, labels)
Labels may be class ids or distributions over the classes (spread or distilled labels).

Reference: none (a baseline).
Needs: labels, an encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

__all__ = ["FineTune", "FineTuneOutput"]


@dataclass
class FineTuneOutput(ModelOutput):
    """`loss` (a scalar, where labels were given) and `logits` (batch, num_classes)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FineTune(nn.Module):
    """An encoder and a linear head, trained together.

    Parameters
    ----------
    encoder : nn.Module
        With `embed(x) -> (batch, embedding_dim)` and `embedding_dim`. Shared, not copied.
    num_classes : int
    augment : nn.Module, optional
        Applied to the inputs of a batch in training mode only.
    dropout : float, default=0.3
        On the embedding, before the head.
    label_smoothing : float, default=0.0
        Share of each target that is spread evenly over the classes.

    Attributes
    ----------
    encoder, head : nn.Module
        What is kept: `head` is the `nn.Linear(embedding_dim, num_classes)`.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> model = FineTune(AudioNTT(n_mels=16, width=4, dim=8), num_classes=3)
    >>> out = model(input_values=torch.randn(5, 1, 16, 16), labels=torch.tensor([0, 1, 2, 0, 1]))
    >>> out.logits.shape, out.loss.shape
    (torch.Size([5, 3]), torch.Size([]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        augment: nn.Module | None = None,
        dropout: float = 0.3,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: at least 2 classes are needed")
        self.encoder = encoder
        self.augment = augment
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.embedding_dim, num_classes)  # type: ignore[arg-type]
        self.label_smoothing = label_smoothing

    def forward(
        self, input_values: torch.Tensor, labels: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> FineTuneOutput:
        """Logits, and the loss where labels are given.

        Parameters
        ----------
        input_values : tensor of shape (batch, channels, height, width)
        labels : int tensor of shape (batch,), or float tensor of shape (batch, num_classes), optional
            Class ids, or distributions whose rows sum to 1.
        **inputs
            What else `encoder.embed` takes, an attention mask say.
        """
        if self.training and self.augment is not None:
            input_values = self.augment(input_values)
        logits = self.head(self.dropout(self.embed(input_values, **inputs)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return FineTuneOutput(loss=loss, logits=logits)

    def embed(self, input_values: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(input_values, **inputs)  # type: ignore[operator]
