from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unfused.label import PBN, HiddenClassSearchCV, NCDKMeans, NCDSpectralClustering, estimate_n_clusters
from unfused.label.tabular_ncd import _spread_starts
from unfused.nn.estimators import read_known
from unfused.nn.matching import clustering_accuracy
from unfused.nn.spectral import longest_tree_edge, top_eigenvectors


def world(rows=30, known=4, novel=3, columns=10, seed=0):
    """Well separated classes; X, all labels, and y with -1 for the novel ones."""
    rng = np.random.default_rng(seed)
    truth = np.arange(rows * (known + novel)) % (known + novel)
    X = 4 * rng.normal(size=(known + novel, columns))[truth] + rng.normal(size=(len(truth), columns))
    return X, truth, np.where(truth < known, truth, -1)


QUICK = {"latent_dim": 6, "epochs": 15, "lr": 5e-3, "batch_size": 64, "random_state": 0}
EACH = pytest.mark.parametrize(
    "model",
    [PBN(3, **QUICK), NCDKMeans(3, random_state=0), NCDSpectralClustering(3, random_state=0)],
    ids=["pbn", "k-means", "spectral"],
)


# --- all three --------------------


@EACH
def test_finds_novel_classes_in_training_rows_and_new_ones(model):
    X, truth, y = world()
    novel = y == -1
    model = clone(model).fit(X, y)
    assert clustering_accuracy(truth[novel], model.labels_[novel]) > 0.95
    assert (model.labels_[~novel] == -1).all() and set(model.labels_[novel]) == {0, 1, 2}
    assert np.array_equal(model.predict(X)[novel], model.labels_[novel])
    assert model.n_clusters_ == 3 and model.known_classes_.tolist() == [0, 1, 2, 3]
    fresh, classes = world(rows=60)[0][210:], world(rows=60)[1][210:]  # the same means, other noise
    assert clustering_accuracy(classes[classes > 3], model.predict(fresh)[classes > 3]) > 0.95


@EACH
def test_number_of_clusters_is_estimated(model):
    X, _, y = world()
    model = clone(model).set_params(n_clusters=None)
    assert model.fit(X, y).n_clusters_ in (2, 3, 4)
    assert model.set_params(k_max=2).fit(X, y).n_clusters_ == 2


@EACH
def test_marks_of_unlabelled_rows(model):
    X, truth, y = world()
    expected = clone(model).fit(X, y)
    names = np.array(list("abcdefg"), dtype=object)[truth]
    for marked in (
        np.where(y == -1, np.nan, y),
        np.where(y == -1, None, names),
        np.where(y == -1, -1, names),
        np.where(y == -1, "-1", names.astype(str)),
        pd.Series(names).where(y != -1),
        pd.Series(y),
    ):
        found = clone(model).fit(X, marked)
        assert np.array_equal(found.labels_, expected.labels_) and len(found.known_classes_) == 4


@EACH
def test_names_of_known_classes_do_not_matter(model):
    X, _, y = world()
    renamed = np.where(y == -1, -1, np.array([70, 5, 9, 33, 0])[y])
    one, other = clone(model).fit(X, y), clone(model).fit(X, renamed)
    assert adjusted_rand_score(one.labels_, other.labels_) > 0.95


@EACH
@given(seed=st.integers(0, 100), scale=st.floats(0.05, 20))
@settings(max_examples=3, deadline=None)
def test_order_scale_and_repeated_columns(model, seed, scale):
    X, _, y = world(rows=20)
    expected = clone(model).fit(X, y).labels_
    order = np.random.default_rng(seed).permutation(len(X))
    assert adjusted_rand_score(clone(model).fit(X[order], y[order]).labels_, expected[order]) > 0.9
    assert adjusted_rand_score(clone(model).fit(scale * X, y).labels_, expected) > 0.9
    wide = np.c_[X, X, np.full(len(X), 7.0)]  # a constant column too
    assert adjusted_rand_score(clone(model).fit(wide, y).labels_, expected) > 0.9


@EACH
def test_without_labels_and_without_novel_rows(model):
    X, truth, _ = world()
    model = clone(model).set_params(n_clusters=7)
    assert set(model.fit(X).labels_) == set(range(7)) and not len(model.known_classes_)
    with pytest.warns(UserWarning, match="no row as unlabelled"):
        model.fit(X, truth)
    assert (model.labels_ >= 0).all()


