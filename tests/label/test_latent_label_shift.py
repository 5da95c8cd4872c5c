from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn import config_context
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unfused.label import DDFA
from unfused.label.latent_label_shift import _factorise, _noise_level, _shares, simplex_least_squares
from unfused.nn.matching import clustering_accuracy, match_clusters

SHARES = np.array([[0.9, 0.0, 0.1, 0.5], [0.1, 0.9, 0.0, 0.5], [0.0, 0.1, 0.9, 0.0]])  # p_d(y): (3, 4)

LOGISTIC = LogisticRegression(solver="newton-cholesky")


def world(n=800, seed=0, spread=0.4):
    """Three classes; what shifts is in two columns, a third column is far wider and says nothing."""
    rng = np.random.default_rng(seed)
    d = rng.integers(4, size=n)
    y = (SHARES.cumsum(0)[:, d] < rng.random(n)).sum(0)
    X = np.c_[
        np.array([[0, 0], [2, 0], [0, 2]])[y] + spread * rng.normal(size=(n, 2)), 20 * rng.normal(size=n)
    ]
    return X, y, d


def ddfa(**options):
    return DDFA(
        **{"n_classes": 3, "n_discretization": 9, "discriminator": GaussianNB(), "random_state": 0} | options
    )


@pytest.fixture(scope="module")
def fitted():
    X, y, d = world()
    return ddfa().fit(X, domains=d), X, y, d


# --- the mathematics --------------------


def distributions(rng, rows, columns):
    return rng.dirichlet(np.ones(rows), columns).T


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_simplex_least_squares_is_optimal(seed, k, more):
    rng = np.random.default_rng(seed)
    D, F = distributions(rng, k + more, k), rng.dirichlet(np.full(k + more, 0.4), 40)
    q = simplex_least_squares(F, D)
    assert (q >= 0).all() and np.allclose(q.sum(1), 1)
    slope = (q @ D.T - F) @ D  # gradient: no class may have less of it than those in use
    slack = slope - (q * slope).sum(1, keepdims=True)
    assert slack.min() > -1e-7
    # the same as scipy's solver, a point at a time
    E = D - F[0][:, None]
    u, _ = nnls(np.vstack([E, np.ones(k)]), np.r_[np.zeros(len(E)), 1])
    assert np.allclose(q[0], u / u.sum(), atol=1e-6)


def test_simplex_least_squares_of_true_mixtures_and_without_rank():
    rng = np.random.default_rng(0)
    D, q = distributions(rng, 6, 4), rng.dirichlet(np.ones(4), 50)
    assert np.allclose(simplex_least_squares(q @ D.T, D), q, atol=1e-7)
    same = np.c_[D[:, 0], D[:, 0], D[:, 1]]  # two classes that no domain tells apart
    found = simplex_least_squares(q[:, :2] @ D[:, :2].T / q[:, :2].sum(1, keepdims=True), same)
    assert np.isfinite(found).all() and np.allclose(found.sum(1), 1)
    assert np.allclose(found[:, 2], q[:, 1] / q[:, :2].sum(1), atol=1e-4)


def test_blocks_change_nothing():
    rng = np.random.default_rng(0)
    D, F = distributions(rng, 80, 80), rng.dirichlet(np.ones(80), 200)  # 163 rows a block
    assert np.allclose(simplex_least_squares(F, D)[150:], simplex_least_squares(F[150:], D), atol=1e-9)


def test_factorisation_recovers_anchored_classes():
    rng = np.random.default_rng(1)
    C = distributions(rng, 12, 3)
    C[:3] = 0.2 * np.eye(3)  # an anchor cell for each class
    C[3:] *= 0.8 / C[3:].sum(0)
    C_found, Q_found, residual = _factorise(C @ SHARES, 3, 10, np.random.RandomState(0))
    order = np.abs(Q_found[:, None] - SHARES[None]).sum(2).argmin(0)
    assert sorted(order) == [0, 1, 2] and residual < 1e-3
    assert np.allclose(C_found.sum(0), 1) and np.allclose(Q_found.sum(0), 1)
    assert np.abs(C_found[:, order] - C).max() < 0.1 and np.abs(Q_found[order] - SHARES).max() < 0.1


def test_counts_by_hand():
    c, d = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    assert np.allclose(_shares(c, d, 4, 2), [[1, 1 / 3], [0, 1 / 3], [0, 1 / 3], [0, 0]])


