"""DeLoRes-S: an embedding that the augmentation does not change and that is not redundant (Barlow Twins).

z = projector(embedding(augment(x))) of two views, C = norm(z1)' norm(z2) / B, norm over the batch:
    L = (sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2) / 32
No negatives, no second encoder, no large batch.

Reference: DeLoRes: Decorrelating Latent Spaces for Low-Resource Audio Representation Learning, AAAI workshop
    on Self-supervised Learning for Audio and Speech 2022, arXiv:2203.13628.
Needs: unlabelled data, gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unfused.nn.heads import projector
from unfused.nn.losses import barlow_twins
from unfused.pretrain._output import ObjectiveOutput

__all__ = ["DeLoResS"]


class DeLoResS(nn.Module):
    """Barlow Twins with the constants of DeLoRes-S.

    Parameters
    ----------
    encoder : nn.Module
        With `embed(x)`, (batch, embedding_dim), and `embedding_dim`.
    augment : nn.Module
        Makes a random view of a batch; called twice.
    dims : sequence of int, default=(2048, 2048, 2048)
        Hidden and output widths of the projector.
    lambd : float, default=5e-5
        Weight of the off-diagonal. The authors' later code multiplies the diagonal by it too, which leaves
        next to nothing of the loss.
    scale : float, default=1/32

    Attributes
    ----------
    encoder : nn.Module
        What is kept.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> objective = DeLoResS(AudioNTT(n_mels=16, width=4, dim=8), augment=nn.Dropout(0.2), dims=(16, 16, 16))
    >>> objective(input_values=torch.randn(6, 1, 16, 16)).loss.shape
    torch.Size([])
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: nn.Module,
        dims: Sequence[int] = (2048, 2048, 2048),
        lambd: float = 5e-5,
        scale: float = 1 / 32,
    ) -> None:
        super().__init__()
        self.encoder, self.augment, self.lambd, self.scale = encoder, augment, lambd, scale
        self.projector = projector((int(encoder.embedding_dim), *dims))  # type: ignore[arg-type]

    def forward(self, input_values: torch.Tensor) -> ObjectiveOutput:
        """The loss of a batch of inputs, (batch, channels, height, width), of two items at least."""
        z1, z2 = (self._project(self.augment(input_values)) for _ in range(2))
        loss = barlow_twins(z1, z2, self.lambd, self.scale)
        return ObjectiveOutput(loss=loss, terms={"barlow_twins": loss.detach()})

    def _project(self, view: torch.Tensor) -> torch.Tensor:
        return self.projector(self.encoder.embed(view))  # type: ignore[operator]
