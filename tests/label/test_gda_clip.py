"""GDA-CLIP against its formulas, written naively; what it does with samples, classes and bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import GridSearchCV

from unfused.label import GDAClassifier, encode_views
from unfused.nn import gaussian, zero_shot
from unfused.nn.gaussian import class_moments, ks_discriminant, leave_one_out, surrogate_precision


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sample(n=90, d=12, classes=4, seed=0, noise=0.6):
    """Unit features, labels, and text features that point roughly at the classes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = np.arange(n) % classes
    X = unit(centres[y] + noise * np.abs(rng.normal(size=d)) * rng.normal(size=(n, d)))
    return X, y, unit(centres + rng.normal(size=centres.shape))


def by_the_card(X, y):
    """The card's four lines."""
    classes, (n, d) = len(np.unique(y)), X.shape
    mu = np.stack([X[y == c].mean(0) for c in range(classes)])
    S = np.cov((X - mu[y]).T)
    P = d * np.linalg.pinv((n - 1) * S + S.trace() * np.eye(d), hermitian=True)
    return P @ mu.T, -0.5 * np.einsum("cd,de,ce->c", mu, P, mu) - np.log(classes)


def test_few_shot_is_the_formula():
    X, y, text = sample()
    clf = GDAClassifier(text, alpha=0.3, logit_scale=20.0).fit(X, y)
    W, b = by_the_card(X, y)
    assert np.allclose(clf.image_coef_, W.T) and np.allclose(clf.image_intercept_, b)
    new = sample(seed=5)[0]
    assert np.allclose(clf.decision_function(new), 20 * new @ text.T + 0.3 * (new @ W + b))
    assert np.allclose(clf.decision_function(7 * new), new @ clf.coef_.T + clf.intercept_)


def test_without_text_it_is_shrunk_lda():
    X, y, _ = sample()
    clf = GDAClassifier(normalize=False).fit(3 * X, y)
    W, b = by_the_card(3 * X, y)
    assert np.allclose(clf.decision_function(3 * X), 3 * X @ W + b) and clf.alpha_ == 1
    many, labels, _ = sample(n=4000)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=None, priors=np.full(4, 0.25)).fit(many, labels)
    assert (GDAClassifier(normalize=False).fit(many, labels).predict(many) == lda.predict(many)).mean() > 0.99


def test_pooled_is_the_pseudo_inverse_of_the_mean_covariance():
    X, y, text = sample(n=70, d=30)  # fewer samples than the features need: it is singular
    clf = GDAClassifier(text, shrinkage="pooled", alpha=1.0).fit(X, y)
    P = np.linalg.pinv(np.mean([np.cov(X[y == c].T) for c in range(4)], axis=0), hermitian=True)
    mu = np.stack([X[y == c].mean(0) for c in range(4)])
    assert np.allclose(clf.image_coef_, mu @ P, rtol=1e-5)
    assert not hasattr(clf, "partial_fit")


def test_a_validation_set_chooses_alpha_and_ties_keep_the_first():
    X, y, text = sample(noise=1.2)
    X_val, y_val, _ = sample(seed=3, n=200, noise=1.2)
    clf = GDAClassifier(text).fit(X, y, X_val=X_val, y_val=y_val)
    W, b = by_the_card(X, y)
    alphas = [0, *10.0 ** np.arange(-4, 6)]
    scores = [np.mean((100 * X_val @ text.T + a * (X_val @ W + b)).argmax(1) == y_val) for a in alphas]
    assert np.allclose(clf.alpha_scores_, scores) and clf.alpha_ == alphas[int(np.argmax(scores))]
    assert GDAClassifier(np.eye(4, 12), alpha=[5, 0.0]).fit(np.eye(4, 12)[y], y).alpha_ == 5  # all are right


