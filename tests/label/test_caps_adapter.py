"""M-Adapter against its formula, the grid against every setting, and CapS with captioners and generators that fail."""

from __future__ import annotations

import itertools
import types
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.label import MAdapterClassifier, build_caption_support
from unfused.label.caps_adapter import GRIDS
from unfused.nn import zero_shot


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sample(n=24, d=10, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    y = np.arange(n) % classes
    F, G = (unit(centres[y] + s * rng.normal(size=(n, d))) for s in (0.9, 1.1))
    return F, G, y, unit(centres + rng.normal(size=centres.shape))


def naive(x, F, G, y, W, alpha, beta, gamma, delta, ranges=None, tau=0.5, scale=100.0, feature=False):
    """The card's lines; `ranges` of K and A, by default of this batch, as the paper has it."""
    V = np.eye(len(W))[y]
    A = (1 - delta) * x @ F.T + delta * x @ G.T
    p, q = (softmax(z / tau) if feature else softmax(z @ W.T / tau) for z in (x, F))
    K = np.array([[(a * np.log(a / b)).sum() for b in q] for a in p])
    (k0, k1), (a0, a1) = ranges or ((K.min(), K.max()), (A.min(), A.max()))
    scaled = (K - k0) / (k1 - k0) * (a1 - a0) + a0
    return scale * x @ W.T + alpha * np.exp(-beta * (1 - A)) @ V - gamma * scaled @ V


@pytest.mark.parametrize("distribution", ["class", "feature"])
@pytest.mark.parametrize("budget", [1 << 22, 300])
def test_logits_are_the_formula(distribution, budget, monkeypatch):
    monkeypatch.setattr(zero_shot, "BUDGET", budget)
    F, G, y, W = sample()
    clf = MAdapterClassifier(W, alpha=2, beta=3, gamma=1.5, delta=0.3, distribution=distribution)
    V = sample(seed=4)[0]
    clf.fit(7 * F, y, caption_features=3 * G, X_val=V, y_val=y)
    feature = distribution == "feature"
    assert np.allclose(clf.decision_function(V), naive(V, F, G, y, W, 2, 3, 1.5, 0.3, feature=feature))
    new = sample(seed=5)[0]  # the ranges stay those of the validation data
    ranges = clf.divergence_range_, clf.affinity_range_
    expected = naive(new, F, G, y, W, 2, 3, 1.5, 0.3, ranges, feature=feature)
    assert np.allclose(clf.decision_function(new), expected)
    assert np.allclose(clf.decision_function(new[:1]), expected[:1])  # whatever else is predicted


def test_the_factored_grid_is_every_setting():
    F, G, y, W = sample()
    X_val, _, y_val, _ = sample(n=60, seed=8)
    grid = {"alpha": [0.5, 20.0], "beta": [1.0, 9.0], "gamma": [0.0, 3.0, 9.0], "delta": [0.0, 0.4, 1.0]}
    clf = MAdapterClassifier(W, logit_scale=3.0, **grid).fit(
        F, y, caption_features=G, X_val=X_val, y_val=y_val
    )
    scores = {}
    for delta, beta, alpha, gamma in itertools.product(
        *(grid[n] for n in ("delta", "beta", "alpha", "gamma"))
    ):
        logits = naive(X_val, F, G, y, W, alpha, beta, gamma, delta, scale=3.0)
        scores[alpha, beta, gamma, delta] = np.mean(logits.argmax(1) == y_val)
    best = max(scores, key=scores.get)  # the first of the best
    assert (clf.alpha_, clf.beta_, clf.gamma_, clf.delta_) == best and clf.score_ == scores[best]
    assert clf.score(X_val, y_val) == clf.score_


def test_the_paper_s_grids():
    assert [len(GRIDS[name]) for name in ("alpha", "beta", "gamma", "delta")] == [20, 200, 50, 11]
    assert np.isclose(GRIDS["alpha"][1], 0.1 + 49.9 / 20) and np.isclose(
        GRIDS["gamma"][-1], 0.1 + 49 * 29.9 / 50
    )


def test_special_cases():
    F, G, y, W = sample()
    fixed = {"alpha": 1.0, "beta": 5.5, "gamma": 2.0}
    tip_x = MAdapterClassifier(W, delta=0.0, **fixed).fit(F, y, caption_features=G)
    assert np.allclose(
        tip_x.decision_function(F), MAdapterClassifier(W, **fixed).fit(F, y).decision_function(F)
    )
    plain = MAdapterClassifier(W, alpha=0.0, beta=1.0, gamma=0.0).fit(F, y)
    assert np.allclose(plain.decision_function(F), 100 * F @ W.T)
    defaults = MAdapterClassifier(W).fit(F, y, caption_features=G)
    assert (defaults.alpha_, defaults.beta_, defaults.gamma_, defaults.delta_) == (1.0, 5.5, 0.1, 0.5)
    assert not hasattr(defaults, "score_")
    alone = MAdapterClassifier(gamma=0.0).fit(F, y)  # no texts: the vote alone
    assert alone.decision_function(F).max() < 7 and alone.score(F, y) > 0.9


def test_labels_and_unequal_classes():
    F, G, y, W = sample()
    names = np.array(["owl", "ant", "fox", "bee"])
    keep = np.r_[0:17, 20]
    args = {"alpha": 1.0, "beta": 3.0, "gamma": 0.5, "delta": 0.5}
    clf = MAdapterClassifier(W, classes=names, **args).fit(F[keep], names[y[keep]], caption_features=G[keep])
    same = MAdapterClassifier(W, **args).fit(F[keep], y[keep], caption_features=G[keep])
    order = np.argsort(names)
    assert np.allclose(clf.decision_function(F), same.decision_function(F)[:, order])
    missing = MAdapterClassifier(W, classes=range(4), **args).fit(
        F[y != 1], y[y != 1]
    )  # zero-shot alone for class 1
    assert set(missing.classes_) == {0, 1, 2, 3} and np.isfinite(missing.decision_function(F)).all()


BAD = [
    ({"text_features": np.eye(4, 7)}, {}, "text_features has 7 columns, X has 10 features"),
    ({}, {"caption_features": np.eye(24, 7)}, "caption_features has 7 columns, X has 10 features"),
    ({}, {"caption_features": np.ones((5, 10))}, "caption_features has 5 rows, X has 24"),
    ({}, {"caption_features": np.zeros((24, 10))}, r"caption_features\[0\] has norm 0"),
    ({"distribution": "both"}, {}, "distribution='both': choose"),
    ({"tau": 0}, {}, "tau=0"),
    (
        {"delta": 1.5},
        {"caption_features": np.ones((24, 10))},
        "delta=1.5: the captions' share lies between 0 and 1",
    ),
    ({"beta": [1, 2]}, {}, "beta has 2 candidates: give X_val"),
    ({"alpha": -1}, {}, "alpha=-1: give numbers that are not negative"),
    ({"gamma": "auto"}, {}, "gamma='auto': give a number"),
    ({}, {"X_val": np.ones((3, 10))}, "y_val is None"),
    ({}, {"X_val": np.ones((3, 10)), "y_val": [0, 1, 7]}, "y_val holds 7"),
]


@pytest.mark.parametrize(("parameters", "arguments", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(parameters, arguments, message):
    F, _, y, _ = sample()
    with pytest.raises(ValueError, match=message):
        MAdapterClassifier(**parameters).fit(F, y, **arguments)
    with pytest.raises(ValueError, match="one class"):
        MAdapterClassifier().fit(F, 0 * y)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_invariants(seed, classes):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, 20)])
    F, G, new = rng.normal(size=(3, len(y), 6))
    W = rng.normal(size=(classes, 6))
    args = {"alpha": 1.0, "beta": 3.0, "gamma": 0.5, "delta": 0.5}
    scores = MAdapterClassifier(W, **args).fit(F, y, caption_features=G)._all_logits(new)
    order, names = rng.permutation(len(y)), rng.permutation(classes)
    mixed = MAdapterClassifier(W, **args).fit(F[order], y[order], caption_features=G[order])
    assert np.allclose(mixed._all_logits(new), scores)
    renamed = MAdapterClassifier(W, classes=names, **args).fit(F, names[y], caption_features=G)
    assert np.allclose(renamed._all_logits(new)[:, names], scores)
    twice = MAdapterClassifier(np.hstack([W, W]), **args).fit(
        np.hstack([F, F]), y, caption_features=np.hstack([G, G])
    )
    assert np.allclose(twice._all_logits(np.hstack([new, new]) * rng.uniform(0.1, 9)), scores)


