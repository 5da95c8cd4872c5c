"""UnFuSeD: clusters of a teacher's features, distilled into a freshly initialised student.

1. Cluster. The frozen teacher embeds the target recordings; PCA-whitening, L2 rows and k-means give each the
   id y of its cluster (`cluster_features`; `choose_num_clusters` finds how many).
2. Distil. A student that starts from random weights learns y, and its deepest classifier c teaches
   classifiers p_i on its earlier blocks ("be your own teacher"):
       L = CE(c, y) + alpha sum_i CE(p_i, y)
         + beta sum_i KL(softmax c || softmax p_i) + gamma sum_i mean(2 - 2 cos(p_i, c))
3. Fine-tune the student on the few labels (`unfused.finetune`). Without any, `label_queue` says which to get.

As soon as there are labels, clusters can carry classes instead of ids. That is our extension of the paper:
`propagate_labels` spreads the labels over the graph of nearest neighbours, `cluster_targets` gives every
cluster the mean of what reached it, and the student learns these distributions.

Reference: UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation, ICASSP SASB workshop 2023,
    arXiv:2303.05668.
Needs: unlabelled data, a teacher encoder, gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from unfused.nn.graph import cosine_graph, spread
from unfused.nn.heads import projector
from unfused.nn.kmeans import as_features, group_numbers, kmeans, nearest, standardize_groups, whiten
from unfused.nn.losses import cosine_mse, kl_from_logits, soft_cross_entropy

__all__ = [
    "Clusters",
    "UnFuSeD",
    "UnFuSeDOutput",
    "choose_num_clusters",
    "cluster_features",
    "cluster_targets",
    "label_queue",
    "propagate_labels",
]


@dataclass
class UnFuSeDOutput(ModelOutput):
    """`loss`, its `terms`, `logits` (batch, K) of the deepest classifier and `aux_logits` of the others."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    aux_logits: tuple[torch.Tensor, ...] | None = None
    terms: dict[str, torch.Tensor] | None = None


