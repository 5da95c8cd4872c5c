"""The worlds of the text claims of `label`: reviews and their cloze tasks, rules and topics in context."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.claims.lab import Lab, in_context, reviews
from unfused.label import PromptTemplate, Query


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("lab"))


def test_a_review_s_class_is_its_judgements():
    texts, labels = reviews.reviews(200, seed=1)
    good, bad = {*reviews.GOOD, *reviews.LIKED}, {*reviews.BAD, *reviews.DISLIKED}
    for text, label in zip(texts, labels, strict=True):
        words = text.split()
        found = []
        for before, word in zip(["", *words], words, strict=False):
            if word in good | bad:
                found.append((word in good) != (before == "not"))
        assert len(found) == 2 and sum(found) == label
    assert reviews.reviews(200, seed=1)[0] == texts and reviews.reviews(200, seed=2)[0] != texts


@pytest.mark.parametrize("name", reviews.TASKS)
def test_a_draw_keeps_its_parts_apart(lab, name):
    draw = reviews.task(lab, name, seed=0, n=10, junk=0.25)
    template = PromptTemplate(draw.template, draw.verbalizer)
    assert len(template.token_ids(reviews.tokenizer(lab))) == len(draw.verbalizer)
    parts = [{row["text"] for row in rows} for rows in (draw.labeled, draw.unlabeled, draw.test)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]
    counts = np.bincount([row["label"] for row in draw.labeled])
    assert len(draw.labeled) == 10 and counts.max() - counts.min() <= 1
    assert sum(row["label"] is None for row in draw.unlabeled) == 6 == 0.25 * len(draw.unlabeled)
    clean = reviews.task(lab, name, seed=0, n=10)
    assert [row["text"] for row in clean.labeled] == [row["text"] for row in draw.labeled]


def test_rules_give_the_labels_that_their_names_say():
    rng = np.random.default_rng(0)
    x = rng.integers(16, size=(50, 3, 6))
    for rule, name in enumerate(in_context.RULES):
        for row, label in zip(x.reshape(-1, 6), in_context.rule_labels(rule, x).ravel(), strict=True):
            bits = [[(s >> j) & 1 for s in row] for j in range(4)]
            if "majority" in name:
                b = bits[int(name[-1])]
                expected = b[0] if sum(b) == 3 else sum(b) > 3
                expected = not expected if name.startswith("no") else expected
            elif name.startswith("attribute") and "half" not in name:
                expected = bits[int(name.split()[1])][0 if name.endswith("first") else -1]
            elif "half" in name:
                one, two = sum(bits[0][:3]), sum(bits[0][3:])
                expected = bits[0][0] if one == two else one > two
            else:
                expected = bits[1][0] == bits[1][-1]
            assert label == int(expected), name
    mixed = in_context.rule_labels(np.arange(50) % 12, x)
    assert all(np.array_equal(mixed[i], in_context.rule_labels(i % 12, x)[i]) for i in range(50))


def test_the_decoder_s_box_does_not_depend_on_the_batch(lab):
    problem = in_context.rules_problem(lab, 0, "mixed")
    demos = tuple(
        (text, int(label)) for text, label in zip(problem.texts[1:4], problem.labels[1:4], strict=True)
    )
    queries = [Query(problem.texts[0], problem.initial_prompt, demos), Query(problem.texts[5])]
    both = problem.box(queries)
    assert np.allclose(both[0], problem.box(queries[:1])[0], atol=1e-5)
    assert np.allclose(both[1], problem.box(queries[1:])[0], atol=1e-5) and np.allclose(both.sum(1), 1)
    assert len(problem.vocab) == len(set(problem.vocab)) == 48
    assert not set(problem.initial_prompt[:2]) & set(problem.vocab)
    ids = in_context._sequences(4, seed=1)
    assert ids["input_ids"].shape == (4, in_context.LENGTH) and (ids["labels"] >= 0).sum() == 4 * 9
    assert torch.equal(ids["labels"][:, 4::7] >= 0, torch.zeros(4, 9, dtype=torch.bool))


def test_the_cosines_box_hears_prompt_and_demonstrations(lab):
    problem = in_context.topics_problem(lab, 0)
    plain = problem.box([Query(problem.texts[0])])[0]
    said = problem.box([Query(problem.texts[0], (), ((problem.texts[0], 2),))])[0]
    assert said[2] > plain[2] and not np.allclose(
        plain, problem.box([Query(problem.texts[0], problem.vocab[:3])])[0]
    )
    assert not set(problem.texts) & set(problem.test)