# -- CapS --------------------------------------------------------------------------------------------------------------


def paint(prompt):
    return np.random.default_rng(zlib.crc32(prompt.encode())).random((4, 4, 3))


def encode(pictures):
    return np.stack([np.asarray(p, float).mean((0, 1))[:3] for p in pictures])


def encode_texts(texts):
    return np.array([[len(t), t.count("a"), 1.0] for t in texts])


def build(captioner, generator=paint, **options):
    labels = ["cat", "cat", "dog", "dog"]
    return build_caption_support(list("wxyz"), labels, captioner, generator, encode, encode_texts, **options)


def test_support_cycles_through_captions():
    support = build(lambda image: f"a {image}", images_per_class=3)
    assert support.prompts[:3] == ["A photo of cat. a w", "A photo of cat. a x", "A photo of cat. a w"]
    assert support.labels.tolist() == ["cat"] * 3 + ["dog"] * 3 and support.failures == []
    assert np.allclose(np.linalg.norm(support.image_features, axis=1), 1)
    assert np.allclose(support.caption_features, unit(encode_texts(support.prompts)))
    clf = MAdapterClassifier().fit(
        support.image_features, support.labels, caption_features=support.caption_features
    )
    assert list(clf.classes_) == ["cat", "dog"]
    country = build(str, template="In {name}. {caption}", images_per_class=1)
    assert country.prompts == ["In cat. w", "In dog. y"]


