"""DECAR: deep clustering for audio; an encoder learns to predict the clusters of its own embeddings.

Before every epoch: embed all recordings as they are, whiten to 128 dimensions, k-means; new random top layer.
Within the epoch: cross-entropy of top(embedding(augment(x))) with the cluster ids, clusters drawn uniformly.

    objective = DECAR(encoder, num_items=len(data), augment=augment)
    fit(objective, data, steps=1000, callbacks=[Reassign(objective)], sampler=objective.draw)

where `data` gives `input_values` and `index`, each item's position. The paper takes SGD at rate 0.05 with
weight decay 1e-5.

Reference: Deep Clustering for General-Purpose Audio Representations, 2021, arXiv:2110.08895.
Needs: unlabelled data, gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from unfused.pretrain._output import ObjectiveOutput
from unfused.pretrain.unfused import cluster_features

__all__ = ["DECAR", "Reassign"]


class DECAR(nn.Module):
    """The objective of one epoch, and the cluster ids it holds.

    Parameters
    ----------
    encoder : nn.Module
        With `embed(x)`, (batch, embedding_dim), and `embedding_dim`.
    num_items : int
        Items of the training set.
    num_clusters : int, default=512
        Far more than classes are expected, far fewer than items.
    augment : nn.Module, optional
        Applied to the inputs (one view). In eval mode, in which the embeddings for k-means are made, it must
        change nothing at random.
    seed : int, default=0
        Of k-means and the top layers.

    Attributes
    ----------
    encoder : nn.Module
        What is kept.
    assignments : tensor of shape (num_items,), int64
        Cluster of each item; -1 before the first `reassign`.
    rounds : tensor, int64 scalar
        How often the items were clustered.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> objective = DECAR(AudioNTT(n_mels=16, width=4, dim=8), num_items=40, num_clusters=4)
    >>> objective.reassign(np.random.default_rng(0).normal(size=(40, 8)))
    >>> objective(input_values=torch.randn(6, 1, 16, 16), index=torch.arange(6)).loss.shape
    torch.Size([])
    """

    assignments: torch.Tensor
    rounds: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        num_items: int,
        num_clusters: int = 512,
        augment: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 2 <= num_clusters <= num_items:
            raise ValueError(f"num_clusters={num_clusters} must be between 2 and num_items={num_items}")
        self.encoder, self.augment = encoder, augment
        self.num_clusters, self.seed = num_clusters, seed
        self.top = nn.Linear(encoder.embedding_dim, num_clusters)  # type: ignore[arg-type]
        self.register_buffer("assignments", torch.full((num_items,), -1))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.long))

    def forward(self, input_values: torch.Tensor, index: torch.Tensor) -> ObjectiveOutput:
        """The loss of a batch.

        Parameters
        ----------
        input_values : tensor of shape (batch, channels, height, width)
        index : int tensor of shape (batch,)
            Positions of the items in the training set.

        Raises
        ------
        RuntimeError
            Before the first `reassign`.
        """
        if not self.rounds:
            raise RuntimeError("DECAR has no clusters yet: train with callbacks=[Reassign(objective)]")
        logits = self.top(self.embed(input_values))
        loss = F.cross_entropy(logits.float(), self.assignments[index])
        return ObjectiveOutput(loss=loss, terms={"cross_entropy": loss.detach()})

    def embed(self, input_values: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, embedding_dim) of the inputs, which are augmented in training mode only."""
        if self.augment is not None:
            input_values = self.augment(input_values)
        return self.encoder.embed(input_values)  # type: ignore[operator]

    @torch.no_grad()
    def reassign(self, features: Any) -> None:
        """Cluster all items anew and draw a new top layer.

        Parameters
        ----------
        features : array of shape (num_items, dim)
            Embeddings of all items, in the order of the training set.
        """
        if len(features) != len(self.assignments):
            raise ValueError(f"features has {len(features)} rows for num_items={len(self.assignments)}")
        seed = int(np.random.SeedSequence([self.seed, int(self.rounds)]).generate_state(1)[0])
        ids = cluster_features(features, self.num_clusters, seed=seed).ids
        self.assignments.copy_(torch.from_numpy(ids))
        # Its own generator: the global one is not yet restored when a run resumes at the start of an epoch.
        weight = torch.randn(self.top.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.top.weight.copy_(0.01 * weight)
        self.top.bias.zero_()
        self.rounds += 1

    def draw(self, epoch: int, generator: torch.Generator) -> torch.Tensor:
        """A sampler for `unfused.train.fit`: rows in which every cluster comes equally often, (num_items,).

        A small cluster's items repeat, a large one's are sampled. Before the first `reassign`, a permutation.
        """
        items = len(self.assignments)
        if not self.rounds:
            return torch.randperm(items, generator=generator)
        ids = self.assignments.cpu()
        shuffled = torch.randperm(items, generator=generator)
        members = shuffled[ids[shuffled].argsort(stable=True)]  # cluster by cluster, in random order
        sizes = torch.bincount(ids, minlength=self.num_clusters)
        starts = sizes.cumsum(0) - sizes
        filled = sizes.nonzero()[:, 0]
        # How many of each cluster: equal shares, the remainder to random ones.
        quota = torch.full((len(filled),), items // len(filled))
        quota[torch.randperm(len(filled), generator=generator)[: items % len(filled)]] += 1
        cluster = filled.repeat_interleave(quota)
        rank = torch.arange(items) - (quota.cumsum(0) - quota).repeat_interleave(quota)
        rows = members[starts[cluster] + rank % sizes[cluster]]
        return rows[torch.randperm(items, generator=generator)]


class Reassign(TrainerCallback):
    """Clusters the training set of a `DECAR` at the start of every epoch, under `fit` or any Trainer.

    A run that resumes within an epoch goes on with the clusters of its checkpoint.

    Parameters
    ----------
    objective : DECAR
        The module that is trained.
    batch_size : int, default=256
        For embedding.
    """

    def __init__(self, objective: DECAR, batch_size: int = 256) -> None:
        self.objective, self.batch_size = objective, batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.objective.rounds.zero_()

    def on_epoch_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        objective = self.objective
        if int(objective.rounds) > int((state.epoch or 0) + 1e-6):
            return
        objective.reassign(self.embed_all(train_dataloader))
        if dist.is_available() and dist.is_initialized():  # one process's clusters, to the bit
            dist.broadcast(objective.assignments, src=0)
        for parameter in objective.top.parameters():  # a new layer has no past gradients
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def embed_all(self, train_dataloader: Any) -> np.ndarray:
        """Embeddings (num_items, embedding_dim) of the data set in its own order, without augmentation."""
        objective = self.objective
        device = objective.top.weight.device
        loader = DataLoader(
            train_dataloader.dataset,
            batch_size=self.batch_size,
            collate_fn=train_dataloader.collate_fn,
            generator=torch.Generator(),  # or the loader would draw a number from the global one
        )
        training = objective.training
        objective.eval()
        with torch.inference_mode():
            parts = [objective.embed(batch["input_values"].to(device)).float().cpu() for batch in loader]
        objective.train(training)
        return torch.cat(parts).numpy()
