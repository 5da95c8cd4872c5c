"""Unsupervised prompt learning: the estimators, demonstrations, budget, failures, and boxes of known optimum."""

from __future__ import annotations

import asyncio
import json
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.base import clone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from unfused.label import BlackBoxPromptLearner, LMBlackBox, Query
from unfused.label._demonstrations import Demonstrations, text_key
from unfused.label._prompt_policy import SimplexPolicy, SoftmaxPolicy, bdpl_gradient, project_simplex
from unfused.nn.black_box import BlackBox

# -- the prompt's distribution -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(arrays(float, (3, 5), elements=st.floats(-3, 3)))
def test_projection_is_the_bisection_s(rows):
    found = project_simplex(rows)
    low, high = rows.min(1, keepdims=True) - 1, rows.max(1, keepdims=True)
    for _ in range(60):
        v = (low + high) / 2
        above = np.clip(rows - v, 0, 1).sum(1, keepdims=True) > 1
        low, high = np.where(above, v, low), np.where(above, high, v)
    assert np.allclose(found, np.clip(rows - (low + high) / 2, 0, 1), atol=1e-9)
    assert np.allclose(found.sum(1), 1)
    assert np.allclose(project_simplex(found), found)


def test_bdpl_s_gradient_is_the_published_one_and_twice_the_score_function():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=3)
    z, losses = rng.integers(5, size=(7, 3)), rng.random(7)
    naive, score = np.zeros_like(p), np.zeros_like(p)
    for k in range(7):
        d = -1 / p
        d[range(3), z[k]] *= -1
        naive += (losses[k] - losses.mean()) / 6 * d
        one = np.zeros_like(p)
        one[range(3), z[k]] = 1 / p[range(3), z[k]]
        score += (losses[k] - np.delete(losses, k).mean()) / 7 * one  # leave-one-out
    assert np.allclose(bdpl_gradient(p, z, losses), naive)
    assert np.allclose(naive, 2 * score)


def test_reinforce_s_step_is_the_leave_one_out_one():
    rng = np.random.default_rng(0)
    policy = SoftmaxPolicy(3, 5, lr=0.7)
    policy.logits = rng.normal(size=(3, 5))
    p, before = policy.probabilities(), policy.logits.copy()
    z, losses = policy.sample(6, rng), rng.random(6)
    gradient = np.zeros((3, 5))
    for k in range(6):
        one = np.eye(5)[z[k]] - p  # d log P(z) / d logits
        gradient += (losses[k] - np.delete(losses, k).mean()) / 6 * one
    policy.step(z, losses)
    assert np.allclose(before - policy.logits, 0.7 * gradient / losses.std())


@pytest.mark.parametrize("kind", [SoftmaxPolicy, SimplexPolicy])
def test_a_policy_finds_the_best_tokens(kind):
    rng = np.random.default_rng(0)
    policy = kind(2, 12, 5.0 if kind is SoftmaxPolicy else 0.01)
    for _ in range(60):
        z = policy.sample(8, rng)
        policy.step(z, 2.0 - (z == [3, 7]).sum(1) + 0.1 * rng.normal(size=8))
    p = policy.probabilities()
    assert p.argmax(1).tolist() == [3, 7] and np.allclose(p.sum(1), 1) and (p >= 0).all()


def test_samples_follow_the_probabilities():
    policy = SimplexPolicy(1, 3, 0.01)
    policy.p = np.array([[0.7, 0.0, 0.3]])
    z = policy.sample(2000, np.random.default_rng(0))
    assert np.bincount(z[:, 0], minlength=3)[1] == 0 and abs((z == 0).mean() - 0.7) < 0.05


# -- demonstrations ------------------------------------------------------------------------------------------------------


def test_demonstrations_are_the_nearest_without_the_text_itself():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    texts = [f"text {i}" for i in range(29)] + ["TEXT  3"]  # the last is a duplicate
    pool = Demonstrations(texts, np.arange(30) % 3, features, "knn", 4)
    assert len(pool.texts) == 29
    for i, demos in enumerate(pool.choose(texts, features, rng)):
        near = features[:29] @ features[i]
        near[[k for k in range(29) if text_key(texts[k]) == text_key(texts[i])]] = -np.inf
        assert [text for text, _ in demos] == [texts[k] for k in np.argsort(near)[-4:]]
    assert Demonstrations(texts, np.zeros(30, int), None, "random", 0).choose(["a"], None, rng) == [()]


