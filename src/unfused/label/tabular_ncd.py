"""Novel class discovery in tables: groups the rows of unknown classes with what rows of known classes teach.

Some classes have labels; the unlabelled rows are of other, novel classes. Nothing of these may be used for tuning, neither
labels nor their number. So whatever is tuned is tuned by hiding known classes (`HiddenClassSearchCV`):

    for each group of known classes: fit with its rows unlabelled, cluster those rows,
    score them by their labels (Hungarian accuracy);  the best settings are fitted with all known classes labelled

and the number of clusters is the k whose k-means has the best silhouette (`estimate_n_clusters`). The methods:

    PBN       one encoder for all rows, L = w CE(known rows) + (1-w) |x - dec(z)|^2, then k-means on z
    k-means   centroids of known classes drive the k-means++ start of the new ones, which alone are moved
    spectral  an RBF graph on known and unknown rows, bandwidth by its minimum spanning tree, k-means on eigenvectors

Reference: A Practical Approach to Novel Class Discovery in Tabular Data, DMKD 2024, arXiv:2311.05440.
Needs: labels of other classes, unlabelled data.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin, pairwise_distances_argmin_min
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted, validate_data

from unfused.label._hidden_class_search import HiddenClassSearchCV
from unfused.nn.estimators import check_whole, draw_seed, read_known
from unfused.nn.silhouette import silhouettes
from unfused.nn.spectral import longest_tree_edge, top_eigenvectors

__all__ = ["PBN", "HiddenClassSearchCV", "NCDKMeans", "NCDSpectralClustering", "estimate_n_clusters"]

BLOCK = 2**22  # numbers in the largest array that prediction makes


def estimate_n_clusters(
    X: Any,
    k_min: int = 2,
    k_max: int = 30,
    *,
    n_runs: int = 3,
    max_samples: int = 2000,
    random_state: Any = None,
) -> int:
    """The number of clusters whose k-means has the best silhouette, the mean of `n_runs` runs each.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
        The novel rows, or their latent representation.
    k_min, k_max : int, default=2, 30
        Range tried; at most n_samples - 1.
    n_runs : int, default=3
    max_samples : int, default=2000
        Silhouettes are computed on as many rows, drawn at random; k-means too.
    random_state : int, RandomState or None, default=None

    Returns
    -------
    int
        1 where there are no three rows that differ.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> estimate_n_clusters(rng.normal(size=(90, 2)) + 20 * np.eye(3, 2)[np.arange(90) % 3], k_max=6, random_state=0)
    3
    """
    X = check_array(X, dtype=(np.float64, np.float32))
    if not 2 <= k_min <= k_max:
        raise ValueError(f"k_min={k_min}, k_max={k_max}: give 2 <= k_min <= k_max")
    rng = check_random_state(random_state)
    if len(X) > max_samples:
        X = X[rng.choice(len(X), max_samples, replace=False)]
    different = len(np.unique(X, axis=0))
    ks = np.arange(k_min, min(k_max, len(X) - 1, different) + 1)
    if not len(ks) or different < 3:
        return min(k_min, different) if different > 2 else 1
    runs = [
        KMeans(k, n_init=1, random_state=seed).fit_predict(X)
        for k in ks.tolist()
        for seed in rng.randint(2**31 - 1, size=n_runs)
    ]
    scores = silhouettes(cdist(X, X), runs).reshape(len(ks), n_runs).mean(1)
    return int(ks[scores.argmax()])


class _NCD(ClusterMixin, BaseEstimator):
    """What the three methods share: known and novel rows, and their number of clusters."""

    def _read(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """X, the number of each row's known class (-1: novel), and which rows are to be clustered."""
        X = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        self.known_classes_, codes = read_known(y, len(X))
        novel = codes < 0
        if not novel.any():
            warnings.warn(
                "y marks no row as unlabelled (-1): the clusters are sought among all rows", stacklevel=3
            )
            novel = ~novel
        return X, codes, novel

    def _cluster(self, Z: np.ndarray, rng: Any, more: int = 0) -> KMeans:
        """k-means on rows Z; `more` clusters than n_clusters, where that is given."""
        k = self._count(Z, rng) + (more if self.n_clusters is not None else 0)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
            return KMeans(k, n_init=self.n_init, random_state=draw_seed(rng)).fit(Z)  # type: ignore[attr-defined]

    def _count(self, Z: np.ndarray, rng: Any) -> int:
        k = self.n_clusters  # type: ignore[attr-defined]
        if k is None:
            return estimate_n_clusters(Z, k_max=self.k_max, random_state=draw_seed(rng))  # type: ignore[attr-defined]
        if not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"n_clusters={k!r}: give a whole number from 1 on, or None to have it estimated")
        if k > len(Z):
            raise ValueError(f"n_clusters={k} is more than the {len(Z)} novel rows: give fewer")
        return int(k)

    def _keep(self, novel: np.ndarray, labels: np.ndarray) -> None:
        self.labels_ = np.full(len(novel), -1)
        self.labels_[novel] = labels


