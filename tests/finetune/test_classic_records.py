"""Classic for texts and for rows of a table: what is chosen, and that the shortcut is exact."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

import unfused.finetune._classic_text as module
from unfused.finetune import ClassicTable, ClassicText
from unfused.finetune._classic_text import _rotate, tf_idf

ANIMALS = {"cats": "cat purr whisker kitten milk".split(), "cars": "engine wheel road driver fuel".split()}


def texts(count: int = 40, seed: int = 0) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.array([list(ANIMALS)[k % 2] for k in range(count)])
    return [" ".join(rng.choice(ANIMALS[label], 5)) + f" {k}" for k, label in enumerate(labels)], labels


def test_rotation_keeps_every_inner_product():
    x = tf_idf("both").fit_transform(texts()[0])
    rotated, rotation = _rotate(x, 0)
    np.testing.assert_allclose(rotated @ rotated.T, (x @ x.T).toarray(), atol=1e-5)
    np.testing.assert_allclose(x @ rotation, rotated, atol=1e-4)
    assert rotated.shape[1] <= 40


def test_the_same_as_the_regression_on_all_features():
    known, labels = texts()
    unseen, _ = texts(seed=1)
    model = ClassicText("words").fit(known, labels)
    vectorizer = tf_idf("words").fit(known)
    plain = LogisticRegression(C=model.penalty_, max_iter=3000, tol=1e-8).fit(
        vectorizer.transform(known), labels
    )
    np.testing.assert_allclose(
        model.predict_proba(unseen), plain.predict_proba(vectorizer.transform(unseen)), atol=2e-3
    )
    assert (model.predict(unseen) == texts(seed=1)[1]).mean() > 0.9


def test_choice_of_representation(monkeypatch):
    rng = np.random.default_rng(0)
    stems = [f"{a}{b}o" for a in "bdfgk" for b in "aeiu"]
    words = [rng.choice(stems) + ("ing" if k % 2 else "ed") + f"{k}" for k in range(60)]  # the ending tells
    model = ClassicText().fit(words, np.arange(60) % 2)
    assert model.representation_ in ("characters", "both") and set(model.losses_) == {
        "words",
        "characters",
        "both",
    }
    assert model.losses_[model.representation_] == min(model.losses_.values())
    many, labels = texts(120)
    monkeypatch.setattr(module, "EXACT", 100)
    monkeypatch.setattr(module, "MANY", 50)
    assert (ClassicText().fit(many, labels).predict(many) == labels).mean() > 0.9


def test_few_texts_and_bad_ones():
    two = ClassicText().fit(["red", "green"], [0, 1])
    assert two.predict(["red", "", "nothing known"]).shape == (3,)
    assert ClassicText().fit(
        ["red"] * 3 + ["green"] * 3, [0, 0, 0, 1, 1, 1], groups=[0, 1, 2] * 2
    ).classes_.tolist() == [0, 1]
    assert two.predict_proba([]).shape == (0, 2)
    assert clone(ClassicText("words", seed=3)).get_params() == {"representation": "words", "seed": 3}
    for X, y, message in (
        (["a", "b"], [0, 0], "one class only"),
        (["a", "b"], [0], "2 texts for 1 labels"),
        (["", " "], [0, 1], "holds no words"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassicText().fit(X, y)
    with pytest.raises(ValueError, match="representation='letters'"):
        ClassicText("letters").fit(["a", "b"], [0, 1])


def table(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4))
    x[:, 3] = rng.integers(0, 5, count)
    x[rng.random(x.shape) < 0.05] = np.nan
    x[:, 3] = np.nan_to_num(x[:, 3])
    return x


def test_trees_where_the_truth_is_no_plane():
    x = table(200)
    x[:, :2] = np.nan_to_num(x[:, :2])
    crossed = (x[:, 0] * x[:, 1] > 0).astype(int)
    model = ClassicTable(names=[3]).fit(x, crossed)
    assert model.representation_ == "gradient boosting"
    assert model.losses_["gradient boosting"] < model.losses_["logistic regression"]
    assert (model.predict(x) == crossed).mean() > 0.9


def test_a_plane_where_it_is_one():
    x = table(80)
    flat = np.nan_to_num(x[:, 0]) + 0.5 * np.nan_to_num(x[:, 1]) > 0
    model = ClassicTable(names=[3]).fit(x, np.where(flat, "yes", "no"))
    assert model.representation_ == "logistic regression" and model.classes_.tolist() == ["no", "yes"]
    unseen = table(50, seed=1)
    unseen[0, 3] = 77  # a name that was not there
    probabilities = model.predict_proba(unseen)
    assert probabilities.shape == (50, 2) and np.allclose(probabilities.sum(1), 1)


def test_one_label_a_class_and_many_columns():
    x = np.random.default_rng(0).normal(size=(2, 3))
    assert ClassicTable().fit(x, [0, 1]).predict(x).tolist() == [0, 1]
    wide = np.random.default_rng(0).normal(size=(12, 2500))
    assert set(ClassicTable().fit(wide, np.arange(12) % 2).losses_) == {"logistic regression"}
    few = table(40)  # too few for folds to tell regression from trees, unless trees are asked for
    assert set(ClassicTable().fit(few, np.arange(40) % 2).losses_) == {"logistic regression"}
    trees = ClassicTable(representation="gradient boosting").fit(few, np.arange(40) % 2)
    assert trees.predict(few).shape == (40,)
    with pytest.raises(ValueError, match="one class only"):
        ClassicTable().fit(x, [0, 0])
    with pytest.raises(ValueError, match=r"X of shape \(2, 3\) with 3 labels"):
        ClassicTable().fit(x, [0, 1, 1])
    with pytest.raises(ValueError, match="representation='svm'"):
        ClassicTable(representation="svm").fit(x, [0, 1])