class UnFuSeD(nn.Module):
    """The student and its heads.

    Parameters
    ----------
    encoder : nn.Module
        A fresh one. `encoder(x)` gives frames (batch, time, dim) and one feature (batch, block_dims[i]) per
        block; `encoder.pool(frames)` gives the embedding (batch, embedding_dim).
    num_clusters : int
        K, or the number of classes where the labels are distributions over classes.
    alpha, beta, gamma : float, default=0.7, 0.3, 0.003
        Weights of the auxiliary cross-entropies, of the KL and of the cosine terms.
    detach_teacher : bool, default=True
        The deepest classifier is a fixed target in the KL and cosine terms, as in the original
        self-distillation. In the paper's release it is not.
    augment : nn.Module, optional
        Applied to the inputs (one view).

    Attributes
    ----------
    encoder : nn.Module
        What is kept.

    Examples
    --------
    >>> from unfused.nn.audio_model import AudioNTT
    >>> student = UnFuSeD(AudioNTT(n_mels=16, width=4, dim=8), num_clusters=5)
    >>> out = student(input_values=torch.randn(6, 1, 16, 16), labels=torch.tensor([0, 1, 2, 3, 4, -1]))
    >>> out.logits.shape, len(out.aux_logits), sorted(out.terms)
    (torch.Size([6, 5]), 3, ['auxiliary', 'cosine', 'cross_entropy', 'kl'])
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_clusters: int,
        alpha: float = 0.7,
        beta: float = 0.3,
        gamma: float = 0.003,
        detach_teacher: bool = True,
        augment: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_clusters < 2:
            raise ValueError(
                f"num_clusters={num_clusters}: a student needs two clusters or more to tell apart"
            )
        self.encoder, self.augment = encoder, augment
        self.num_clusters, self.detach_teacher = num_clusters, detach_teacher
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.classifier = nn.Linear(encoder.embedding_dim, num_clusters)  # type: ignore[arg-type]
        self.heads = nn.ModuleList(
            projector((dim, num_clusters, num_clusters, num_clusters))
            for dim in encoder.block_dims  # type: ignore[union-attr]
        )

    def forward(
        self, input_values: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor | None = None
    ) -> UnFuSeDOutput:
        """The loss of a batch.

        Parameters
        ----------
        input_values : tensor of shape (batch, channels, height, width)
        labels : int tensor of shape (batch,) or float tensor of shape (batch, num_clusters)
            Cluster ids, or distributions. An id of -1 or a row of zeros: no cross-entropy for this item, on
            which the student only distils itself.
        label_weights : tensor of shape (batch,), optional
            How much each item counts in the cross-entropies, which are weighted means.
        """
        if self.augment is not None:
            input_values = self.augment(input_values)
        frames, blocks = self.encoder(input_values)
        logits = self.classifier(self.encoder.pool(frames))  # type: ignore[operator]
        aux_logits = tuple(head(block) for head, block in zip(self.heads, blocks, strict=True))

        targets, weights = self._targets(labels)
        weights = weights if label_weights is None else weights * label_weights
        teacher = logits.detach() if self.detach_teacher else logits
        zero = logits.new_zeros(())
        terms = {
            "cross_entropy": soft_cross_entropy(logits, targets, weights),
            "auxiliary": sum((soft_cross_entropy(p, targets, weights) for p in aux_logits), zero),
            "kl": sum((kl_from_logits(teacher, p) for p in aux_logits), zero),
            "cosine": sum((cosine_mse(p, teacher) for p in aux_logits), zero),
        }
        loss = (
            terms["cross_entropy"]
            + self.alpha * terms["auxiliary"]
            + self.beta * terms["kl"]
            + self.gamma * terms["cosine"]
        )
        terms = {name: term.detach() for name, term in terms.items()}
        return UnFuSeDOutput(loss=loss, logits=logits, aux_logits=aux_logits, terms=terms)

    def _targets(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distributions (batch, num_clusters) and, per item, 1 where there is one and 0 where not."""
        if labels.ndim == 1:
            labels = F.one_hot(labels.long() + 1, self.num_clusters + 1)[:, 1:].float()  # -1 becomes zeros
        if labels.ndim != 2 or labels.shape[1] != self.num_clusters:
            shape = f"(batch, {self.num_clusters})"
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: give ids (batch,) or distributions {shape}"
            )
        return labels, (labels.sum(1) > 0).float()