def test_a_captioner_that_fails_costs_its_image():
    def captioner(image):
        if image == "w":
            raise RuntimeError("out of words")
        return {"x": "fine", "y": " ", "z": ""}[image]

    support = build(captioner, images_per_class=2)
    assert support.prompts == ["A photo of cat. fine"] * 2 + ["A photo of dog."] * 2
    assert [(f["stage"], f["input"], f["reason"]) for f in support.failures] == [
        ("captioner", 0, "RuntimeError: out of words"),
        ("captioner", 2, "it said nothing"),
        ("captioner", 3, "it said nothing"),
    ]
    silent = build(lambda image: 7, images_per_class=1)
    assert "a captioner returns text, not int" in silent.failures[0]["reason"]


def test_images_that_cannot_be_used_are_tried_again():
    calls = itertools.count()

    def generator(prompt):
        call = next(calls)
        if call == 0:
            return np.zeros((4, 4, 3))
        if call == 1:
            raise MemoryError("too large")
        return paint(prompt)

    support = build(str, generator, images_per_class=2)
    assert len(support.images) == 4 and [f["reason"] for f in support.failures] == [
        "black, or of one colour",
        "MemoryError: too large",
    ]
    with pytest.raises(ValueError, match=r"no image of class 'cat' in 4 tries: black"):
        build(str, lambda prompt: np.ones((4, 4, 3)), images_per_class=2, max_tries=2)
    with pytest.raises(ValueError, match="no picture"):
        build(str, lambda prompt: [], images_per_class=1)


@pytest.mark.parametrize(
    "said",
    ["a cat", [{"generated_text": "a cat"}], [[{"generated_text": " a  cat\n"}]], {"generated_text": "a cat"},
     [{"generated_text": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]}]],
)  # fmt: skip
def test_what_transformers_pipelines_say_is_understood(said):
    assert build(lambda image: said, images_per_class=1).prompts[0] == "A photo of cat. a cat"


def test_what_diffusers_pipelines_give_is_understood():
    from PIL import Image

    picture = Image.fromarray((paint("x") * 255).astype(np.uint8))
    made = types.SimpleNamespace(images=[picture], nsfw_content_detected=None)
    support = build(str, lambda prompt: made, images_per_class=1)
    assert support.images == [picture, picture]


def test_what_cannot_be_asked_for():
    for arguments, message in (
        ({"images_per_class": 0}, "images_per_class=0"),
        ({"template": "a photo"}, "template='a photo': it needs"),
    ):
        with pytest.raises(ValueError, match=message):
            build(str, **arguments)
    with pytest.raises(ValueError, match="labels has 1 entries for 2 images"):
        build_caption_support([1, 2], ["a"], str, paint, encode, encode_texts)
    with pytest.raises(ValueError, match="empty name"):
        build_caption_support([1], [""], str, paint, encode, encode_texts)