def test_random_demonstrations_are_balanced():
    rng = np.random.default_rng(0)
    texts, labels = [f"t{i}" for i in range(20)], np.array([0] * 16 + [1] * 4)
    pool = Demonstrations(texts, labels, None, "random", 4)
    for text, demos in zip(texts, pool.choose(texts, None, rng), strict=True):
        assert len(set(demos)) == 4 and text not in [shown for shown, _ in demos]
        assert sorted(label for _, label in demos) == [0, 0, 1, 1]
    few = Demonstrations(texts[:2], labels[:2], None, "random", 4).choose(["t0", "other"], None, rng)
    assert few[0] == (("t1", 0),) and len(few[1]) == 2


# -- the box -------------------------------------------------------------------------------------------------------------


def test_queries_are_asked_once_within_the_budget():
    asked = []

    def function(queries):
        asked.extend(queries)
        return [[q, 1] for q in queries]

    box = BlackBox(function, 2, budget=5, batch_size=2)
    assert np.allclose(box([1, 3, 1, 1])[:, 0], [0.5, 0.75, 0.5, 0.5]) and asked == [1, 3]
    found = box([1, 2, 4, 5, 6])
    assert box.n_calls == 5 and box.spent and np.isnan(found[4]).all() and np.isfinite(found[:4]).all()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda q: 1 / 0, "ZeroDivisionError"),
        (lambda q: np.ones((len(q), 3)), "shape"),
        (lambda q: [[np.nan, 1]] * len(q), "no probability"),
        (lambda q: [[-1, 2]] * len(q), "no probability"),
        (lambda q: [[0, 0]] * len(q), "no probability"),
        (lambda q: "rubbish", "could not convert|shape"),
        (lambda q: time.sleep(0.5), "TimeoutError"),
    ],
)
def test_failures_count_are_tried_again_and_given_up(answer, error):
    box = BlackBox(answer, 2, budget=100, timeout=0.02, retries=1, patience=2)
    assert np.isnan(box(["a", "b"])).all() and box.n_calls == 4 and box.n_failed == 2
    assert re.search(error, box.error) and not box.down
    box(["c"])
    assert box.down
    calls = box.n_calls
    box(["d"])
    assert box.n_calls == calls


def test_a_second_try_and_async_functions():
    tries = []

    async def function(queries):
        tries.append(len(queries))
        await asyncio.sleep(0)
        if len(tries) == 1:
            raise ConnectionError
        return np.array([[1.0, np.nan if q == "bad" else 3.0] for q in queries])

    box = BlackBox(function, 2)
    found = box(["a", "bad"])
    assert found[0].tolist() == [0.25, 0.75] and np.isnan(found[1]).all() and tries == [2, 2]

    async def inside():
        return box(["b"])

    assert asyncio.run(inside()).tolist() == [[0.25, 0.75]]


# -- the learner ---------------------------------------------------------------------------------------------------------

SIGNS = ["fine", "poor"]