@dataclass(frozen=True)
class Clusters:
    """A clustering of N items.

    Attributes
    ----------
    ids : int64 array of shape (N,)
        Cluster of each item, 0..K-1.
    centroids : float32 array of shape (K, dim)
    features : float32 array of shape (N, dim)
        The transformed features (standardised, whitened, normalised) that were clustered.
    distances : float32 array of shape (N,)
        Squared distance of each item to its centroid.
    """

    ids: np.ndarray
    centroids: np.ndarray
    features: np.ndarray
    distances: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Members of each cluster, (K,)."""
        return np.bincount(self.ids, minlength=len(self.centroids))

    def labels(self, min_size: int = 3) -> np.ndarray:
        """The ids, with -1 (no cross-entropy) for members of clusters smaller than `min_size`; (N,)."""
        return np.where(self.sizes[self.ids] >= min_size, self.ids, -1)


def cluster_features(
    features: Any,
    k: int,
    pca: int | None = 128,
    whiten: bool = True,
    groups: Sequence[Any] | None = None,
    iterations: int = 20,
    seed: int = 0,
    balanced: bool = False,
) -> Clusters:
    """Stage 1: PCA-whitening, L2 rows, k-means.

    Parameters
    ----------
    features : array of shape (N, D)
        A teacher's embeddings of the whole recordings.
    k : int
        Clusters. `choose_num_clusters` proposes one.
    pca : int or None, default=128
        Components kept, `min(pca, D, N / 10)`; None: the features as they are.
    whiten : bool, default=True
        Scale the components to unit variance.
    groups : sequence of length N, optional
        Speaker, site or device of each item. Features are standardised within each, so that clusters find
        what the groups have in common.
    iterations : int, default=20
    seed : int, default=0
    balanced : bool, default=False
        Clusters of about equal size (Sinkhorn assignment), where the paper takes the nearest centroid.

    Raises
    ------
    ValueError
        If `k` is not a number from 1 to N, or the features are not finite or all the same.

    Examples
    --------
    >>> blobs = np.repeat(np.eye(4), 25, axis=0) + np.random.default_rng(0).normal(0, 0.01, (100, 4))
    >>> clusters = cluster_features(blobs, k=4)
    >>> clusters.sizes.tolist(), clusters.centroids.shape
    ([25, 25, 25, 25], (4, 4))
    """
    if isinstance(k, str):
        raise ValueError(f"k={k!r}: give a number; choose_num_clusters(features_a, features_b) proposes one")
    transformed = _transform(features, pca, whiten, groups)
    centroids, ids, distances = kmeans(transformed, k, iterations, seed, balanced)
    return Clusters(ids, centroids, transformed, distances)


def _transform(features: Any, pca: int | None, whitened: bool, groups: Sequence[Any] | None) -> np.ndarray:
    x = as_features(features) if groups is None else standardize_groups(features, groups)
    if pca is not None:
        x = whiten(x, max(min(pca, x.shape[1], len(x) // 10), 1), -0.5 if whitened else 0.0)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def choose_num_clusters(
    features_a: Any,
    features_b: Any,
    candidates: Sequence[int] = (16, 24, 32, 48, 64),
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    pca: int | None = 128,
    repeats: int = 8,
) -> tuple[int, list[dict[str, float]]]:
    """How many clusters the data support, found without labels.

    Two independently augmented copies of the items are clustered; a K is as good as the two clusterings
    agree, by adjusted mutual information, less what they tell about the groups. Each repeat takes another
    80 % of the items and another start. The smallest K within one standard error of the best is chosen.

    Parameters
    ----------
    features_a, features_b : array of shape (N, D)
        Embeddings of the two copies, in the same order.
    candidates : sequence of int
        Candidates above a fifth of N are left out.
    groups : sequence of length N, optional
        As in `cluster_features`; None where unknown.
    seed : int, default=0
    pca : int or None, default=128
    repeats : int, default=8

    Returns
    -------
    k : int
    table : list of dict
        For each candidate `k, agreement, group_information, score, standard_error`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> blobs = np.repeat(rng.normal(size=(6, 8)), 40, axis=0)
    >>> a, b = blobs + rng.normal(0, 0.3, (2, 240, 8))
    >>> choose_num_clusters(a, b, candidates=(3, 6, 12, 24))[0]
    6
    """
    from sklearn.metrics import adjusted_mutual_info_score

    a, b = (_transform(x, pca, True, groups) for x in (features_a, features_b))
    if len(a) != len(b):
        raise ValueError(f"features_a has {len(a)} rows and features_b {len(b)}: they must be the same items")
    known = [int(k) for k in sorted(set(candidates)) if 2 <= k <= max(len(a) // 5, 2)]
    if not known:
        raise ValueError(
            f"candidates={tuple(candidates)}: none is between 2 and {len(a) // 5}, a fifth of the items"
        )
    sources = group_numbers(groups, len(a))
    rng = np.random.default_rng(seed)
    # At most 20,000 items: more would cost minutes and change no decision.
    samples = [rng.permutation(len(a))[: min(int(np.ceil(0.8 * len(a))), 20_000)] for _ in range(repeats)]
    seeds = rng.integers(2**31, size=(repeats, 2))

    def measure(k: int) -> dict[str, float]:
        agreement, information = np.zeros(repeats), np.zeros(repeats)
        for r, (rows, start) in enumerate(zip(samples, seeds, strict=True)):
            ids = [kmeans(x[rows], k, seed=int(s))[1] for x, s in zip((a, b), start, strict=True)]
            agreement[r] = adjusted_mutual_info_score(*ids)
            if groups is not None:
                information[r] = np.mean([adjusted_mutual_info_score(sources[rows], i) for i in ids])
        score = agreement - information
        return {
            "k": k,
            "agreement": float(agreement.mean()),
            "group_information": float(information.mean()),
            "score": float(score.mean()),
            "standard_error": float(score.std(ddof=1) / np.sqrt(repeats)),
        }

    table = [measure(k) for k in known]
    best = max(table, key=lambda row: row["score"])
    return next(
        int(row["k"]) for row in table if row["score"] >= best["score"] - best["standard_error"]
    ), table


def propagate_labels(
    features: Any,
    labels: Any,
    groups: Sequence[Any] | None = None,
    neighbors: int = 10,
    alpha: float = 0.95,
    power: float = 8.0,
    num_classes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Spread the few labels over the graph of nearest neighbours (label spreading, Zhou et al. 2003).

    `F = (1 - alpha) (I - alpha S)^-1 Y`, with the one-hot labels Y and the normalised graph
    `S = D^-1/2 W D^-1/2`, where `W_ij = max(cos(x_i, x_j), 0)^power` between neighbours.

    Parameters
    ----------
    features : array of shape (N, D)
    labels : int array of shape (N,)
        -1 where unknown.
    groups : sequence of length N, optional
        Features are standardised within each group first; by default they are taken as they are.
    neighbors : int, default=10
    alpha : float, default=0.95
        How far labels spread, in [0, 1).
    power : float, default=8
        Of the cosine similarities. Better than 1 by 0 to 2 points on spoken digits and ESC-10.
    num_classes : int, optional
        Default: the largest label plus 1. Classes without any label get no mass.

    Returns
    -------
    distributions : float32 array of shape (N, num_classes)
        Rows sum to 1; labelled items keep their label; rows of items that no label reaches are 0.
    confidences : float32 array of shape (N,)
        1 minus the normalised entropy; 0 where no label reaches.

    Raises
    ------
    ValueError
        If no item is labelled, or a label or `alpha` is out of range.

    Examples
    --------
    >>> blobs = np.repeat(np.eye(3), 20, axis=0) + np.random.default_rng(0).normal(0, 0.1, (60, 3))
    >>> labels = np.full(60, -1); labels[[0, 20, 40]] = [0, 1, 2]
    >>> distributions, confidences = propagate_labels(blobs, labels)
    >>> distributions.argmax(1).reshape(3, 20)[:, :4].tolist()
    [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]]
    """
    x = as_features(features) if groups is None else standardize_groups(features, groups)
    labels = np.asarray(labels)
    if labels.shape != (len(x),) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be {len(x)} integers (-1: unknown), not {labels.dtype} {labels.shape}")
    known = labels >= 0
    if not known.any():
        raise ValueError("labels: no item is labelled, there is nothing to spread")
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.max() >= classes:
        raise ValueError(f"labels hold {labels.max()}, but num_classes={classes}")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1)")
    onehot = np.zeros((len(x), classes))
    onehot[known, labels[known]] = 1
    mass = spread(cosine_graph(x, neighbors, power), onehot, alpha).clip(0)
    total = mass.sum(1, keepdims=True)
    distributions = np.divide(mass, total, out=np.zeros_like(mass), where=total > 1e-12)
    distributions[known] = onehot[known]
    logs = np.log(np.where(distributions > 0, distributions, 1))
    entropy = -(distributions * logs).sum(1) / np.log(max(classes, 2))
    confidences = np.where(distributions.any(1), 1 - entropy, 0)
    return distributions.astype(np.float32), confidences.astype(np.float32)


