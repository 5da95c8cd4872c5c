from __future__ import annotations

import pytest
import torch

from unfused.claims.lab import Absent, Lab
from unfused.claims.lab.fundus import cells_world, fundus, fundus_world, texture_backbone, textures


@pytest.fixture
def lab(tmp_path):
    return Lab("smoke", cache_dir=tmp_path)


@pytest.mark.parametrize("draw", [fundus, textures])
def test_pictures_are_pictures_and_repeat(draw):
    images, labels = draw(90, torch.Generator().manual_seed(3))
    assert images.shape == (90, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    again, same = draw(90, torch.Generator().manual_seed(3))
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert len(labels.unique()) == (5 if draw is fundus else 12)


def test_lesions_show_and_brightness_does_not_give_the_grade_away():
    images, grades = fundus(600, torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    spots = ((images - smooth).abs().mean(1) > 0.06).float().mean((1, 2))
    seen = torch.stack([spots[grades == grade].mean() for grade in range(5)])
    assert (seen.diff() > 0).all()
    level = torch.stack([images[grades == grade].mean() for grade in range(5)])
    assert level.std() < 0.1 * level.mean()


def test_worlds(lab, tmp_path):
    world = fundus_world(lab, 30)
    one, other = world.task(0), world.task(1)
    assert len(one.train["labels"]) == 30 and torch.equal(one.test["labels"], other.test["labels"])
    assert not torch.equal(one.train["pixel_values"], other.train["pixel_values"])
    model = world.backbone(5)
    found = world.evaluate(model, one)
    assert -1 <= found["test"] <= 1 and model.classifier.out_features == 5
    assert texture_backbone(lab).classifier.out_features == 12
    with pytest.raises(Absent, match="bccd"):
        cells_world(Lab("smoke", cache_dir=tmp_path, data_dir=tmp_path))
