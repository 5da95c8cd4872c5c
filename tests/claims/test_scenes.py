from __future__ import annotations

import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab.scenes import draw_scenes, scene_task, scenes_accuracy, scenes_backbone, shape_of


def test_scenes_are_what_they_say():
    scenes = draw_scenes(60, seed=3)
    again, other = draw_scenes(60, seed=3), draw_scenes(60, seed=3, look="task")
    assert all(torch.equal(a, b) for a, b in zip(scenes, again, strict=True))
    assert not torch.equal(scenes.images, other.images)
    assert scenes.codes.max() <= 36 and scenes.images.float().std() > 20
    shapes = shape_of(scenes.codes.long())
    for index in range(60):  # the middle object is drawn last: nothing hides it
        own = scenes.codes[index] == 1 + 6 * scenes.shapes[index] + scenes.textures[index]
        assert own[20:44, 20:44].float().mean() > 0.15
        assert (shapes[index][own] == 1 + scenes.shapes[index]).all()
    ground = (shapes == 0).float().mean((1, 2))
    assert 0.3 < ground.min() and ground.max() < 0.97
    assert len(scenes.shapes.unique()) == len(scenes.textures.unique()) == 6
    with pytest.raises(ValueError, match="look='new'"):
        draw_scenes(1, 0, "new")


def test_tasks_and_backbone(tmp_path):
    lab = Lab("smoke", cache_dir=tmp_path)
    pixels, classes = scene_task(lab, 0, "pixels"), scene_task(lab, 0, "classes")
    assert pixels.train["labels"].shape[1:] == (64, 64) and pixels.num_labels == 7
    assert classes.train["labels"].ndim == 1 and classes.num_labels == 6
    assert torch.equal(classes.test["pixel_values"], scene_task(lab, 1, "classes").test["pixel_values"])
    assert not torch.equal(classes.train["pixel_values"], scene_task(lab, 1, "classes").train["pixel_values"])
    assert -1 <= pixels.train["pixel_values"].min() and pixels.train["pixel_values"].max() <= 1
    vit = scenes_backbone(lab)
    with torch.no_grad():
        tokens = vit(pixels.test["pixel_values"]).last_hidden_state
    assert tokens.shape[1:] == (65, 64) and set(scenes_accuracy(lab)) == {"shape", "texture"}
    with pytest.raises(ValueError, match="kind='boxes'"):
        scene_task(lab, 0, "boxes")