@EACH
def test_one_known_class_one_row_a_class_and_rows_that_coincide(model):
    X, truth, y = world()
    assert len(clone(model).fit(X, np.where(y > 0, -1, y)).known_classes_) == 1
    few = np.r_[[np.flatnonzero(truth == c)[0] for c in range(4)], np.flatnonzero(y == -1)]
    assert clone(model).fit(X[few], y[few]).labels_.shape == (len(few),)
    same = clone(model).fit(np.ones((12, 4)), np.r_[0, 0, 1, 1, [-1] * 8])
    assert same.labels_.shape == (12,) and (same.predict(np.ones((2, 4))) >= 0).all()


@EACH
@pytest.mark.parametrize(
    "options, y, message",
    [
        ({"n_clusters": 0}, None, "n_clusters=0"),
        ({"n_clusters": "3"}, None, "n_clusters='3'"),
        ({"n_clusters": 9}, np.r_[np.zeros(35), [-1] * 5], "n_clusters=9 is more than the 5 novel rows"),
        ({}, np.zeros(39), "39 labels for 40 rows"),
        ({}, np.linspace(0.1, 2, 40), "continuous"),
        ({}, np.array([*range(20), *"abcdefghijklmnopqrst"], dtype=object), "mixes labels"),
        ({}, np.zeros((40, 2)), "shape"),
    ],
)
def test_errors_name_the_fix(model, options, y, message):
    X = np.random.default_rng(0).normal(size=(40, 3))
    with pytest.raises((ValueError, TypeError), match=message):
        clone(model).set_params(**options).fit(X, y)


# --- PBN --------------------


def test_pbn_s_network_and_losses():
    X, _, y = world(columns=9)
    pbn = PBN(3, **QUICK | {"epochs": 3}).fit(X, y)
    shapes = {name: value.shape for name, value in pbn.weights_.items() if value.ndim == 2}
    assert shapes == {"0.weight": (6, 9), "4.weight": (4, 6), "8.weight": (6, 4)}  # p, 3p/4, 2p/4, latent
    kinds = [type(layer).__name__ for layer in pbn._network(9, 2)["encoder"]]
    assert kinds == [*["Linear", "ReLU", "BatchNorm1d", "Dropout"] * 2, "Linear"]
    assert [m.out_features for m in pbn._network(9, 2)["decoder"] if hasattr(m, "out_features")] == [4, 6, 9]
    assert np.allclose(np.linalg.norm(pbn.transform(X), axis=1), 1)
    encoder = pbn._network(9, 0)["encoder"].double().eval()
    encoder.load_state_dict({name: torch.as_tensor(value) for name, value in pbn.weights_.items()})
    z = encoder(torch.from_numpy((X - X.mean(0)) / X.std(0))).detach()
    assert np.allclose(pbn.transform(X), z / z.norm(dim=1, keepdim=True))
    assert np.allclose(np.abs(PBN(3, normalize="l1", **QUICK).fit(X, y).transform(X)).sum(1), 1)
    assert not np.allclose(np.linalg.norm(PBN(3, normalize=None, **QUICK).fit(X, y).transform(X), axis=1), 1)


@pytest.mark.parametrize("decoder", [True, False])
def test_pbn_s_first_step_by_hand(decoder):
    X, _, y = world(columns=8)
    w, options = 0.3, {"epochs": 1, "batch_size": 10**6, "dropout": 0.0, "latent_dim": 5, "random_state": 0}
    pbn = PBN(3, w=w, decoder=decoder, **options).fit(X, y)
    torch.manual_seed(draw := np.random.RandomState(0).randint(2**31 - 1))
    assert draw >= 0
    net = pbn._network(8, 4).train()
    x = torch.tensor((X - X.mean(0)) / X.std(0), dtype=torch.float32)
    known = torch.from_numpy(y >= 0)
    if not decoder:
        x, known = x[known], known[known]
    latent = net["encoder"](x)
    latent = latent / latent.norm(dim=1, keepdim=True)
    log_p = net["classifier"](latent)[known].log_softmax(1)
    loss = -log_p[torch.arange(len(log_p)), torch.from_numpy(y[y >= 0])].mean()
    if decoder:
        loss = w * loss + (1 - w) * ((x - net["decoder"](latent)) ** 2).sum() / len(x)
    assert pbn.loss_curve_ == pytest.approx([float(loss.detach())], rel=1e-4)


def test_pbn_learns_and_the_seed_decides():
    X, _, y = world()
    one, two = (PBN(3, **QUICK).fit(X, y) for _ in range(2))
    assert one.loss_curve_[-1] < 0.8 * one.loss_curve_[0] and len(one.loss_curve_) == 15
    assert all(np.array_equal(one.weights_[name], two.weights_[name]) for name in one.weights_)
    before = torch.get_rng_state()
    other = PBN(3, **QUICK | {"random_state": 1}).fit(X, y)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone
    assert not np.allclose(one.transform(X), other.transform(X))


