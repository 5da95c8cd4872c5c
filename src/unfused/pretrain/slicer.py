"""SLICER: momentum contrast of recordings, in both directions, and contrast of clusters.

Instances: q of each view against the other view's key k by a momentum encoder, with a queue of negatives.
Clusters: a second head gives each view's assignment matrix P (batch, clusters), softmax over the clusters. A
column is what the batch looks like to a cluster, which must find its own column of the other view among all.
    L = InfoNCE(q1, k2) + InfoNCE(q2, k1) + NTXent(columns of P1, columns of P2)

Reference: SLICER: Learning universal audio representations using low-resource self-supervised pre-training,
    ICASSP 2023, arXiv:2211.01519.
Needs: unlabelled data, gradients.
"""

from __future__ import annotations

import torch
from torch import nn

from unfused.nn.ema import EMA
from unfused.nn.losses import gather, info_nce, nt_xent
from unfused.nn.queue import MemoryQueue
from unfused.pretrain._output import ObjectiveOutput

__all__ = ["SLICER"]


class _Instance(nn.Module):
    """Encoder and linear head: embedding (batch, embedding_dim) and query or key (batch, dim)."""

    def __init__(self, encoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embedding_dim, dim)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.encoder.embed(x)  # type: ignore[operator]
        return embedding, self.head(embedding)


class SLICER(nn.Module):
    """Symmetric MoCo plus contrast between the columns of two assignment matrices.

    The paper's k-mix is an augmentation (mixing with recordings of other clusters) and is left to `augment`.

    Parameters
    ----------
    encoder : nn.Module
        With `embed(x)`, (batch, embedding_dim), and `embedding_dim`.
    augment : nn.Module
        Makes a random view of a batch; called twice.
    dim : int, default=128
        Width of query and key.
    num_clusters : int, default=128
    queue_size : int, default=65536
        Keep it below the number of recordings.
    momentum : float, default=0.999
        Of the key encoder; a few hundred steps need less, such as 0.99.
    temperature : float, default=0.07
        Of the instances.
    cluster_temperature : float, default=1.0

    Attributes
    ----------
    encoder : nn.Module
        What is kept: the query encoder.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> encoder = AudioNTT(n_mels=16, width=4, dim=8)
    >>> objective = SLICER(encoder, augment=nn.Dropout(0.2), num_clusters=5, queue_size=32)
    >>> sorted(objective(input_values=torch.randn(6, 1, 16, 16)).terms)
    ['clusters', 'instances']
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: nn.Module,
        dim: int = 128,
        num_clusters: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        cluster_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.augment, self.temperature, self.cluster_temperature = augment, temperature, cluster_temperature
        width = int(encoder.embedding_dim)  # type: ignore[arg-type]
        self.query = _Instance(encoder, dim)
        self.key = EMA(self.query, momentum)
        self.queue = MemoryQueue(dim, queue_size)
        self.cluster_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_clusters))

    @property
    def encoder(self) -> nn.Module:
        return self.query.encoder

    def forward(self, input_values: torch.Tensor) -> ObjectiveOutput:
        """The loss of a batch of inputs, (batch, channels, height, width)."""
        view1, view2 = self.augment(input_values), self.augment(input_values)
        if self.training:
            self.key.update()  # here, as in MoCo, so that any trainer will do
        (h1, q1), (h2, q2) = self.query(view1), self.query(view2)
        (_, k1), (_, k2) = self.key(view1), self.key(view2)
        negatives = self.queue.negatives()
        instances = info_nce(q1, k2, negatives, self.temperature) + info_nce(
            q2, k1, negatives, self.temperature
        )
        if self.training:  # not between the two directions: q2 would meet k2 as a negative
            self.queue.enqueue(torch.cat([k1, k2]))
        p1, p2 = (self.cluster_head(h).float().softmax(1) for h in (h1, h2))  # (batch, clusters)
        clusters = nt_xent(gather(p1).T, gather(p2).T, self.cluster_temperature, distributed=False)
        terms = {"instances": instances.detach(), "clusters": clusters.detach()}
        return ObjectiveOutput(loss=instances + clusters, terms=terms)