def test_noise_level_bounds_what_sampling_alone_gives():
    rng = np.random.default_rng(0)
    p, sizes = rng.dirichlet(np.ones(12)), np.array([50, 80, 200, 100])
    seconds = []
    for _ in range(50):
        A = np.stack([rng.multinomial(n, p) / n for n in sizes], 1)  # all domains alike: rank 1
        seconds.append(np.linalg.svd(A, compute_uv=False)[1] / _noise_level(A, sizes))
    assert 0.4 < np.mean(seconds) and np.max(seconds) < 1


# --- what it finds --------------------


def test_finds_classes_that_clusters_do_not_show(fitted):
    model, X, y, d = fitted
    assert clustering_accuracy(y, model.labels_) > 0.9
    assert clustering_accuracy(y, KMeans(3, n_init=5, random_state=0).fit_predict(X)) < 0.5
    order = match_clusters(y, model.labels_)
    assert np.abs(model.class_prior_ - SHARES[order]).max() < 0.12
    assert model.class_prior_.shape == (3, 4) and model.cell_given_class_.shape == (9, 3)
    assert model.domain_given_class_.shape == (4, 3) and np.allclose(model.domain_given_class_.sum(0), 1)
    assert (model.singular_values_ > model.noise_level_).sum() == 3 and model.score_residual_ < 0.1
    assert DDFA(None, 9, GaussianNB(), random_state=0).fit(X, domains=d).n_classes_ == 3


def test_new_points_with_and_without_domains(fitted):
    model, *_ = fitted
    X, _, d = world(600, seed=5)
    known, unknown = model.predict_proba(X, domains=d), model.predict_proba(X)
    for proba in (known, unknown):
        assert proba.shape == (600, 3) and np.allclose(proba.sum(1), 1) and proba.min() >= 0
    assert np.array_equal(known.argmax(1), model.predict(X, domains=d))
    blurred, truth, where = world(600, seed=6, spread=1.2)
    with_domains, without = model.predict(blurred, domains=where), model.predict(blurred)
    assert clustering_accuracy(truth, with_domains) > clustering_accuracy(truth, without) + 0.05
    # the mixture over equally likely domains, from the definition
    q = simplex_least_squares(model._domain_proba(X), model.domain_given_class_)
    joint = q * model.domain_given_class_[d]
    assert np.allclose(unknown, q) and np.allclose(known, joint / joint.sum(1, keepdims=True))


@pytest.mark.parametrize("solver", ["pinv", "table"])
def test_other_solvers(fitted, solver):
    nnls_model, X, y, d = fitted
    model = ddfa(solver=solver).fit(X, domains=d)
    assert clustering_accuracy(y, model.labels_) > 0.85
    assert np.allclose(model.class_prior_, nnls_model.class_prior_)  # only the last step differs
    assert np.allclose(model.predict_proba(X, domains=d).sum(1), 1)
    if solver == "pinv":
        raw = model.domain_proba_ @ np.linalg.pinv(model.domain_given_class_).T * model.domain_given_class_[d]
        assert (raw.min(1) < 0).any() and np.array_equal(
            model.labels_, raw.argmax(1)
        )  # clipping moves no argmax
    else:
        joint = model.cell_given_class_[:, :, None] * model.class_prior_  # (m, k, r)
        cells = model.discretizer_.predict(model.domain_proba_)
        assert np.array_equal(model.labels_, joint[cells, :, d].argmax(1))


def test_cells_of_features(fitted):
    _, X, _, d = fitted
    cells = make_pipeline(StandardScaler(), PCA(2), KMeans(12, n_init=3))
    for solver in ("nnls", "table"):
        model = ddfa(discretizer=cells, solver=solver).fit(X, domains=d)
        assert model.cell_given_class_.shape == (12, 3) and model.predict(X, domains=d).shape == (800,)


@pytest.mark.parametrize("reweight", ["weights", "posterior"])
def test_unequal_domains_are_made_equal(reweight):
    X, y, d = world(2400)
    rng = np.random.default_rng(0)
    kept = rng.random(2400) < np.array([1, 0.2, 0.5, 0.3])[d]
    X, y, d = X[kept], y[kept], d[kept]
    model = ddfa(reweight=reweight, discriminator=LOGISTIC).fit(X, domains=d)
    rows = 1 / np.bincount(d)[d]
    mean = (model.domain_proba_ * rows[:, None]).sum(0) / rows.sum()
    assert np.allclose(mean, 0.25, atol=0.02)  # q(d) = 1/r
    free = ddfa(reweight="none", discriminator=LOGISTIC).fit(X, domains=d)
    assert free.domain_proba_[:, 0].mean() > 0.4
    assert clustering_accuracy(y, model.labels_) > 0.85