class PBN(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _NCD):
    """Projection-based novel class discovery: a latent space that separates known classes and keeps what all rows hold.

    Parameters
    ----------
    n_clusters : int or None, default=None
        Novel classes; None: estimated in the latent space.
    latent_dim : int, default=32
        Between it and the p columns are layers of 3p/4 and p/2 units.
    w : float in [0, 1], default=0.5
        Weight of the cross-entropy against the reconstruction, whose error is summed over columns: the same w means
        something else with another p.
    decoder : bool, default=True
        False: the paper's baseline, trained on the known rows alone, by cross-entropy alone.
    lr, weight_decay : float, default=1e-3, 0.01
        Of AdamW.
    dropout : float in [0, 1), default=0.1
    epochs, batch_size : int, default=200, 512
        Batches of an epoch differ by one row at most.
    normalize : {"l2", "l1", None}, default="l2"
        Norm of the latent rows, in training as in clustering.
    standardize : bool, default=True
        Columns to zero mean and unit deviation over the training rows; a constant column is left at 0.
    n_init : int, default=10
        Starts of k-means.
    device : str, default="cpu"
        Where it is trained.
    k_max : int, default=30
        The most classes that an estimate may give.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    labels_ : ndarray of int, shape (n_samples,)
        Clusters 0..n_clusters_-1 of the novel rows, -1 for the labelled ones.
    n_clusters_ : int
    cluster_centers_ : ndarray of shape (n_clusters_, latent_dim)
    known_classes_ : ndarray
    loss_curve_ : ndarray of shape (epochs,)
        Mean training loss.
    weights_ : dict of str to ndarray
        Of the encoder.
    n_features_in_, feature_names_in_

    Notes
    -----
    `y` = -1 marks an unlabelled row; among strings None, NaN or "-1" do. Search, as the paper does, lr in 1e-4..6e-3
    (log-uniform), dropout in 0.01..0.55, latent_dim and w.

    Examples
    --------
    >>> from unfused.nn.matching import clustering_accuracy
    >>> rng = np.random.default_rng(0)
    >>> truth = np.arange(300) % 6
    >>> X = 3 * rng.normal(size=(6, 8))[truth] + rng.normal(size=(300, 8))
    >>> y = np.where(truth < 4, truth, -1)  # two novel classes
    >>> pbn = PBN(n_clusters=2, latent_dim=4, lr=0.01, epochs=60, random_state=0).fit(X, y)
    >>> pbn.transform(X).shape, clustering_accuracy(truth[y == -1], pbn.labels_[y == -1]) > 0.9
    ((300, 4), True)
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        *,
        latent_dim: int = 32,
        w: float = 0.5,
        decoder: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        dropout: float = 0.1,
        epochs: int = 200,
        batch_size: int = 512,
        normalize: str | None = "l2",
        standardize: bool = True,
        n_init: int = 10,
        device: str = "cpu",
        k_max: int = 30,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.latent_dim = latent_dim
        self.w = w
        self.decoder = decoder
        self.lr = lr
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.normalize = normalize
        self.standardize = standardize
        self.n_init = n_init
        self.device = device
        self.k_max = k_max
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> PBN:
        """Train on labelled and unlabelled rows together, then cluster the unlabelled ones.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
        y : array of shape (n_samples,), optional
            -1 (among strings None, NaN or "-1") for rows of novel classes. None: all are, and only the reconstruction is
            trained.
        """
        self._check_parameters()
        X, codes, novel = self._read(X, y)
        if not self.decoder and (codes >= 0).sum() < 2:
            raise ValueError(
                "decoder=False learns from labelled rows alone, and y has less than two: label some"
            )
        rng = check_random_state(self.random_state)
        self.mean_, self.scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self.standardize:
            self.mean_, deviation = X.mean(0, dtype=np.float64), X.std(0, dtype=np.float64)
            # Rounding leaves a tiny deviation where a column is constant.
            self.scale_ = np.where(deviation > 1e-7 * np.abs(self.mean_).clip(1e-30), deviation, 1)
        self._train(((X - self.mean_) / self.scale_).astype(np.float32), codes, draw_seed(rng))
        latent = self._encode(X[novel])
        if not np.isfinite(latent).all():
            raise ValueError(f"training diverged: lower lr={self.lr}, or set standardize=True")
        kmeans = self._cluster(latent, rng)
        self.cluster_centers_, self.n_clusters_ = kmeans.cluster_centers_, kmeans.n_clusters
        self._keep(novel, kmeans.labels_)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The latent representation, (n_samples, latent_dim)."""
        check_is_fitted(self, "cluster_centers_")
        return self._encode(validate_data(self, X, dtype=(np.float64, np.float32), reset=False))

    def predict(self, X: Any) -> np.ndarray:
        """The novel class of each row, 0..n_clusters_-1: the nearest cluster in the latent space."""
        return pairwise_distances_argmin(self.transform(X), self.cluster_centers_)

    def _train(self, x: np.ndarray, codes: np.ndarray, seed: int) -> None:
        import torch
        from torch.nn import functional as F

        if not self.decoder:
            x, codes = x[codes >= 0], codes[codes >= 0]
        rows, targets = torch.from_numpy(x).to(self.device), torch.from_numpy(codes).to(self.device)
        # Even batches, none of a single row, which has no deviation for batch norm to divide by.
        batches = min(-(-len(x) // self.batch_size), len(x) // 2)
        w = self.w if self.decoder else 1.0
        devices = [self.device] if str(self.device).startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            net = self._network(x.shape[1], len(self.known_classes_)).to(self.device).train()
            optimizer = torch.optim.AdamW(
                net.parameters(), self.lr, weight_decay=self.weight_decay, fused=True
            )
            losses = torch.zeros(self.epochs, device=self.device)
            for epoch in range(self.epochs):
                order = torch.randperm(len(x), device=self.device)
                for batch, labels in zip(
                    rows[order].tensor_split(batches), targets[order].tensor_split(batches), strict=True
                ):
                    z = net["encoder"](batch)
                    z = z if self.normalize is None else F.normalize(z, p=1 if self.normalize == "l1" else 2)
                    loss = z.new_zeros(())
                    if len(self.known_classes_):  # the mean over known rows; 0 in a batch without any
                        loss = F.cross_entropy(net["classifier"](z), labels, ignore_index=-1, reduction="sum")
                        loss = w * loss / (labels >= 0).sum().clamp(min=1)
                    if self.decoder:
                        loss = loss + (1 - w) * (batch - net["decoder"](z)).square().sum(1).mean()
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    losses[epoch] += loss.detach() / batches
        self.loss_curve_ = losses.cpu().numpy()
        state = net["encoder"].state_dict()
        self.weights_ = {name: value.cpu().numpy().astype(np.float64) for name, value in state.items()}

    def _network(self, columns: int, classes: int) -> Any:
        from torch import nn

        def stack(*widths: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for one, two in pairwise(widths[:-1]):
                layers += [nn.Linear(one, two), nn.ReLU(), nn.BatchNorm1d(two), nn.Dropout(self.dropout)]
            return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))

        widths = (columns, max(1, 3 * columns // 4), max(1, columns // 2), self.latent_dim)
        net = nn.ModuleDict({"encoder": stack(*widths)})
        if self.decoder:
            net["decoder"] = stack(*widths[::-1])
        if classes:
            net["classifier"] = nn.Linear(self.latent_dim, classes)
        return net

    def _encode(self, X: np.ndarray) -> np.ndarray:
        """In double precision, so that a row's latent does not depend on the rows that it comes with."""
        z, rows, weights = np.empty((len(X), self.latent_dim)), max(1, BLOCK // X.shape[1]), self.weights_
        for i in range(0, len(X), rows):
            x = (X[i : i + rows] - self.mean_) / self.scale_
            for layer in (0, 4):  # linear, then ReLU, and batch norm as in evaluation
                x = (x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]).clip(0)
                mean, variance, scale, shift = (
                    weights[f"{layer + 2}.{part}"]
                    for part in ("running_mean", "running_var", "weight", "bias")
                )
                x = (x - mean) / np.sqrt(variance + 1e-5) * scale + shift
            x = x @ weights["8.weight"].T + weights["8.bias"]
            if self.normalize is not None:
                x = x / np.linalg.norm(x, 1 if self.normalize == "l1" else 2, axis=1, keepdims=True).clip(
                    1e-12
                )
            z[i : i + rows] = x
        return z

    @property
    def _n_features_out(self) -> int:
        return self.latent_dim

    def _check_parameters(self) -> None:
        check_whole(self, latent_dim=1, epochs=1, batch_size=2, n_init=1)
        for name, high in (("w", 1.0), ("dropout", 0.999), ("lr", np.inf), ("weight_decay", np.inf)):
            if not 0 <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}={value!r}: give a number from 0 to {high:g}")
        if self.normalize not in ("l2", "l1", None):
            raise ValueError(f"normalize={self.normalize!r}: choose 'l2', 'l1' or None")


class NCDKMeans(_NCD):
    """k-means whose new centroids start away from the known classes.

    k-means++ draws a row as a start with a probability that grows with its distance to the nearest of the known classes'
    means and of the starts so far. Lloyd's iterations then move the new centroids over the unlabelled rows alone.

    Parameters
    ----------
    n_clusters : int or None, default=None
        Novel classes; None: estimated on the novel rows.
    n_init : int, default=10
        Starts; the lowest inertia wins.
    sampling : {"squared", "distance"}, default="squared"
        Starts are drawn in proportion to the squared distance, as the paper writes, or to the distance, as its code does.
    max_iter : int, default=300
    tol : float, default=1e-4
    k_max : int, default=30
        The most classes that an estimate may give.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    labels_ : ndarray of int, shape (n_samples,)
        Clusters 0..n_clusters_-1 of the novel rows, -1 for the labelled ones.
    cluster_centers_ : ndarray of shape (n_clusters_, n_features)
    known_centers_ : ndarray of shape (known classes, n_features)
    known_classes_, n_clusters_, inertia_, n_iter_, n_features_in_, feature_names_in_

    Notes
    -----
    `y` as for `PBN`. Distances are taken as they come: put a StandardScaler before it where columns have units.

    Examples
    --------
    >>> from unfused.nn.matching import clustering_accuracy
    >>> rng = np.random.default_rng(0)
    >>> truth = np.arange(200) % 4
    >>> X = 9 * np.eye(4)[truth] + rng.normal(size=(200, 4))
    >>> y = np.where(truth < 2, truth, -1)
    >>> model = NCDKMeans(n_clusters=2, random_state=0).fit(X, y)
    >>> clustering_accuracy(truth[y == -1], model.predict(X[y == -1]))
    1.0
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        *,
        n_init: int = 10,
        sampling: str = "squared",
        max_iter: int = 300,
        tol: float = 1e-4,
        k_max: int = 30,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_init = n_init
        self.sampling = sampling
        self.max_iter = max_iter
        self.tol = tol
        self.k_max = k_max
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> NCDKMeans:
        """Find the novel clusters.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
        y : array of shape (n_samples,), optional
            -1 (among strings None, NaN or "-1") for rows of novel classes. None: all are, which is plain k-means.
        sample_weight : array of shape (n_samples,), optional
        """
        if self.sampling not in ("squared", "distance"):
            raise ValueError(f"sampling={self.sampling!r}: choose 'squared' or 'distance'")
        check_whole(self, n_init=1)
        X, codes, novel = self._read(X, y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        rng = check_random_state(self.random_state)
        known = np.flatnonzero((codes >= 0) & (weight > 0))
        members = sp.csr_matrix((weight[known], (codes[known], known)), (len(self.known_classes_), len(X)))
        total = np.asarray(members.sum(1)).ravel()
        self.known_centers_ = (members @ X)[total > 0] / total[total > 0, None]
        rows, weight = X[novel], weight[novel]
        k, best = self._count(rows, rng), KMeans()
        for _ in range(self.n_init):
            start = _spread_starts(rows, self.known_centers_, k, weight, self.sampling == "squared", rng)
            kmeans = KMeans(k, init=start, n_init=1, max_iter=self.max_iter, tol=self.tol, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                kmeans.fit(rows, sample_weight=weight)
            if kmeans.inertia_ < getattr(best, "inertia_", np.inf):
                best = kmeans
        self.cluster_centers_, self.n_clusters_ = best.cluster_centers_, k
        self.inertia_, self.n_iter_ = float(best.inertia_), best.n_iter_
        self._keep(novel, best.labels_)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The nearest novel cluster of each row, 0..n_clusters_-1."""
        check_is_fitted(self, "cluster_centers_")
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return pairwise_distances_argmin(X, self.cluster_centers_)


class NCDSpectralClustering(_NCD):
    """Spectral clustering of known and novel rows in one graph.

    The bandwidth comes from the longest edge D of the minimum spanning tree: sigma^2 = -D^2 / ln u, and the similarity is
    exp(-d^2 / 2 sigma^2), so that the tree's weakest edge gets sqrt(u). The rows' coordinates are the eigenvectors
    2..n_components+1 of the symmetric normalised Laplacian; new rows get theirs by the Nyström formula.

    Parameters
    ----------
    n_clusters : int or None, default=None
        Novel classes; None: estimated.
    n_components : int, default=10
    u : float in (0, 1), default=0.1
        This and `n_components` are what `HiddenClassSearchCV` should tune.
    cluster_rows : {"novel", "all"}, default="novel"
        Which rows k-means sees. "all": with as many clusters more as there are known classes (n_clusters_ counts them
        all); the novel rows keep those that they fall into.
    n_init : int, default=10
    max_samples : int, default=5000
        The tree is that of so many rows, drawn at random, where there are more.
    k_max : int, default=30
        The most classes that an estimate may give.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    labels_ : ndarray of int, shape (n_samples,)
        Clusters of the novel rows, -1 for the labelled ones.
    embedding_ : ndarray of shape (n_samples, n_components)
    sigma_ : float
    known_classes_, n_clusters_, cluster_centers_, n_features_in_, feature_names_in_

    Notes
    -----
    `y` as for `PBN`. Time and memory grow with the square of the rows: it keeps all of them.

    Examples
    --------
    >>> from unfused.nn.matching import clustering_accuracy
    >>> rng = np.random.default_rng(0)
    >>> truth = np.arange(120) % 4
    >>> X = 9 * np.eye(4)[truth] + rng.normal(size=(120, 4))
    >>> y = np.where(truth < 2, truth, -1)
    >>> model = NCDSpectralClustering(n_clusters=2, n_components=3, random_state=0).fit(X, y)
    >>> clustering_accuracy(truth[y == -1], model.labels_[y == -1])
    1.0
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        *,
        n_components: int = 10,
        u: float = 0.1,
        cluster_rows: str = "novel",
        n_init: int = 10,
        max_samples: int = 5000,
        k_max: int = 30,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.u = u
        self.cluster_rows = cluster_rows
        self.n_init = n_init
        self.max_samples = max_samples
        self.k_max = k_max
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> NCDSpectralClustering:
        """Build the graph and cluster.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
        y : array of shape (n_samples,), optional
            -1 (among strings None, NaN or "-1") for rows of novel classes. None: all are.
        """
        if not 0 < self.u < 1:
            raise ValueError(f"u={self.u!r}: give a number between 0 and 1")
        check_whole(self, n_components=1)
        if self.cluster_rows not in ("novel", "all"):
            raise ValueError(f"cluster_rows={self.cluster_rows!r}: choose 'novel' or 'all'")
        X, _, novel = self._read(X, y)
        rng = check_random_state(self.random_state)
        self.rows_ = X
        tree = X if len(X) <= self.max_samples else X[rng.choice(len(X), self.max_samples, replace=False)]
        self.sigma_ = float(longest_tree_edge(tree) / np.sqrt(-np.log(self.u))) or 1.0
        similarity = self._similarity(X)
        np.fill_diagonal(similarity, 0)
        self.degrees_ = similarity.sum(1).clip(1e-300)
        normal = similarity / np.sqrt(self.degrees_)[:, None] / np.sqrt(self.degrees_)
        values, vectors = top_eigenvectors(normal, min(self.n_components + 1, len(X)), draw_seed(rng))
        self.eigenvalues_, self.embedding_ = values[1:], vectors[:, 1:]
        everything = self.cluster_rows == "all"
        Z = self.embedding_ if everything else self.embedding_[novel]
        kmeans = self._cluster(Z, rng, more=len(self.known_classes_) if everything else 0)
        self.cluster_centers_, self.n_clusters_ = kmeans.cluster_centers_, kmeans.n_clusters
        self._keep(novel, kmeans.labels_[novel] if everything else kmeans.labels_)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The nearest cluster of each row, 0..n_clusters_-1, in the eigenvectors' coordinates."""
        check_is_fitted(self, "cluster_centers_")
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        labels, rows = np.empty(len(X), dtype=np.int64), max(1, BLOCK // len(self.rows_))
        scale = np.where(np.abs(self.eigenvalues_) > 1e-12, self.eigenvalues_, np.inf)
        for i in range(0, len(X), rows):
            block = X[i : i + rows]
            similarity, nearest = self._similarity(block), pairwise_distances_argmin(block, self.rows_)
            own = (block == self.rows_[nearest]).all(1)
            similarity[own, nearest[own]] = 0  # a training row has no edge to itself
            degrees = similarity.sum(1, keepdims=True).clip(1e-300)
            z = (similarity / np.sqrt(degrees) / np.sqrt(self.degrees_)) @ self.embedding_ / scale
            labels[i : i + rows] = pairwise_distances_argmin(z, self.cluster_centers_)
        return labels

    def _similarity(self, X: np.ndarray) -> np.ndarray:
        """To all training rows: (rows of X, n_samples)."""
        return np.exp(cdist(X, self.rows_, "sqeuclidean") / (-2 * self.sigma_**2))


def _spread_starts(
    X: np.ndarray, fixed: np.ndarray, k: int, weight: np.ndarray, squared: bool, rng: Any
) -> np.ndarray:
    """k rows of X, each drawn the likelier the farther it is from `fixed` and from those drawn before: (k, n_features)."""
    near = (
        pairwise_distances_argmin_min(X, fixed)[1].astype(np.float64)
        if len(fixed)
        else np.full(len(X), np.inf)
    )
    starts = np.empty((k, X.shape[1]), dtype=X.dtype)
    for i in range(k):
        chance = weight * (near**2 if squared else near)
        total = chance.sum()
        if not 0 < total < np.inf:  # nothing to be far from yet, or nothing that is far from it
            chance, total = weight, weight.sum()
        starts[i] = X[rng.choice(len(X), p=chance / total)]
        near = np.minimum(near, np.sqrt(((X - starts[i]) ** 2).sum(1, dtype=np.float64)))
    return starts