@pytest.mark.parametrize("batch_size", [2, 13, 208, 209])
def test_no_batch_is_too_small_for_batch_norm(batch_size):
    X, _, y = world()
    X, y = X[1:], y[1:]  # 209 rows
    for labels in (y, np.where(y == 0, 0, -1)):  # batches without known rows as well
        pbn = PBN(3, **QUICK | {"batch_size": batch_size, "epochs": 1}).fit(X, labels)
        assert np.isfinite(pbn.loss_curve_).all()


def test_pbn_standardises_on_training_rows_and_names_its_columns():
    X, _, y = world()
    X[:, 2] = 1e8  # a constant column
    pbn = PBN(3, **QUICK).fit(X, y)
    assert np.isfinite(pbn.transform(X)).all() and pbn.scale_[2] == 1
    assert np.allclose(pbn.transform(X)[:4], pbn.transform(X[:4]))
    assert pbn.set_output(transform="pandas").transform(X).columns[:2].tolist() == ["pbn0", "pbn1"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 1}, "batch_size=1"),
        ({"epochs": 0}, "epochs=0"),
        ({"w": 1.5}, "w=1.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"lr": -1}, "lr=-1"),
        ({"normalize": "max"}, "normalize='max'"),
        ({"lr": 1e30, "weight_decay": 1e30}, "diverged"),
    ],
)
def test_pbn_s_errors(options, message):
    X, _, y = world()
    with pytest.raises(ValueError, match=message):
        PBN(3, **QUICK | options).fit(X, y)
    with pytest.raises(ValueError, match="labelled rows alone"):
        PBN(3, decoder=False).fit(X)


# --- k-means --------------------


def test_starts_avoid_known_centres():
    rng = np.random.RandomState(0)
    X = np.r_[np.zeros((500, 2)), np.full((10, 2), 5.0), np.full((10, 2), -5.0)]
    for squared in (True, False):
        for _ in range(5):
            starts = _spread_starts(X, np.zeros((1, 2)), 2, np.ones(520), squared, rng)
            assert sorted(starts[:, 0]) == [-5, 5]
    # of two rows at distances 1 and 3, the farther is drawn with 3/4, or 9/10 by squares
    rows = np.array([[1.0], [3.0]])
    for squared, expected in ((False, 0.75), (True, 0.9)):
        draws = [
            _spread_starts(rows, np.zeros((1, 1)), 1, np.ones(2), squared, rng)[0, 0] for _ in range(2000)
        ]
        assert np.mean(np.array(draws) == 3) == pytest.approx(expected, abs=0.1)


def test_k_means_moves_the_new_centroids_over_novel_rows_alone():
    X, _, y = world()
    model = NCDKMeans(3, random_state=0).fit(X, y)
    novel = X[y == -1]
    assert np.allclose(model.known_centers_, [X[y == c].mean(0) for c in range(4)])
    labels = cdist(novel, model.cluster_centers_).argmin(1)
    assert np.allclose(model.cluster_centers_, [novel[labels == c].mean(0) for c in range(3)])
    assert model.inertia_ == pytest.approx(
        cdist(novel, model.cluster_centers_).min(1) @ cdist(novel, model.cluster_centers_).min(1)
    )
    plain = KMeans(3, n_init=10, random_state=0).fit(novel)
    assert model.inertia_ == pytest.approx(plain.inertia_, rel=1e-3)


def test_k_means_weights_stand_for_repeated_rows():
    X, _, y = world()
    weight = np.random.default_rng(0).integers(0, 3, len(X))
    one = NCDKMeans(3, n_init=20, random_state=0).fit(X, y, sample_weight=weight)
    many = NCDKMeans(3, n_init=20, random_state=0).fit(X.repeat(weight, 0), y.repeat(weight))
    assert one.inertia_ == pytest.approx(many.inertia_) and np.allclose(
        one.known_centers_, many.known_centers_
    )
    with pytest.raises(ValueError, match=r"sampling='far'"):
        NCDKMeans(3, sampling="far").fit(X, y)


# --- spectral --------------------


def test_the_tree_s_weakest_edge_gets_the_root_of_u():
    X, _, y = world(rows=10)
    model = NCDSpectralClustering(3, u=0.04, random_state=0).fit(X, y)
    tree = minimum_spanning_tree(cdist(X, X)).toarray()
    assert longest_tree_edge(X) == pytest.approx(tree.max())
    assert np.exp(-(tree.max() ** 2) / (2 * model.sigma_**2)) == pytest.approx(np.sqrt(0.04))


