"""DeLoRes-M: momentum contrast on the embedding, decorrelation at every block of the encoder.

Query q from one view, key k from the other by a momentum encoder, a queue of earlier keys as negatives.
Between query and key encoder, at each depth i with its own projector, the Barlow Twins term of DeLoRes-S:
    L = InfoNCE(q, k, queue) + sum_i BarlowTwins(projector_i(q_i), projector_i(k_i))

Reference: Decorrelating Feature Spaces for Learning General-Purpose Audio Representations, IEEE JSTSP 2022,
    arXiv:2203.13628.
Needs: unlabelled data, gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unfused.nn.ema import EMA
from unfused.nn.heads import projector
from unfused.nn.losses import barlow_twins, info_nce
from unfused.nn.queue import MemoryQueue
from unfused.pretrain._output import ObjectiveOutput

__all__ = ["DeLoResM"]


class _WithHead(nn.Module):
    """An encoder with a linear head on its embedding, as query and as key."""

    def __init__(self, encoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embedding_dim, dim)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        frames, blocks = self.encoder(x)
        return self.head(self.encoder.pool(frames)), blocks  # type: ignore[operator]


class DeLoResM(nn.Module):
    """MoCo v2 plus Barlow Twins at the auxiliary depths.

    Parameters
    ----------
    encoder : nn.Module
        `encoder(x)` gives frames and one feature (batch, block_dims[i]) per block; `encoder.pool(frames)`
        gives the embedding (batch, embedding_dim).
    augment : nn.Module
        Makes a random view of a batch; called twice.
    dim : int, default=128
        Width of query and key.
    dims : sequence of int, default=(2048, 2048, 2048)
        Hidden and output widths of the projectors at the auxiliary depths.
    queue_size : int, default=65536
        Keep it below the number of recordings.
    momentum : float, default=0.999
        Of the key encoder; a few hundred steps need less, such as 0.99.
    temperature : float, default=0.07
    lambd, scale : float, default=5e-5, 1/32
        As in `DeLoResS`.

    Attributes
    ----------
    encoder : nn.Module
        What is kept: the query encoder.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> encoder = AudioNTT(n_mels=16, width=4, dim=8)
    >>> objective = DeLoResM(encoder, augment=nn.Dropout(0.2), dims=(16, 16, 16), queue_size=32)
    >>> sorted(objective(input_values=torch.randn(6, 1, 16, 16)).terms)
    ['barlow_twins', 'info_nce']
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: nn.Module,
        dim: int = 128,
        dims: Sequence[int] = (2048, 2048, 2048),
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        lambd: float = 5e-5,
        scale: float = 1 / 32,
    ) -> None:
        super().__init__()
        self.augment, self.temperature, self.lambd, self.scale = augment, temperature, lambd, scale
        self.query = _WithHead(encoder, dim)
        self.key = EMA(self.query, momentum)
        self.queue = MemoryQueue(dim, queue_size)
        self.projectors = nn.ModuleList(
            projector((width, *dims))
            for width in encoder.block_dims  # type: ignore[union-attr]
        )

    @property
    def encoder(self) -> nn.Module:
        return self.query.encoder

    def forward(self, input_values: torch.Tensor) -> ObjectiveOutput:
        """The loss of a batch of inputs, (batch, channels, height, width), of two items at least."""
        view, other = self.augment(input_values), self.augment(input_values)
        if self.training:
            self.key.update()  # here, as in MoCo, so that any trainer will do
        q, q_blocks = self.query(view)
        k, k_blocks = self.key(other)
        contrast = info_nce(q, k, self.queue.negatives(), self.temperature)
        decorrelation = torch.stack(
            [
                barlow_twins(head(a), head(b), self.lambd, self.scale)
                for head, a, b in zip(self.projectors, q_blocks, k_blocks, strict=True)
            ]
        ).sum()
        if self.training:
            self.queue.enqueue(k)
        terms = {"info_nce": contrast.detach(), "barlow_twins": decorrelation.detach()}
        return ObjectiveOutput(loss=contrast + decorrelation, terms=terms)
