"""TFUP and TFUP-T against their formulas, written naively; what they do with pools, views and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from unfused.label import TFUPClassifier, TFUPTClassifier
from unfused.nn import zero_shot
from unfused.nn.cache_model import Keys, confident_and_central, divergence, linear_grid, tip_adapter


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def sample(n=120, d=10, classes=4, seed=0, noise=0.7):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = np.arange(n) % classes
    X = centres[y] + noise * rng.normal(size=(n, d)) * rng.uniform(0.2, 1.8, d)
    return unit(X), y, unit(centres + 0.9 * rng.normal(size=centres.shape))


def naive_cache(X, text, scale, shots):
    p = softmax(scale * X @ text.T)
    chosen = []
    for c in range(len(text)):
        top = np.argsort(-p[:, c])[: 2 * shots]
        apart = [sum(kl(p[j], p[k]) for k in top) for j in top]
        chosen.append(top[np.argsort(apart)[:shots]])
    return chosen


def naive_logits(X, text, keys, index, alpha, beta, semantic=10.0, scale=100.0):
    p, q = softmax(semantic * X @ text.T), softmax(semantic * keys @ text.T)
    out = []
    for i, x in enumerate(X):
        d = np.array([kl(p[i], row) for row in q])
        b = 2 * (1 - (d - d.min()) / (d.max() - d.min()))
        A = np.exp(-beta * (1 - (keys @ x) * b))
        out.append(scale * text @ x + alpha * np.array([A[index == c].sum() for c in range(len(text))]))
    return np.array(out)


@pytest.mark.parametrize("budget", [1 << 22, 300])
def test_cache_and_vote_are_the_formulas(budget, monkeypatch):
    monkeypatch.setattr(zero_shot, "BUDGET", budget)
    X, _, text = sample()
    clf = TFUPClassifier(text, alpha=0.7, beta=2.0, shots=(3, 9)).fit(5 * X)
    assert len(clf.keys_) == 4 * 9  # int(0.3 * 120 / 4)
    rows = naive_cache(X, text, 10.0, 9)
    assert [set(r) for r in rows] == [set(clf.key_rows_[clf.key_index_ == c]) for c in range(4)]
    new = sample(seed=9)[0]
    expected = naive_logits(new, text, clf.keys_, clf.key_index_, 0.7, 2.0)
    assert np.allclose(clf.decision_function(new), expected)
    assert np.array_equal(clf.predict(3 * new), expected.argmax(1))


@pytest.mark.parametrize(
    ("n", "bounds", "expected"), [(120, (9, 16), 9), (120, (2, 16), 9), (2000, (9, 16), 16), (5, (9, 16), 5)]
)
def test_how_many_shots(n, bounds, expected):
    X, _, text = sample(n)
    clf = TFUPClassifier(text, shots=bounds).fit(X)
    assert np.bincount(clf.key_index_).tolist() == [expected] * 4


def test_divergence_needs_no_class_axis():
    X, _, text = sample(20)
    keys = sample(7, seed=3)[0]
    p, q = softmax(4 * X @ text.T), softmax(4 * keys @ text.T)
    assert np.allclose(divergence(X, keys, text, 4.0), [[kl(a, b) for b in q] for a in p])
    p, q = softmax(4 * X), softmax(4 * keys)
    assert np.allclose(divergence(X, keys, None, 4.0), [[kl(a, b) for b in q] for a in p])


def test_keys_that_are_all_alike_do_not_divide_by_zero():
    X, _, text = sample(8)
    clf = TFUPClassifier(text).fit(np.tile(X[:1], (5, 1)))
    assert np.isfinite(clf.decision_function(X)).all()


def test_votes_with_unequal_and_missing_classes():
    rng = np.random.default_rng(0)
    for index in ([0, 0, 2, 2], [0, 1, 2], [1, 1, 1], [0, 0, 1, 1, 2, 2], [0, 2, 2]):
        A = rng.random((5, len(index)))
        onehot = np.eye(3)[index]
        assert np.allclose(Keys(np.empty((len(index), 1)), np.array(index), 3).votes(A), A @ onehot)


def test_tip_adapter_baseline():
    X, y, text = sample(30)
    keys, order = Keys.sort(X, y, 4)
    assert np.array_equal(keys.index, np.sort(y)) and np.array_equal(X[order], keys.features)
    new = sample(11, seed=2)[0]
    expected = 100 * new @ text.T + 1.5 * np.exp(-5.5 * (1 - new @ X.T)) @ np.eye(4)[y]
    assert np.allclose(tip_adapter(new, keys, text, 1.5, 5.5), expected)


def test_linear_grid_is_every_setting(monkeypatch):
    monkeypatch.setattr(zero_shot, "BUDGET", 100)
    rng = np.random.default_rng(0)
    base, a, b = rng.normal(size=(3, 40, 5))
    a[:, 2] = a[:, 1]  # some slopes are 0
    y, weight = rng.integers(0, 5, 40), rng.uniform(0, 1, 40)
    alphas, gammas = np.array([3.0, 0.0, -1.0, 0.5, 10.0]), np.array([0.0, 2.0, -0.3])
    expected = [
        [np.average((base + u * a + v * b).argmax(1) == y, weights=weight) for v in gammas] for u in alphas
    ]
    assert np.allclose(linear_grid(base, a, b, y, alphas, gammas, weight), expected)


def test_labels_are_not_looked_at_beside_text_features():
    X, y, text = sample()
    names = np.array(["owl", "ant", "fox", "bee"])
    one, two = (
        TFUPClassifier(text, classes=names).fit(X),
        TFUPClassifier(text, classes=names).fit(X, names[y[::-1]]),
    )
    assert np.allclose(one.decision_function(X), two.decision_function(X))
    assert np.allclose(one.text_features_, text[np.argsort(names)])
    assert list(TFUPClassifier(text).fit(X).classes_) == [0, 1, 2, 3]


def test_without_text_features_the_class_means_stand_in():
    X, y, _ = sample()
    means = np.stack([X[y == c].mean(0) for c in range(4)])
    one, two = TFUPClassifier().fit(X, y), TFUPClassifier(means).fit(X)
    assert np.allclose(one.decision_function(X), two.decision_function(X))
    with pytest.raises(ValueError, match="requires y"):
        TFUPClassifier().fit(X)


BAD = [
    ({"text_features": np.eye(4, 7)}, "text_features has 7 columns, X has 10 features"),
    ({"text_features": np.eye(1, 10)}, "one class"),
    ({"text_features": np.eye(4, 10), "classes": ["a", "a", "b", "c"]}, "'a' more than once"),
    ({"text_features": np.eye(4, 10), "shots": (9, 3)}, r"shots=\(9, 3\)"),
    ({"text_features": np.eye(4, 10), "beta": -1}, "beta=-1: give a number"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD, ids=range(len(BAD)))
def test_bad_parameters(parameters, message):
    X, _, _ = sample()
    with pytest.raises(ValueError, match=message):
        TFUPClassifier(**parameters).fit(X)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_invariants(seed, classes):
    rng = np.random.default_rng(seed)
    X, text = rng.normal(size=(40, 6)), rng.normal(size=(classes, 6))
    scores = TFUPClassifier(text).fit(X)._all_logits(X)
    order, names = rng.permutation(40), rng.permutation(classes)
    assert np.allclose(TFUPClassifier(text).fit(X[order])._all_logits(X), scores)
    assert np.allclose(TFUPClassifier(text, classes=names).fit(X)._all_logits(X)[:, names], scores)
    factors = rng.uniform(0.1, 10, (40, 1))
    assert np.allclose(TFUPClassifier(text).fit(factors * X)._all_logits(X), scores)
    twice = TFUPClassifier(np.hstack([text, text])).fit(np.hstack([X, X]))
    assert np.allclose(twice._all_logits(np.hstack([X, X])), scores)


# -- TFUP-T ------------------------------------------------------------------------------------------------------------


def test_without_training_it_is_zero_shot():
    X, _, text = sample()
    clf = TFUPTClassifier(text, epochs=0, warmup_epochs=0, image_ratio=0.0).fit(X)
    assert np.allclose(clf.decision_function(X), 100 * X @ text.T, atol=1e-3) and clf.kept_ == []
    assert np.allclose(clf.text_adapted_, text, atol=1e-6)  # the residual starts at 0


def test_it_learns_from_its_own_labels_and_forgets_the_cache():
    X, y, text = sample(n=1200)
    text = unit(text + 0.6 * text[0])  # the text encoder says "class 0" too often
    views = np.stack([X + 0.05 * np.random.default_rng(v).normal(size=X.shape) for v in range(2)])
    zero = np.mean((X @ text.T).argmax(1) == y)
    clf = TFUPTClassifier(text, random_state=0).fit(X, strong_views=views)
    assert (
        clf.score(X, y) > zero + 0.02 and len(clf.kept_) == 25 and 0 <= min(clf.kept_) <= max(clf.kept_) <= 1
    )
    again = clone(clf).fit(X, strong_views=views)
    assert np.array_equal(again.text_adapted_, clf.text_adapted_)
    clf.tfup_.keys_ = clf.tfup_.keys_ * 0
    assert np.array_equal(again.predict(X), clf.predict(X))
    assert np.allclose(clf.decision_function(9 * X), clf.decision_function(X))  # homogeneous


def test_the_marginal_term_balances_predictions():
    X, _, text = sample(n=600, noise=1.0)
    text = unit(text + 0.8 * text[0])  # the text encoder says "class 0" too often
    spread = []
    for weight in (0.0, 5.0):
        clf = TFUPTClassifier(text, marginal_weight=weight, random_state=0).fit(X)
        share = np.bincount(clf.predict(X), minlength=4) / 600
        spread.append(np.abs(share - 0.25).sum())
    assert spread[1] < spread[0]


def test_warm_up_alone_is_taught_by_tfup_labels():
    X, _, text = sample(n=400)
    clf = TFUPTClassifier(text, epochs=10, warmup_epochs=10, random_state=0).fit(X)
    assert clf.kept_ == []
    rows, _ = clf.tfup_._choose(X, 0.75, 9, np.inf)
    assert len(rows) == 4 * 75  # int(0.75 * 400 / 4)
    assert np.mean(clf.predict(X[rows]) == clf.tfup_.predict(X[rows])) > 0.9


def test_views_by_function_and_their_errors():
    X, _, text = sample()
    rows_seen = []

    def strong(rows):
        rows_seen.extend(rows)
        return X[rows]

    fast = TFUPTClassifier(text, epochs=2, warmup_epochs=1, random_state=0)
    by_function, plain = clone(fast).fit(X, strong_views=strong), clone(fast).fit(X)
    assert np.array_equal(by_function.text_adapted_, plain.text_adapted_) and set(rows_seen) == set(
        range(120)
    )
    with pytest.raises(ValueError, match=r"strong_views gave the shape \(\d+, 3\)"):
        clone(fast).fit(X, strong_views=lambda rows: X[rows, :3])
    with pytest.raises(ValueError, match="strong_views has the shape"):
        clone(fast).fit(X, strong_views=X)
    with pytest.raises(ValueError, match="epochs=2, warmup_epochs=5"):
        TFUPTClassifier(text, epochs=2).fit(X)
    with pytest.raises(ValueError, match="image_ratio=2"):
        TFUPTClassifier(text, image_ratio=2).fit(X)
    sharp = TFUPTClassifier(
        text, epochs=1, warmup_epochs=0, tfup=TFUPClassifier(beta=5.5, shots=(2, 3)), random_state=0
    ).fit(X)
    assert sharp.tfup_.beta == 5.5 and len(sharp.tfup_.keys_) == 12


def test_confident_and_central_takes_no_more_than_there_are():
    X, _, text = sample(n=3)
    assert confident_and_central(X, text, 10.0, 5).shape == (4, 3)
