"""The world of novel domains: texts, shares, the private step, the detector."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from torch import nn

from unfused.claims.lab import Lab, text
from unfused.claims.lab import novel_domains as world


@pytest.fixture(scope="module")
def lab():
    return Lab("smoke")


def test_texts_of_each_domain(lab):
    for domain in (*world.DOMAINS, world.ORDINARY):
        some = world.domain_texts(lab, domain, 5, seed=1)
        assert some == world.domain_texts(lab, domain, 5, seed=1) and len(set(some)) > 1
    for line in world.domain_texts(lab, "sums", 5, seed=1):
        for part in line.split(" ; "):
            a, b, c = (int(x) for x in part.replace("+", " ").replace("=", " ").split())
            assert a + b == c
    assert base64.b64decode(world.domain_texts(lab, "base64", 1, seed=1)[0])


def test_a_tenth_is_novel(lab):
    rows = world.tuning_rows(lab, seed=0, count=200)
    words = text.tokenizer(lab)
    said = [words.decode(ids, skip_special_tokens=True) for ids in rows["input_ids"]]
    assert len(said) == 200
    ordinary = set(world.domain_texts(lab, world.ORDINARY, 180, 0))
    assert sum(any(s.strip() == o[: len(s.strip())] for o in ordinary) for s in said) >= 175
    assert bool(((rows["labels"] == -100) == (rows["attention_mask"] == 0)).all())


def test_private_step_clips_each_row():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return type("Out", (), {"loss": (x @ self.w).sum()})

    model = Line()
    rows = {"x": torch.tensor([[30.0, 40.0], [0.3, 0.0]])}
    found = world.private_step(model, dict(model.named_parameters()), rows, 0.0, torch.Generator())
    assert torch.allclose(found["w"], torch.tensor([0.6 + 0.3, 0.8]) / 2)
    many = [
        world.private_step(
            model, dict(model.named_parameters()), rows, 2.0, torch.Generator().manual_seed(i)
        )["w"]
        for i in range(300)
    ]
    assert np.isclose(torch.stack(many).std(0).mean(), 1.0, atol=0.1)


def test_the_detector_knows_the_domains(lab):
    found = world.detector(lab)
    kinds = ("sums", "code", "alarm")
    texts = [world.domain_texts(lab, kind, 4, seed=9)[0] for kind in kinds]
    assert found(texts) == list(kinds) and found([""]) == [world.ILL] and found([]) == []
