"""Small classes with planted flaws: counts, what is planted, pretraining that never sees the test samples, fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab import flawed_classes as world


@pytest.fixture(scope="module")
def lab():
    return Lab("smoke")


def test_digits():
    data = world.digits_with_flaws(2)
    assert data.train["x"].shape == (164, 64) and len(data.test["x"]) > 300
    assert [int((data.flaw == f).sum()) for f in world.FLAWS] == [5, 5, 5]
    true = np.repeat(np.arange(3), world.SIZES)
    assert ((data.train["labels"].numpy() != true) == (data.flaw == "label")).all()
    halves = data.train["x"][torch.from_numpy(data.flaw == "half")].view(-1, 8, 8)
    assert not halves[:, 4:].any() and halves[:, :4].any()
    other = world.digits_with_flaws(2)
    assert torch.equal(data.train["x"], other.train["x"]) and (data.flaw == other.flaw).all()
    clean = data.train["x"][torch.from_numpy(data.flaw == "")]
    assert torch.cdist(clean, data.test["x"]).min() > 0  # none is in both


def test_sentences(lab):
    data = world.sentences_with_flaws(lab, 1)
    assert len(data.train["labels"]) == len(data.flaw) == 164 and set(data.test["labels"].tolist()) <= {
        0,
        1,
        2,
    }
    lengths = data.train["attention_mask"].sum(1).numpy()
    assert lengths[data.flaw == "half"].mean() < lengths[data.flaw == ""].mean()


def test_pretraining_differs_and_a_new_head_does_not(lab):
    models = {arm: world.digit_encoder(lab, 0, arm) for arm in world.PRETRAINED}
    heads = [m.classifier.weight for m in models.values()]
    assert all(torch.equal(heads[0], head) for head in heads)
    weights = [m.layers[0][0].weight for m in models.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[i + 1 :])


def test_fine_tuning_leaves_the_encoder_and_keeps_epochs(lab):
    encoder, data = world.digit_encoder(lab, 0, "domain"), world.digits_with_flaws(0)
    before = encoder.classifier.weight.clone()
    course = world.fine_tune(encoder, data, epochs=3, lr=1e-3, seed=0, keep=(1, 2))
    assert torch.equal(encoder.classifier.weight, before) and list(course.checkpoints) == [1.0, 2.0]
    assert course.logits.shape == (3, 164, 3) and course.predicted.shape == (3, len(data.test["labels"]))
    again = world.fine_tune(encoder, data, epochs=3, lr=1e-3, seed=0)
    assert np.array_equal(course.logits, again.logits)