def naive_leave_one_out(X, y, groups, weight=None):
    weight = np.ones(len(X)) if weight is None else weight
    scores = {}
    for group in np.unique(groups):
        rest = groups != group
        if not rest[y == y[groups == group][0]].any():
            continue
        moments = class_moments(X[rest], y[rest], y.max() + 1, weight[rest])
        coef, intercept = ks_discriminant(moments, np.zeros(y.max() + 1))
        scores |= dict(zip(np.flatnonzero(~rest).tolist(), X[~rest] @ coef.T + intercept, strict=True))
    return scores


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("shape", [(24, 6), (24, 40)])
def test_leaving_out_in_closed_form_is_refitting(views, shape, monkeypatch):
    monkeypatch.setattr(zero_shot, "BUDGET", 500)
    X, y, _ = sample(*shape)
    rng = np.random.default_rng(1)
    X = np.concatenate([X, *(X + 0.1 * rng.normal(size=X.shape) for _ in range(views - 1))])
    y, groups = np.tile(y, views), np.tile(np.arange(len(y)), views)
    keep = np.r_[1 : len(X)]  # groups of unequal size
    X, y, groups = X[keep], y[keep], groups[keep]
    weight = rng.uniform(0.5, 2, len(X))
    found = leave_one_out(X, y, groups, class_moments(X, y, 4, weight), np.zeros(4), weight)
    scores = {row: s for rows, block in found for row, s in zip(rows.tolist(), block, strict=True)}
    naive = naive_leave_one_out(X, y, groups, weight)
    assert scores.keys() == naive.keys()
    for row in naive:
        assert np.allclose(scores[row], naive[row], rtol=1e-6, atol=1e-8)


def test_leaving_out_where_nothing_is_left_to_scatter():
    X = np.array(
        [[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.9, 0.1]]
    )  # without a sample of class 1, no residual
    y, groups = np.array([0, 0, 1, 1]), np.arange(4)
    found = list(leave_one_out(X, y, groups, class_moments(X, y, 2), np.zeros(2)))
    naive = naive_leave_one_out(X, y, groups)
    assert np.allclose(found[0][1], [naive[row] for row in found[0][0]])


def test_alpha_on_the_support_leaves_all_views_of_a_picture_out():
    X, y, text = sample(n=40, noise=1.5)
    clf = GDAClassifier(text, alpha=np.array([0.0, 1.0])).fit(X, y)
    naive = naive_leave_one_out(X, y, np.arange(40))
    right = [
        np.mean([(100 * X[i] @ text.T + a * s).argmax() == y[i] for i, s in naive.items()]) for a in (0, 1)
    ]
    assert np.allclose(clf.alpha_scores_, right)
    views = np.tile(X, (3, 1))  # copies: leaving one of them out alone would leave nothing out
    same = GDAClassifier(text, alpha=[0.0, 1.0]).fit(views, np.tile(y, 3), groups=np.tile(np.arange(40), 3))
    naive = naive_leave_one_out(views, np.tile(y, 3), np.tile(np.arange(40), 3))
    right = np.mean([(100 * views[i] @ text.T + s).argmax() == y[i % 40] for i, s in naive.items()])
    assert np.isclose(same.alpha_scores_[1], right)
    with pytest.raises(ValueError, match="groups holds a group with samples of two classes"):
        GDAClassifier(text).fit(X, y, groups=np.zeros(40))


def test_one_sample_a_class_without_views_is_zero_shot():
    X, y, text = sample(n=4)
    with pytest.warns(UserWarning, match="alpha_ is 0, the zero-shot classifier"):
        clf = GDAClassifier(text).fit(X, y)
    assert np.array_equal(clf.predict(X), (X @ text.T).argmax(1))
    alone = GDAClassifier().fit(X, y)  # no residual: the precision is the identity
    assert np.allclose(alone.image_coef_, X) and np.array_equal(alone.predict(X), y)


def test_partial_fit_in_any_pieces_is_fit():
    X, y, text = sample()
    whole = GDAClassifier(text, alpha=2.0).fit(X, y)
    parts = GDAClassifier(text, alpha=2.0)
    for rows in np.split(np.argsort(y, kind="stable"), [7, 30, 31]):  # the first holds one class alone
        parts.partial_fit(X[rows], y[rows], classes=np.arange(4))
    assert np.allclose(parts.coef_, whole.coef_) and np.allclose(parts.intercept_, whole.intercept_)
    early = GDAClassifier().partial_fit(X[y < 2], y[y < 2], classes=range(4))
    assert set(early.predict(X)) == {0, 1}
    with pytest.raises(ValueError, match="classes is None: the first call"):
        GDAClassifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="cannot leave samples out with partial_fit: give X_val"):
        GDAClassifier(text).partial_fit(X, y, classes=range(4))
    chosen = GDAClassifier(text).partial_fit(X, y, classes=range(4), X_val=X, y_val=y)
    assert chosen.alpha_ == GDAClassifier(text).fit(X, y, X_val=X, y_val=y).alpha_


def test_weights_are_repetitions_and_zero_removes():
    X, y, text = sample(n=40)
    weight = np.random.default_rng(0).integers(0, 3, 40)
    weight[:4] = 1
    repeated = np.repeat(np.arange(40), weight)
    one = GDAClassifier(text).fit(X, y, sample_weight=weight, groups=np.arange(40))
    two = GDAClassifier(text).fit(X[repeated], y[repeated], groups=repeated)
    assert np.allclose(one.coef_, two.coef_) and np.allclose(one.alpha_scores_, two.alpha_scores_)


