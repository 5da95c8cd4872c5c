"""SimCLR: two views of an item attract, views of different items repel.

z = projector(embedding(augment(x))), and for a view i with its other view j among the 2B views of the batch
    L_i = -log( exp(cos(z_i, z_j) / t) / sum_{k != i} exp(cos(z_i, z_k) / t) )
The teacher that we use at desk scale: no queue, no second encoder, quick with a few thousand recordings.

Reference: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv:2002.05709.
Needs: unlabelled data, gradients.
Slug: contrastive
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unfused.nn.heads import projector
from unfused.nn.losses import nt_xent
from unfused.pretrain._output import ObjectiveOutput

__all__ = ["Contrastive"]


class Contrastive(nn.Module):
    """SimCLR's objective.

    Parameters
    ----------
    encoder : nn.Module
        With `embed(x)`, (batch, embedding_dim), and `embedding_dim`.
    augment : nn.Module
        Makes a random view of a batch; called twice.
    dims : sequence of int, optional
        Hidden and output widths of the projector; default: `(embedding_dim, 128)`.
    temperature : float, default=0.1

    Attributes
    ----------
    encoder : nn.Module
        What is kept; the projector is thrown away.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> objective = Contrastive(AudioNTT(n_mels=16, width=4, dim=8), augment=nn.Dropout(0.2))
    >>> objective(input_values=torch.randn(6, 1, 16, 16)).loss.shape
    torch.Size([])
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: nn.Module,
        dims: Sequence[int] | None = None,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        width = int(encoder.embedding_dim)  # type: ignore[arg-type]
        self.encoder, self.augment, self.temperature = encoder, augment, temperature
        self.projector = projector((width, *(dims or (width, 128))))

    def forward(self, input_values: torch.Tensor) -> ObjectiveOutput:
        """The loss of a batch of inputs, (batch, channels, height, width)."""
        views = torch.cat([self.augment(input_values), self.augment(input_values)])
        # Both views in one pass: batch norm then sees twice the items.
        z1, z2 = self.projector(self.encoder.embed(views)).chunk(2)  # type: ignore[operator]
        loss = nt_xent(z1, z2, self.temperature)
        return ObjectiveOutput(loss=loss, terms={"nt_xent": loss.detach()})