def cluster_targets(clusters: Clusters, distributions: np.ndarray) -> np.ndarray:
    """The class distribution of every cluster: the mean of what `propagate_labels` gave its members.

    Parameters
    ----------
    clusters : Clusters
        Over-clustered (64 to 100), so that clusters are pure.
    distributions : array of shape (N, classes)

    Returns
    -------
    float32 array of shape (K, classes)
        Rows sum to 1, or are 0 where no label reached a member. The items' targets: `targets[clusters.ids]`.

    Examples
    --------
    >>> clusters = cluster_features(np.repeat(np.eye(2), 10, axis=0), k=2, pca=None)
    >>> targets = cluster_targets(clusters, np.repeat([[0.8, 0.2], [0.0, 1.0]], 10, axis=0))
    >>> targets[clusters.ids[[0, -1]]].round(2).tolist() == np.float32([[0.8, 0.2], [0, 1]]).tolist()
    True
    """
    import scipy.sparse as sp

    distributions = np.asarray(distributions, np.float64)
    if len(distributions) != len(clusters.ids):
        raise ValueError(
            f"distributions has {len(distributions)} rows for {len(clusters.ids)} clustered items"
        )
    members = sp.csr_matrix(
        (np.ones(len(clusters.ids)), (clusters.ids, np.arange(len(clusters.ids)))),
        shape=(len(clusters.centroids), len(clusters.ids)),
    )
    totals = members @ distributions  # (K, classes)
    mass = totals.sum(1, keepdims=True)
    return (totals / np.where(mass > 0, mass, 1)).astype(np.float32)


