"""The lab's photographs: read as they are, turned by what the target says, drawn without overlap."""

import numpy as np
import pytest
import torch
from PIL import Image

from unfused.claims.lab import Lab, photos
from unfused.claims.lab.worlds import Absent


@pytest.fixture
def lab(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 20)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / "images" / "cifar10" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return Lab("desk", seeds=1, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def test_parts_are_pictures_in_minus_one_to_one(lab):
    parts = photos.photo_parts(lab)
    images, labels = parts["train"]
    assert images.shape == (60, 3, 32, 32) and -1 <= images.min() < -0.5 < 0.5 < images.max() <= 1
    assert labels.bincount().tolist() == [30, 30]
    assert len(parts["test"][1]) == 40


def test_turns_are_what_the_target_says():
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, :8] = 1  # bright above
    turned, turns = photos._turned(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0))
    edges = {0: turned[:, 0, 0], 1: turned[:, 0, :, 0], 2: turned[:, 0, -1], 3: turned[:, 0, :, -1]}
    for quarter, edge in edges.items():
        assert (edge[turns == quarter].mean(1) == 1).all()
    assert set(turns.tolist()) == {0, 1, 2, 3}


def test_train_and_validation_do_not_overlap(lab):
    world = photos.photos_world(lab, 10)
    task = world.task(0)
    assert task.train["labels"].bincount().tolist() == [10, 10]
    assert task.valid["labels"].bincount().tolist() == [5, 5]
    train = {image.numpy().tobytes() for image in task.train["pixel_values"]}
    assert not train & {image.numpy().tobytes() for image in task.valid["pixel_values"]}
    assert not torch.equal(task.train["pixel_values"], world.task(1).train["pixel_values"])


def test_backbone_is_kept_and_gets_a_new_head(tmp_path, lab):
    smoke = Lab("smoke", seeds=1, data_dir=lab.data_dir, cache_dir=tmp_path / "cache")
    first, again = photos.photos_backbone(smoke), photos.photos_backbone(smoke, 10)
    assert first.classifier.out_features == 4 and again.classifier.out_features == 10
    for name, weight in first.vit.state_dict().items():
        assert torch.equal(weight, again.vit.state_dict()[name])


def test_absent_data_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Absent, match=r"cifar10: .*is not here; give --data DIR"):
        photos.photo_parts(Lab("smoke", data_dir=tmp_path / "empty", cache_dir=tmp_path))