def test_the_embedding_is_the_laplacian_s():
    X, _, y = world(rows=10)
    model = NCDSpectralClustering(3, n_components=4, random_state=0).fit(X, y)
    A = np.exp(-(cdist(X, X) ** 2) / (2 * model.sigma_**2)) - np.eye(len(X))
    root = np.diag(A.sum(1) ** -0.5)
    values, vectors = np.linalg.eigh(np.eye(len(X)) - root @ A @ root)
    overlap = np.abs(vectors[:, 1:5].T @ model.embedding_)
    assert np.allclose(overlap, np.eye(4), atol=1e-6) and np.allclose(1 - model.eigenvalues_, values[1:5])


def test_iterated_eigenvectors_are_the_exact_ones():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(520, 6))
    A = np.exp(-(cdist(X, X) ** 2) / 4)
    values, vectors = top_eigenvectors(A, 5, seed=0)
    exact = np.linalg.eigvalsh(A)[::-1][:5]
    assert np.allclose(values, exact) and np.allclose(A @ vectors, vectors * values)


def test_new_rows_near_training_rows_get_their_cluster():
    X, _, y = world()
    model = NCDSpectralClustering(3, random_state=0).fit(np.r_[X, X[-2:]], np.r_[y, y[-2:]])  # twins too
    novel = np.flatnonzero(y == -1)
    assert np.array_equal(model.predict(X)[novel], model.labels_[novel])
    assert np.mean(model.predict(X + 1e-9)[novel] == model.labels_[novel]) > 0.8


