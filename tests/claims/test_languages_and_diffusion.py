"""The worlds of LT-SFT (two languages) and SaRA (a diffusion model of digits), at smoke scale."""

from __future__ import annotations

import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab import diffusion as d
from unfused.claims.lab import languages as la


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("lab"))


def test_translation_is_fixed_and_shares_names():
    sentence = "Return the value of `os.environ`, or 42 if it is not set."
    translated = la.translate(sentence)
    assert translated == la.translate(sentence) != sentence
    assert "`os.environ`" in translated and "42" in translated
    first = translated.split(",")[0].split()
    assert first[-1].strip("`") != "os.environ" and la._pseudo("return") in translated, "the verb comes last"
    words = [
        f"word{a}{b}".translate(str.maketrans("0123456789", "abcdefghij"))
        for a in range(20)
        for b in range(20)
    ]
    changed = sum(la._pseudo(word) != word for word in words) / len(words)
    assert 0.6 < changed < 0.8
    assert la._pseudo("readed")[-3:] == "ost" or la._pseudo("readed") == "readed"


def test_languages_share_no_module(lab):
    a, b = la.corpus(lab)
    assert a and b
    assert not {la.translate(sentence) for sentence in a} & set(b)
    task, in_b = la.transfer_task(lab, 0, 40)
    assert torch.equal(task.test["labels"], in_b["labels"])
    assert not torch.equal(task.test["input_ids"], in_b["input_ids"])
    assert len(task.train["labels"]) == 40
    assert la.bilingual_classifier(lab, 8)(**task.valid).logits.shape == (16, 8)


def test_schedule_and_drawing(lab):
    share = d.signal_share()
    assert (share.diff() < 0).all() and share[0] > 0.99 and share[-1] < 0.01
    model = d.denoiser(lab)
    labels = torch.tensor([0, 5])
    assert torch.equal(d.draw(model, labels, seed=1, steps=3), d.draw(model, labels, seed=1, steps=3))
    assert d.draw(model, labels).abs().max() <= 1


def test_drawing_with_a_perfect_denoiser_gives_the_picture():
    picture = torch.rand(2, 64) * 2 - 1

    class Oracle(torch.nn.Module):
        def forward(self, x, labels, t):
            share = d.signal_share()[t][:, None]
            return type("Out", (), {"sample": (x - share.sqrt() * picture) / (1 - share).sqrt()})

    torch.testing.assert_close(d.draw(Oracle(), torch.tensor([0, 1])), picture, atol=1e-4, rtol=1e-4)


def test_style_and_quality(lab):
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 3, 3] = 1
    assert (1 - d.bold(images)).sum() == 4
    world = d.style_world(lab)
    task = world.task(0)
    assert len(task.train["labels"]) == 20 and set(task.train["labels"].tolist()) == set(range(5))
    assert not torch.equal(task.train["images"], world.task(1).train["images"])
    found = world.evaluate(d.denoiser(lab), task)
    assert found["fit"] == 0 and 0 <= found["prior"] <= 1 and found["distance"] > 0