def world(n=60, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    texts = [f"{SIGNS[c]} w{rng.integers(9)} w{rng.integers(9)} n{i}" for i, c in enumerate(y)]
    return texts, y


def function(queries):
    """Knows the class better for every "key" in the prompt and every demonstration with the same sign; leans to class 0."""
    rows = []
    for q in queries:
        sign = SIGNS.index(q.text.split()[0]) if q.text.split()[0] in SIGNS else None
        help_ = 0.5 * q.prompt.count("key") + 0.4 * sum(
            (text.split()[0] == SIGNS[label]) and label == sign for text, label in q.demos
        )
        noise = ((len(q.text) * 7 + sum(map(ord, q.text))) % 13 / 13 - 0.5) * 1.6
        margin = 0.7 + noise + (0 if sign is None else (0.3 + help_) * (1 - 2 * sign))
        rows.append([1 / (1 + np.exp(-margin)), 1 / (1 + np.exp(margin))])
    return rows


VOCAB = ["key", *(f"v{i}" for i in range(7))]


def learner(**options):
    return BlackBoxPromptLearner(
        function,
        ["good", "bad"],
        **{"vocab": VOCAB, "prompt_length": 2, "n_demos": 2, "random_state": 0, **options},
    )


@pytest.mark.parametrize("estimator", ["reinforce_loo", "bdpl"])
def test_it_learns_prompt_and_labels(estimator):
    texts, y = world()
    found = learner(
        estimator=estimator, budget=6000, rounds=8, lr=None if estimator == "reinforce_loo" else 0.05
    )
    found.fit(texts)
    zero = np.argmax(function([Query(text) for text in texts]), 1)
    assert "key" in found.prompt_ and (found.pseudo_labels_ == y).mean() > (zero == y).mean() + 0.1
    assert found.n_calls_ <= 6000 and np.allclose(found.probabilities_.sum(1), 1)
    fresh, truth = world(seed=1)
    assert (found.predict(fresh) == np.array(["good", "bad"])[truth]).mean() > 0.8
    assert found.score(fresh, np.array(["good", "bad"])[truth]) > 0.8
    again = clone(found).fit(texts)
    assert again.prompt_ == found.prompt_ and np.array_equal(again.pseudo_labels_, found.pseudo_labels_)


def test_the_budget_is_kept_and_leaves_labels():
    texts, _ = world()
    for budget in (10, 60, 100, 700):
        found = learner(budget=budget).fit(texts)
        assert found.n_calls_ <= budget and found.stop_reason_ == "budget"
        assert (found.pseudo_labels_ >= 0).sum() == min(budget, 60)
    assert found.history_ and found.predict(texts[:3]).shape == (3,)


def test_every_sampled_prompt_meets_the_same_texts_and_demonstrations():
    texts, _ = world()
    asked = []

    def spy(queries):
        asked.extend(queries)
        return function(queries)

    for shown in (True, False):
        asked.clear()
        found = learner(train_with_demos=shown, rounds=1, steps=1, batch_size=5, n_samples=3)
        found.set_params(black_box=spy).fit(texts)
        training = [q for q in asked if q.prompt and len(q.prompt) == 2][:15]
        by_prompt: dict = {}
        for query in training:
            by_prompt.setdefault(query.prompt, []).append((query.text, query.demos))
        assert len({tuple(sorted(v)) for v in by_prompt.values() if len(v) == 5}) == 1
        assert all(bool(q.demos) == shown for q in training)
        assert all(q.text not in [text for text, _ in q.demos] for q in asked)


def test_a_broken_box_leaves_what_was_learned():
    texts, _ = world()
    calls = []

    def dies(queries):
        calls.append(1)
        if len(calls) > 4:
            raise ConnectionError("gone")
        return function(queries)

    found = learner().set_params(black_box=dies)
    with pytest.warns(UserWarning, match="unanswered: ConnectionError: gone"):
        found.fit(texts)
    assert "failed 3 times" in found.stop_reason_ and (found.pseudo_labels_ >= 0).all()
    with pytest.warns(UserWarning, match="unanswered"):
        assert np.allclose(found.predict_proba(["fine day"]), 0.5)
    with pytest.raises(RuntimeError, match="answered none"):
        learner().set_params(black_box=lambda queries: None).fit(texts)


@pytest.mark.parametrize("calibration", ["content-free", "batch"])
def test_calibration_takes_the_lean_away(calibration):
    texts, y = world()
    plain = learner(vocab=(), n_demos=0, rounds=0).fit(texts)
    fair = learner(vocab=(), n_demos=0, rounds=0, calibration=calibration).fit(texts)
    assert np.bincount(fair.pseudo_labels_)[1] > np.bincount(plain.pseudo_labels_)[1]
    assert (fair.pseudo_labels_ == y).mean() > (plain.pseudo_labels_ == y).mean()
    assert fair.prior_[0] > fair.prior_[1]
    whole = learner(calibration=calibration, budget=2000).fit(texts)
    assert whole.n_calls_ <= 2000 and (whole.pseudo_labels_ == y).mean() > 0.8


def test_known_labels_stay_and_every_class_has_demonstrations(tmp_path):
    texts, y = world()
    names = np.array(["good", "bad"])
    known = [names[1 - y[0]], names[y[1]], *[-1] * 58]
    found = learner(rounds=2).fit(texts, known)
    assert found.pseudo_labels_[0] == 1 - y[0] and found.confidence_[:2].tolist() == [1, 1]
    assert found.confident_[:2].all()
    always = learner(rounds=1).set_params(black_box=lambda queries: [[0.9, 0.1]] * len(queries)).fit(texts)
    assert np.bincount(always.pseudo_labels_[always.confident_], minlength=2)[1] == 2
    rows = found.to_dataset()
    assert len(rows) == 60 and rows[0] == {"text": texts[0], "label": known[0], "confidence": 1.0}
    found.export(tmp_path / "rows.jsonl", confident=True)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == found.confident_.sum() and json.loads(lines[0])["label"] in names


def test_it_ends_when_nothing_changes():
    found = learner(vocab=()).fit(world()[0])
    assert found.stop_reason_ == "converged" and found.prompt_ == () and found.probabilities_.shape == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": None}, "classes is missing"),
        ({"classes": ["a", "a"]}, "two different names"),
        ({"classes": ["a", " "]}, "a name is empty"),
        ({"black_box": None}, "black_box is missing"),
        ({"estimator": "adam"}, "estimator='adam'"),
        ({"demo_selector": "far"}, "demo_selector='far'"),
        ({"calibration": "yes"}, "calibration='yes'"),
        ({"n_samples": 1}, "n_samples=1"),
        ({"confident_share": 0}, "confident_share=0"),
        ({"budget": 0}, "budget=0"),
        ({"n_demos": -1}, "n_demos=-1"),
        ({"vocab": ["a", "a"]}, "token twice"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        learner().set_params(**options).fit(world(6)[0])


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([], None, "0 samples"),
        ("text", None, "one string"),
        (["a", None], None, r"X\[1\] is None"),
        (["", " "], None, "only empty"),
        (["a", "b"], ["good"], "1 labels for 2"),
        (["a", "b"], ["good", "so-so"], "so-so"),
    ],
)
def test_bad_texts(X, y, message):
    with pytest.raises(ValueError, match=message):
        learner().fit(X, y)