def test_new_classes_stand_on_the_nearest_samples():
    X, y, text = sample(n=200)
    clf = GDAClassifier(text, alpha=0.5, shrinkage="pooled").fit(X, y)
    old = clf.image_coef_.copy()
    w = unit(np.random.default_rng(7).normal(size=(2, 12)))
    clf.add_classes(X, 3 * w, k=20, text_copies=16)
    means, precision = [], []
    for each in w:
        near = X[np.argsort(-X @ each)[:20]]
        means.append(np.concatenate([near, np.tile(each, (16, 1))]).mean(0))
        S = (near - each).T @ (near - each) / 19
        precision.append(12 * np.linalg.pinv(19 * S + S.trace() * np.eye(12), hermitian=True))
    P, mu = np.mean(precision, 0), np.stack(means)
    assert np.allclose(clf.image_coef_, np.concatenate([old, mu @ P]))
    assert np.allclose(clf.image_intercept_[4:], -np.log(6) - 0.5 * np.einsum("cd,de,ce->c", mu, P, mu))
    assert list(clf.classes_) == [0, 1, 2, 3, 4, 5] and clf.decision_function(X).shape == (200, 6)
    assert np.allclose(clf.coef_, 100 * np.concatenate([text, w]) + 0.5 * clf.image_coef_)


def test_surrogate_precision_of_one_point_is_the_identity():
    X = np.eye(3)
    assert np.allclose(surrogate_precision(X, np.array([[0, 0]]), X[:1]), np.eye(3))


def test_added_names_are_sorted_in_and_checked():
    X, y, text = sample()
    names = np.array(["d", "b", "c", "e"])
    clf = GDAClassifier(text, classes=names, alpha=1.0).fit(X, names[y])
    before = dict(zip(clf.classes_, clf.image_coef_, strict=True))
    clf.add_classes(X, text[:1] * -1, ["a"])
    assert list(clf.classes_) == ["a", "b", "c", "d", "e"]
    assert all(np.allclose(clf.image_coef_[list(clf.classes_).index(n)], row) for n, row in before.items())
    for classes, message in (
        (["b"], "'b' more than once"),
        ([""], "empty name"),
        (None, "give the new classes' names"),
    ):
        with pytest.raises(ValueError, match=message):
            clf.add_classes(X, text[:1], classes)
    with pytest.raises(ValueError, match="new classes by text need text features"):
        GDAClassifier().fit(X, y).add_classes(X, text)


def test_an_added_class_gives_way_to_its_first_samples():
    X, y, text = sample()
    clf = GDAClassifier(text[:3], alpha=1.0).fit(X[y < 3], y[y < 3]).add_classes(X[y < 3], text[3:])
    added = clf.image_coef_[3].copy()
    clf.partial_fit(X[:3], y[:3])
    assert np.array_equal(clf.image_coef_[3], added)
    clf.partial_fit(X[y == 3], y[y == 3])
    whole = GDAClassifier(text, alpha=1.0).fit(np.vstack([X, X[:3]]), np.r_[y, y[:3]])
    assert np.allclose(clf.coef_, whole.coef_)


def test_a_class_without_samples_is_added_by_its_text():
    X, y, text = sample()
    some = y != 2
    clf = GDAClassifier(text, classes=range(4), alpha=1.0).fit(X[some], y[some])
    three = GDAClassifier(text[[0, 1, 3]], classes=[0, 1, 3], alpha=1.0).fit(X[some], y[some])
    three.add_classes(X[some], text[2:3], [2])
    assert np.allclose(clf.image_coef_, three.image_coef_)
    chosen = GDAClassifier(text, classes=range(4)).fit(X[some], y[some])  # leaving out works beside it
    assert 0 <= chosen.alpha_scores_.min() and chosen.alpha_scores_.max() <= 1
    with pytest.raises(ValueError, match="class 2 has no sample and no text feature"):
        GDAClassifier(classes=range(4)).fit(X[some], y[some])