def test_precomputed_probabilities(fitted):
    model, _, _, d = fitted
    F = model.domain_proba_
    again = ddfa(discriminator="precomputed").fit(3 * F, domains=d)  # rows are normalised
    assert adjusted_rand_score(again.labels_, model.labels_) > 0.97
    assert np.array_equal(again.predict(F, domains=d), again.labels_)
    shares = np.bincount(d) / len(d)
    tilted = ddfa(discriminator="precomputed", reweight="posterior").fit(F * shares, domains=d)
    assert np.allclose(tilted.domain_proba_, F) and np.allclose(
        tilted.predict_proba(F * shares), again.predict_proba(F)
    )


def test_a_mark_of_the_domain_passes_for_classes():
    X, y, d = world()
    seen = np.c_[X, 3 * np.eye(4)[d]]
    assert clustering_accuracy(y, ddfa(discriminator=LOGISTIC).fit(X, domains=d).labels_) > 0.85
    model = ddfa(discriminator=LOGISTIC).fit(seen, domains=d)
    assert clustering_accuracy(y, model.labels_) < 0.75
    assert model.class_prior_.max(0).mean() > 0.95  # each domain has become a class


def test_probabilities_are_out_of_fold():
    rng = np.random.default_rng(0)
    X, d = rng.normal(size=(200, 3)), np.arange(200) % 2

    class Memory(GaussianNB):
        def fit(self, X, y):
            self.seen_ = {row.tobytes(): label for row, label in zip(X, y, strict=True)}
            return super().fit(X, y)

        def predict_proba(self, X):
            return np.array(
                [
                    np.eye(2)[self.seen_[row.tobytes()]] if row.tobytes() in self.seen_ else [0.5, 0.5]
                    for row in X
                ]
            )

    assert (DDFA(1, 2, Memory()).fit(X, domains=d).domain_proba_ == 0.5).all()


# --- scikit-learn --------------------


def test_domains_are_routed():
    X, y, d = world(400)
    names = np.array(["east", "north", "south", "west"])[d]
    with config_context(enable_metadata_routing=True):
        model = (
            ddfa()
            .set_fit_request(domains=True)
            .set_predict_request(domains=True)
            .set_score_request(domains=True)
        )
        pipeline = make_pipeline(StandardScaler(), model).fit(X, domains=names)
        assert clustering_accuracy(y, pipeline.predict(X, domains=names)) > 0.85
        search = GridSearchCV(model, {"n_classes": [1, 3]}, cv=2).fit(X, domains=names)
        assert search.best_params_ == {"n_classes": 3}  # chosen without a label
    assert model.fit(X, domains=names).domains_.tolist() == ["east", "north", "south", "west"]
    assert np.array_equal(clone(model).fit_predict(X, domains=names), model.labels_)


def test_names_and_order_of_domains_do_not_matter():
    X, _, d = world(600)
    one = ddfa().fit(X, domains=d)
    other = ddfa().fit(X, domains=np.array(list("abcd"))[d])
    assert np.array_equal(one.labels_, other.labels_)
    flipped = ddfa().fit(X, domains=3 - d)
    assert adjusted_rand_score(one.labels_, flipped.labels_) > 0.95
    assert np.allclose(np.sort(one.class_prior_.max(1)), np.sort(flipped.class_prior_.max(1)), atol=0.05)


@given(st.integers(0, 100), st.floats(0.01, 100))
@settings(max_examples=3, deadline=None)
def test_order_of_points_scale_and_repeated_features(seed, scale):
    X, _, d = world(400)
    order = np.random.default_rng(seed).permutation(400)
    folds = [
        (np.flatnonzero(np.arange(400) % 2 != i), np.flatnonzero(np.arange(400) % 2 == i)) for i in (0, 1)
    ]

    class Folds:
        def __init__(self, order):
            self.position = np.argsort(order)

        def split(self, X, y):
            return [(self.position[train], self.position[test]) for train, test in folds]

    one = ddfa(cv=Folds(np.arange(400)), discriminator=LOGISTIC).fit(X, domains=d)
    other = ddfa(cv=Folds(order), discriminator=LOGISTIC).fit(X[order], domains=d[order])
    assert adjusted_rand_score(one.labels_[order], other.labels_) > 0.9
    scaled = ddfa(cv=Folds(np.arange(400)), discriminator=make_pipeline(StandardScaler(), GaussianNB()))
    labels = clone(scaled).fit(X, domains=d).labels_
    assert adjusted_rand_score(labels, clone(scaled).fit(scale * X, domains=d).labels_) > 0.99
    constant = np.c_[X, np.ones(400)]
    assert clone(scaled).fit(constant, domains=d).labels_.shape == (400,)