def label_queue(
    clusters: Clusters,
    probabilities: Any = None,
    groups: Sequence[Any] | None = None,
    labelled: Any = None,
    n: int | None = None,
) -> np.ndarray:
    """The items most worth labelling, first to last.

    The medoid of every cluster that has no label yet, largest cluster first; then the items that the student
    is least sure of. No group comes twice before every group has come once.

    Parameters
    ----------
    clusters : Clusters
    probabilities : array of shape (N, classes), optional
        softmax(c) of the student; the margin between the two largest tells how sure it is. Without it, the
        margin between the two nearest centroids does.
    groups : sequence of length N, optional
        Source (speaker, site, device) of each item.
    labelled : bool array of shape (N,), optional
        Items that have a label: left out, and their clusters and groups count as covered.
    n : int, optional
        Length of the queue; default: all.

    Returns
    -------
    int64 array of shape (n,)
        Indices.

    Examples
    --------
    >>> clusters = cluster_features(np.repeat(np.eye(3), [5, 20, 10], axis=0), k=3, pca=None)
    >>> (label_queue(clusters, n=3) // 5).tolist()  # the clusters begin at 0, 5 and 25
    [1, 5, 0]
    """
    items = len(clusters.ids)
    done = np.zeros(items, bool) if labelled is None else np.array(labelled, bool)
    group = group_numbers(groups, items)
    unseen = np.zeros(group.max() + 1, bool)
    unseen[group] = True
    unseen[group[done]] = False

    if probabilities is None:
        scores = -nearest(clusters.features, clusters.centroids, min(2, len(clusters.centroids)))[0]
    else:
        scores = -np.sort(-np.asarray(probabilities), axis=1)
    uncertain = np.argsort(scores[:, 0] - scores[:, min(1, scores.shape[1] - 1)], kind="stable")
    central = np.lexsort((clusters.distances, clusters.ids))  # cluster by cluster, the medoid first
    members = np.split(central, np.cumsum(clusters.sizes)[:-1])

    queue: list[int] = []

    def take(candidates: np.ndarray) -> bool:
        """Queue the first candidate; while a group is unseen, the first of such a group."""
        free = candidates[~done[candidates]]
        if unseen.any():
            free = free[unseen[group[free]]]
        for item in free[:1]:
            queue.append(int(item))
            done[item], unseen[group[item]] = True, False
        return len(free) > 0

    covered = set(clusters.ids[done])
    by_size = [c for c in np.argsort(-clusters.sizes, kind="stable") if c not in covered and len(members[c])]
    waiting = [c for c in by_size if not take(members[c])]
    # Groups that no cluster brought in send the item that the student is least sure of.
    rest = uncertain[~done[uncertain]]
    rest = rest[unseen[group[rest]]]
    rest = rest[np.sort(np.unique(group[rest], return_index=True)[1])]
    queue += rest.tolist()
    done[rest], unseen[:] = True, False
    for c in waiting:
        take(members[c])
    queue += uncertain[~done[uncertain]].tolist()
    return np.array(queue[:n], np.int64)