@pytest.mark.parametrize("text_in_e_step", [True, False])
@pytest.mark.parametrize("ridge", [1e-2, None])
def test_em_is_the_formula(text_in_e_step, ridge, monkeypatch):
    monkeypatch.setattr(zero_shot, "BUDGET", 200)
    X, _, text = sample()
    clf = GDAClassifier(text, logit_scale=5.0)
    clf.fit_unlabeled(X, max_iter=3, tol=0, text_in_e_step=text_in_e_step, ridge=ridge)
    n, d = X.shape
    logits = 5 * X @ text.T
    for _ in range(3):
        R = softmax(logits, axis=1)
        mu = R.T @ X / R.sum(0)[:, None]
        S = sum((R[:, c, None] * (X - mu[c])).T @ (X - mu[c]) for c in range(4)) / n
        if ridge is None:
            P = d * np.linalg.pinv(n * S + np.trace(n * S) / (n - 1) * np.eye(d))
        else:
            P = np.linalg.inv(S + ridge * S.trace() / d * np.eye(d))
        gda = X @ P @ mu.T - 0.5 * np.einsum("cd,de,ce->c", mu, P, mu) - np.log(4)
        logits = gda + 5 * X @ text.T * text_in_e_step
    assert clf.n_iter_ == 3 and clf.alpha_ == 1
    assert np.allclose(clf.decision_function(X), gda + 5 * X @ text.T)
    clf.fit_unlabeled(X, max_iter=3, tol=0, text_in_e_step=text_in_e_step, ridge=ridge, ensemble=False)
    assert np.allclose(clf.decision_function(X), gda)


def test_em_gains_over_zero_shot_stops_and_is_what_fit_without_labels_does():
    X, y, text = sample(n=1500, noise=0.8)
    zero = np.mean((X @ text.T).argmax(1) == y)
    clf = GDAClassifier(text, logit_scale=5.0).fit_unlabeled(X, max_iter=200)
    assert clf.score(X, y) > zero + 0.05 and clf.n_iter_ < 200
    names = np.array(["a", "b", "c", "d"])
    named = GDAClassifier(text, classes=names, logit_scale=5.0).fit(X)
    assert np.mean(named.predict(X) == names[y]) > zero
    far = np.vstack([text, -text[:1]])  # a class that nothing looks like does not break it
    assert np.isfinite(GDAClassifier(far, logit_scale=1000.0).fit_unlabeled(X).coef_).all()
    with pytest.raises(ValueError, match="without labels the classes have to come from a text encoder"):
        GDAClassifier().fit_unlabeled(X)


def test_uniform_priors_serve_rare_classes():
    X, y, _ = sample(n=2000, noise=1.5)
    rare = (y != 0) | (np.arange(2000) < 100)
    uniform, empirical = (GDAClassifier(priors=p).fit(X[rare], y[rare]) for p in ("uniform", "empirical"))
    assert np.mean(uniform.predict(X[y == 0]) == 0) > np.mean(empirical.predict(X[y == 0]) == 0)
    given_ = GDAClassifier(priors=np.bincount(y[rare]) / rare.sum()).fit(X[rare], y[rare])
    assert np.allclose(given_.decision_function(X), empirical.decision_function(X))


def test_rows_in_blocks_and_single_precision_change_nothing(monkeypatch):
    X, y, text = sample()
    clf = GDAClassifier(text).fit(X, y)
    whole = clf.decision_function(X)
    single = clone(clf).fit(X.astype(np.float32), y)
    assert np.allclose(single.coef_, clf.coef_, rtol=1e-3, atol=1e-3)
    assert clf.decision_function(X.astype(np.float32)).dtype == np.float32
    monkeypatch.setattr(zero_shot, "BUDGET", 40)
    assert np.allclose(clf.decision_function(X), whole) and np.array_equal(clf.predict(X), whole.argmax(1))
    assert np.allclose(clone(clf).fit(X, y).coef_, clf.coef_)


def test_zero_rows_get_the_prior_alone_and_the_text_follows_string_labels():
    X, y, text = sample()
    names = np.array(["owl", "ant", "fox", "bee"])
    clf = GDAClassifier(text, classes=names).fit(X, names[y])
    assert np.allclose(clf.text_features_, text[np.argsort(names)])
    assert np.allclose(clf.decision_function(np.zeros((1, 12))), clf.intercept_)
    search = GridSearchCV(clf, {"alpha": [0.1, 1.0], "logit_scale": [20, 100]}, cv=3).fit(X, names[y])
    assert search.best_score_ > 0.5