def test_the_default_discriminator_and_small_domains():
    X, _, d = world(60)
    model = DDFA(2, 4, cv=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model.fit(X, domains=d).predict(X, domains=d).shape == (60,)
        few = np.r_[np.zeros(56, int), [1, 1], [2, 2]]  # two points a domain
        assert model.fit(X, domains=few).class_prior_.shape == (2, 3)
        first = model.fit(X, domains=d).labels_
        assert np.array_equal(first, clone(model).fit(X, domains=d).labels_)  # one seed decides all


def test_pictures_for_a_discriminator_that_takes_them(fitted):
    _, X, y, d = fitted

    class Flat(GaussianNB):
        def fit(self, X, y):
            return super().fit(X.reshape(len(X), -1), y)

        def predict_proba(self, X):
            return super().predict_proba(X.reshape(len(X), -1))

    pictures = X[:, None, :, None]
    model = ddfa(discriminator=Flat()).fit(pictures, domains=d)
    assert clustering_accuracy(y, model.predict(pictures, domains=d)) > 0.85
    with pytest.raises(ValueError, match=r"X has the shape .*default wants"):
        ddfa(discriminator=None).fit(pictures, domains=d)


def test_too_many_classes_are_warned_of():
    rng = np.random.default_rng(0)
    X, d = rng.normal(size=(400, 3)), np.arange(400) % 4  # nothing shifts
    with pytest.warns(UserWarning, match="identifiable"):
        ddfa().fit(X, domains=d)
    assert ddfa(n_classes=None).fit(X, domains=d).n_classes_ == 1


D = np.arange(40) % 4


@pytest.mark.parametrize(
    "options, domains, message",
    [
        ({}, None, "n_classes=3 with no domains"),
        ({"n_classes": 5}, D, "n_classes=5 with 4 domains"),
        ({"n_discretization": 2}, D, "n_discretization=2"),
        ({"n_classes": 0}, D, "n_classes=0"),
        ({"n_classes": 2.5}, D, "n_classes=2.5"),
        ({"nmf_restarts": None}, D, "nmf_restarts=None"),
        ({"solver": "raw"}, D, "solver='raw'"),
        ({"reweight": True}, D, "reweight=True"),
        ({"discriminator": "mlp"}, D, "discriminator='mlp'"),
        ({"discriminator": "precomputed"}, D, "a column per domain"),
        ({"discriminator": "precomputed", "reweight": "weights"}, D, "reweight='weights'"),
        ({}, D[:5], "domains has the shape"),
        ({}, np.where(D == 1, np.nan, D), "missing"),
        ({}, np.where(D == 1, None, D.astype(str)), "missing"),
        ({}, np.array([*D[:-1].tolist(), "x"], dtype=object), "mixes"),
        ({}, np.where(np.arange(40) == 3, 9, D), "9 has 1 point"),
    ],
)
def test_errors_name_the_fix(options, domains, message):
    X = np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(ValueError, match=message):
        ddfa(**options).fit(X, domains=domains)


def test_errors_of_prediction_and_probabilities(fitted):
    model, X, _, d = fitted
    with pytest.raises(ValueError, match=r"\[7\] were not in fit"):
        model.predict(X[:2], domains=[0, 7])
    with pytest.raises(ValueError, match="domains is missing"):
        model.score(X)
    for bad in (-np.ones((8, 4)), np.zeros((8, 4))):
        with pytest.raises(ValueError, match="no probabilities"):
            ddfa(discriminator="precomputed").fit(bad, domains=np.arange(8) % 4)

    class Half:
        def split(self, X, y):
            return [(np.arange(0, len(X), 2), np.arange(1, len(X), 2))]

    with pytest.raises(ValueError, match="hold out every point"):
        ddfa(cv=Half()).fit(X, domains=d)