def test_spectral_over_all_rows_and_on_a_sampled_tree():
    X, truth, y = world()
    model = NCDSpectralClustering(3, cluster_rows="all", random_state=0).fit(X, y)
    assert model.n_clusters_ == 7 and clustering_accuracy(truth[y == -1], model.labels_[y == -1]) > 0.95
    sampled = NCDSpectralClustering(3, max_samples=50, random_state=0).fit(X, y)
    assert sampled.sigma_ >= NCDSpectralClustering(3, random_state=0).fit(X, y).sigma_
    for options in ({"u": 1.0}, {"u": 0}, {"n_components": 0}, {"cluster_rows": "known"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            NCDSpectralClustering(3, **options).fit(X, y)


# --- how many classes --------------------


def test_estimate_n_clusters():
    X, _, y = world(novel=5)
    assert estimate_n_clusters(X[y == -1], random_state=0) == 5
    assert estimate_n_clusters(X[y == -1], k_max=3, random_state=0) <= 3
    assert estimate_n_clusters(X[y == -1], max_samples=60, random_state=0) in (4, 5, 6)
    assert estimate_n_clusters([[0.0], [0], [5], [5]]) == 1 and estimate_n_clusters([[1.0]]) == 1
    assert estimate_n_clusters([[0.0], [0.1], [5], [5.1]], random_state=0) == 2
    with pytest.raises(ValueError, match="k_min=3, k_max=2"):
        estimate_n_clusters(X, k_min=3, k_max=2)


# --- the search --------------------


class Recorder(BaseEstimator):
    """Notes what it is fitted with; its clusters are right in proportion to `quality`."""

    log: list = []

    def __init__(self, n_clusters=None, quality=1, fails=False):
        self.n_clusters = n_clusters
        self.quality = quality
        self.fails = fails

    def fit(self, X, y):
        Recorder.log.append((self.n_clusters, np.asarray(y).copy(), np.asarray(X)))
        if self.fails:
            raise RuntimeError("it failed")
        return self

    def predict(self, X):
        return (np.asarray(X)[:, 0] // self.quality).astype(int)


@pytest.fixture
def table():
    Recorder.log.clear()
    truth = np.arange(60) % 10
    return np.c_[truth.astype(float), np.arange(60.0)], truth, np.where(truth < 6, truth, -1)


def test_hidden_classes_are_unlabelled_rows_and_the_truly_novel_ones_stay_out(table):
    X, _, y = table
    search = HiddenClassSearchCV(Recorder(), {"quality": [1, 2, 4]}, n_iter=3, random_state=0).fit(X, y)
    assert search.best_params_ == {"quality": 1} and search.best_score_ == 1
    assert len(search.cv_results_["params"]) == 3 and search.cv_results_["rank_test_score"].min() == 1
    assert sorted(np.concatenate(search.hidden_classes_)) == list(range(6))  # each class once
    fits, last = Recorder.log[:-1], Recorder.log[-1]
    assert len(fits) == 9 and np.array_equal(last[1], y)
    for (k, labels, rows), hidden in zip(fits, search.hidden_classes_ * 3, strict=True):
        assert k is None  # estimated inside the folds as well
        assert np.array_equal(rows, X[y >= 0])
        assert np.array_equal(labels == -1, np.isin(y[y >= 0], hidden))
        assert not set(labels) & set(hidden)


def test_known_number_and_real_ratio_of_novel_classes(table):
    X, _, y = table
    search = HiddenClassSearchCV(Recorder(4), {"quality": [1]}, n_iter=1, random_state=0).fit(X, y)
    assert [len(h) for h in search.hidden_classes_] == [2, 2, 2]  # 6 * 4 / 10
    assert [k for k, *_ in Recorder.log] == [2, 2, 2, 4]
    Recorder.log.clear()
    HiddenClassSearchCV(
        Recorder(4), {"quality": [1]}, n_iter=1, include_unlabelled=True, n_hidden_classes=3
    ).fit(X, y)
    assert [k for k, *_ in Recorder.log] == [7, 7, 7, 4] and all(len(rows) == 60 for *_, rows in Recorder.log)


@given(st.integers(3, 12), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 8)), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_folds_hide_classes_evenly(known, folds, novel, seed):
    groups = HiddenClassSearchCV(None, {}, n_hidden_folds=folds)._hide(known, novel, seed)
    assert len(groups) == folds and all(2 <= len(set(g)) == len(g) <= max(2, known - 2) for g in groups)
    counts = np.bincount(np.concatenate(groups), minlength=known)
    assert counts.max() - counts.min() <= 1


def test_search_works_with_pipelines_frames_and_other_metrics():
    X, truth, y = world()
    frame = pd.DataFrame(X, columns=[f"c{i}" for i in range(10)])
    pipeline = make_pipeline(StandardScaler(), NCDKMeans(3))
    space = {"ncdkmeans__sampling": ["squared", "distance"]}
    options = {"n_clusters_param": "ncdkmeans__n_clusters", "n_iter": 2, "random_state": 0}
    for metric in ("acc", "nmi", "ari", adjusted_rand_score):
        search = HiddenClassSearchCV(pipeline, space, metric=metric, **options).fit(frame, y)
        assert clustering_accuracy(truth[y == -1], search.predict(frame)[y == -1]) > 0.95
    assert search.feature_names_in_[0] == "c0" and not hasattr(search, "transform")
    twice = HiddenClassSearchCV(pipeline, space, **options)
    assert np.array_equal(twice.fit(X, y).predict(X), clone(twice).fit(X, y).predict(X))


def test_search_tunes_pbn():
    X, truth, y = world()
    space = {"w": [0.1, 0.9], "latent_dim": [3, 6]}
    search = HiddenClassSearchCV(
        PBN(3, epochs=12, lr=5e-3, batch_size=64), space, n_iter=2, n_hidden_folds=2, random_state=0
    )
    search.fit(X, y)
    assert search.transform(X).shape[1] == search.best_params_["latent_dim"]
    assert clustering_accuracy(truth[y == -1], search.predict(X[y == -1])) > 0.8


def test_failing_candidates(table):
    X, _, y = table
    space = {"fails": [True, False]}
    with pytest.warns(FitFailedWarning, match="3 of 6 fits failed"):
        search = HiddenClassSearchCV(Recorder(), space, n_iter=2, random_state=0).fit(X, y)
    assert search.best_params_ == {"fails": False}
    for options in ({"error_score": "raise"}, {"param_distributions": {"fails": [True]}, "n_iter": 1}):
        with pytest.raises(RuntimeError, match="it failed"):
            HiddenClassSearchCV(Recorder(), space, n_iter=2).set_params(**options).fit(X, y)


def test_search_s_errors_and_too_few_classes(table):
    X, _, y = table
    with pytest.warns(UserWarning, match="2 known classes"):
        search = HiddenClassSearchCV(Recorder(), {"quality": [2]}).fit(X, np.where(y < 2, y, -1))
    assert search.best_params_ == {} and not hasattr(search, "cv_results_")
    for options, message in (
        ({"metric": "purity"}, "metric='purity'"),
        ({"n_hidden_folds": 0}, "n_hidden_folds=0"),
        ({"n_hidden_classes": 6}, "n_hidden_classes=6 of 6"),
    ):
        with pytest.raises(ValueError, match=message):
            HiddenClassSearchCV(Recorder(), {"quality": [1]}, n_iter=1, **options).fit(X, y)
    assert not hasattr(HiddenClassSearchCV(Recorder(), {}), "n_features_in_")


def test_read_known_of_nothing():
    assert read_known(None, 3)[1].tolist() == [-1, -1, -1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_known(np.array([-1, -1]), 2)[0].size == 0