BAD = [
    ({"text_features": np.eye(4, 7)}, "text_features has 7 columns, X has 12 features"),
    ({"text_features": np.eye(3, 12)}, "text_features has 3 rows, y has 4 classes"),
    ({"text_features": np.zeros((4, 12))}, r"text_features\[0\] has norm 0"),
    ({"text_features": np.full((4, 12), np.nan)}, "text_features contains NaN"),
    ({"text_features": np.eye(4, 12), "classes": ["a", "b", "", "d"]}, "classes holds an empty name"),
    ({"text_features": np.eye(4, 12), "classes": [0, 1, 2, 2]}, "classes holds 2 more than once"),
    ({"text_features": np.eye(4, 12), "classes": [0, 1, 2, 9]}, "y holds 3, which is not among the classes"),
    (
        {"text_features": np.eye(4, 12), "classes": [0, 1, 2]},
        "classes has 3 labels, text_features has 4 rows",
    ),
    ({"shrinkage": "lw"}, "shrinkage='lw': choose 'ks' or 'pooled'"),
    ({"alpha": "auto"}, "alpha='auto': give a number"),
    ({"alpha": [1, np.nan]}, "alpha=.*: give a number"),
    ({"logit_scale": 0}, "logit_scale=0: give a positive number"),
    ({"priors": [1, 2]}, "priors=.*4 positive numbers"),
    ({"priors": "flat"}, "priors='flat': give 'uniform'"),
    ({"text_features": np.eye(4, 12), "shrinkage": "pooled"}, "shrinkage='pooled': give X_val"),
]


@pytest.mark.parametrize(
    ("parameters", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_parameters(parameters, message):
    X, y, _ = sample()
    with pytest.raises(ValueError, match=message):
        GDAClassifier(**parameters).fit(X, y)


def test_bad_data():
    X, y, text = sample()
    with pytest.raises(ValueError, match="y holds one class"):
        GDAClassifier().fit(X, np.zeros(90, int))
    with pytest.raises(ValueError, match="y_val is None"):
        GDAClassifier(text).fit(X, y, X_val=X)
    with pytest.raises(ValueError, match="y_val holds 5"):
        GDAClassifier(text).fit(X, y, X_val=X, y_val=y + 5)
    with pytest.raises(ValueError, match="needs a class with two samples"):
        GDAClassifier(shrinkage="pooled").fit(X[:4], y[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = np.column_stack([X, np.ones(90)])
        assert GDAClassifier().fit(constant, y).score(constant, y) > 0.9
        zero = np.vstack([X, np.zeros(12)])
        assert GDAClassifier().fit(zero, np.r_[y, 0]).score(X, y) > 0.9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 15))
def test_invariants(seed, classes, d):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, 20)])
    X = rng.normal(size=(len(y), d)) + np.eye(classes, d)[y]
    text = rng.normal(size=(classes, d))
    clf = GDAClassifier(text, alpha=0.7).fit(X, y)
    scores = clf._all_logits(X)
    order = rng.permutation(len(y))
    assert np.allclose(clone(clf).fit(X[order], y[order])._all_logits(X), scores)
    names = rng.permutation(classes)  # class c is called names[c], and its text row moves along
    renamed = GDAClassifier(text, classes=names, alpha=0.7).fit(X, names[y])
    assert np.allclose(renamed._all_logits(X)[:, names], scores)
    factors = rng.uniform(0.1, 10, (len(y), 1))
    assert np.allclose(clone(clf).fit(factors * X, y)._all_logits(X), scores)
    alone = GDAClassifier().fit(X, y)
    twice = GDAClassifier().fit(np.hstack([X, X]), y)  # every score doubles, D being twice as large
    one, two = alone._all_logits(X), twice._all_logits(np.hstack([X, X]))
    assert np.allclose(two - two[:, :1], 2 * (one - one[:, :1]), rtol=1e-5, atol=1e-6)


def test_views_are_samples():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (16, 12, 3)).astype(np.uint8) for _ in range(3)]
    seen = []

    def encode(batch):
        seen.append([picture.size for picture in batch])
        return np.stack([np.asarray(p, float).mean((0, 1)) for p in batch])

    features, source = encode_views(pictures, encode, n_views=4)
    assert features.shape == (12, 3) and source.tolist() == [0, 1, 2] * 4 and seen == [[(12, 16)] * 3] * 4
    assert np.allclose(features, encode_views(pictures, encode, n_views=4)[0])
    assert not np.allclose(features[:3], features[3:6])
    with pytest.raises(ValueError, match="0 images"):
        encode_views([], encode)


def test_moments_merge():
    X, y, _ = sample()
    one, two = (class_moments(X[rows], y[rows], 4) for rows in (slice(0, 20), slice(20, None)))
    both, whole = one.merge(two), class_moments(X, y, 4)
    for name in ("counts", "means", "scatter"):
        assert np.allclose(getattr(both, name), getattr(whole, name))
    assert gaussian.__doc__