# -- language models -----------------------------------------------------------------------------------------------------

WORDS = "[UNK] [PAD] [MASK] [SEP] It was good bad very a film plot hint".split()


@pytest.fixture(scope="module")
def tokenizer():
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )


def causal():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=40, initializer_range=0.5
    )
    return GPT2LMHeadModel(config).eval()


QUERIES = [
    Query("a film"),
    Query("film", ("hint", "very")),
    Query("plot", ("hint",), (("a film", 1), ("plot", 0))),
]


def test_a_causal_model_s_probabilities_are_those_of_the_next_word(tokenizer):
    model, box = causal(), LMBlackBox(causal(), tokenizer, ["bad", "good"], batch_size=2)
    texts = ["a film It was", "hint very film It was", "hint a film It was good plot It was bad plot It was"]
    assert [box.render(q) for q in QUERIES] == texts
    with torch.no_grad():
        for row, text in zip(box(QUERIES), texts, strict=True):
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1, [7, 6]]
            assert np.allclose(row, logits.softmax(-1), atol=1e-5)


def test_words_of_several_tokens_are_multiplied(tokenizer):
    model, box = causal(), LMBlackBox(causal(), tokenizer, ["very bad", "good"])
    with torch.no_grad():
        ids = torch.tensor([tokenizer("a film It was very bad")["input_ids"]])
        log_p = model(ids).logits[0].log_softmax(-1)
        scores = torch.stack([log_p[3, 8] + log_p[4, 7], log_p[3, 6]])
    assert np.allclose(box(QUERIES)[0], scores.softmax(-1), atol=1e-5)


def test_a_masked_model_answers_at_its_mask(tokenizer):
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=40, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    box = LMBlackBox(model, tokenizer, ["bad", "good"], template="{prompt} {demos} {x} It was {mask}")
    text = "hint a film It was good plot It was bad plot It was [MASK]"
    assert box.render(QUERIES[2]) == text
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1, [7, 6]]
    assert np.allclose(box(QUERIES)[2], logits.softmax(-1), atol=1e-5)
    found = BlackBoxPromptLearner(
        box, vocab=["hint", "very"], prompt_length=1, rounds=1, n_samples=2, n_demos=1
    )
    found.fit(["a film", "film plot", "plot", "very film", "a plot"])
    assert found.classes_.tolist() == ["bad", "good"] and clone(found).black_box is box


def test_what_is_too_long_loses_demonstrations_then_text(tokenizer):
    box = LMBlackBox(causal(), tokenizer, ["bad", "good"], max_length=8)
    (ids,) = box._encode([QUERIES[2]])
    assert tokenizer.decode(ids) == "hint plot It was"
    (ids,) = box._encode([Query("film " * 90)])
    assert len(ids) <= 7 and tokenizer.decode(ids).endswith("It was")


def test_a_language_model_s_box_refuses_what_it_cannot_use(tokenizer):
    for template in ("{x} It was", "{x} {demos} {prompt}", "{prompt} {demos}"):
        with pytest.raises(ValueError, match="template="):
            LMBlackBox(causal(), tokenizer, ["bad", "good"], template=template)
    with pytest.raises(ValueError, match="at least two"):
        LMBlackBox(causal(), tokenizer, ["bad"])
    for words in (["bad", "unheard"], ["bad", "bad"]):
        with pytest.raises(ValueError, match="class_words"):
            LMBlackBox(causal(), tokenizer, words)
