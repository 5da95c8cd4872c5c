from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab import glyphs as g


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("lab"))


def test_every_font_has_every_character_and_none_is_cut():
    ink = g._stencils().float() / 255
    assert ink.shape == (62, 21, 40, 40) and ink.mean((2, 3)).min() > 0.02
    assert ink[:, :, 0].max() == ink[:, :, :, 0].max() == 0
    one = ink[:, 0].flatten(1)
    assert (torch.cdist(one, one) + 99 * torch.eye(62)).min() > 0.5  # no two characters look the same
    assert all(len(np.unique(row.numpy(), axis=0)) == 21 for row in ink[3].flatten(1)[None])


def test_pictures_are_seeded_and_the_target_is_harder_to_read():
    labels = torch.arange(60) % 10
    clean = g.glyphs(labels, 1)
    assert clean.shape == (60, 1, 20, 20) and torch.equal(clean, g.glyphs(labels, 1))
    assert not torch.equal(clean, g.glyphs(labels, 2)) and 0 <= clean.min() and clean.max() <= 1
    images, digits = g.target_digits(60, 1)
    again, same = g.target_digits(60, 1)
    assert torch.equal(images, again) and torch.equal(digits, same) and digits.bincount().tolist() == [6] * 10
    assert (
        images.min() == 0
        and images.max() == 1
        and (g.corrupt(clean, 3, strength=0) - clean).abs().mean() < 0.1
    )
    assert (images.flatten(1).mean(1) > clean.flatten(1).mean(1).max()).any()  # patches that are inverted

    def nearest(x):  # by the mean picture of each clean digit
        means = torch.stack([clean[labels == d].mean(0) for d in range(10)]).flatten(1)
        return torch.cdist(x.flatten(1), means).argmin(1)

    fresh = g.glyphs(labels, 7)
    assert (nearest(fresh) == labels).float().mean() > (nearest(images) == digits).float().mean() + 0.1


def test_handwritten_digits_fill_the_same_square():
    images, labels = g.handwritten(0)
    assert images.shape == (1797, 1, 20, 20) and labels.dtype == torch.long and images.max() == 1
    assert not torch.equal(labels, g.handwritten(1)[1])


def test_episodes_are_what_a_therapy_asks():
    each = 4
    *rows, same, truth = g._episodes(6, each, 4000, torch.Generator().manual_seed(0))
    negative, positive, query = (row // each for row in rows)
    assert torch.equal(negative == positive, same == 0) and torch.equal(query == positive, truth == 1)
    assert all((a != b).all() for a, b in ((rows[0], rows[1]), (rows[1], rows[2]), (rows[0], rows[2])))
    assert all(0.45 < column.float().mean() < 0.55 for column in (same, truth))
    contrast = (query == negative)[(same == 1) & (truth == 0)].float().mean()
    assert 0.5 < contrast < 0.7


def test_models_are_kept_and_frozen(lab):
    model, verifier = g.digit_model(lab, 0), g.letter_verifier(lab, 0)
    again = g.digit_model(lab, 0)
    images, _ = g.target_digits(12, 0)
    assert torch.equal(
        g.logits(model.encoder, model.weights, images), g.logits(again.encoder, again.weights, images)
    )
    assert 0 <= model.source <= 1 and 0 <= verifier.auc <= 1
    assert not any(p.requires_grad for part in (model.encoder, verifier) for p in part.parameters())
    z = verifier.encoder(images)
    assert verifier(z[:4], z[4:8], z[8:], torch.tensor([0, 1, 0, 1])).shape == (4,)
