"""The lab's fine-tunings: changes of digits, tasks without overlap, frozen heads, what is kept, pictures on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unfused.claims.lab import Lab
from unfused.claims.lab import fine_tunings as ft
from unfused.claims.lab.worlds import Absent


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def world(lab):
    return ft.digit_domains(lab)


def test_changes_grow_with_their_strength():
    images = torch.rand(5, 1, 8, 8)
    for domain in ft.DOMAINS:
        weak, full = (ft.change_digits(images, domain, s) for s in (0.3, 1.0))
        assert weak.shape == images.shape and torch.isfinite(full).all()
        torch.testing.assert_close(ft.change_digits(images, domain, 0.0), images, rtol=1e-4, atol=1e-4)
        assert (weak - images).abs().mean() < (full - images).abs().mean()
        each = ft.change_digits(images, domain, torch.tensor([0.0, 1.0, 0.3, 0.0, 1.0]))
        torch.testing.assert_close(each[1], full[1])
        torch.testing.assert_close(each[2], weak[2])
    torch.testing.assert_close(ft.change_digits(images, "negative"), 1 - images)
    torch.testing.assert_close(
        ft.change_digits(ft.change_digits(images, "left"), "right"), images, rtol=1e-3, atol=1e-3
    )
    assert sorted(ft.change_digits(images, "swapped")[0].flatten().tolist()) == sorted(
        images[0].flatten().tolist()
    )
    with pytest.raises(ValueError, match="domain='blurry'"):
        ft.change_digits(images, "blurry")


def test_tasks_do_not_overlap_and_are_drawn_by_seed(world):
    one, again, other = (world.task("negative", seed) for seed in (0, 0, 1))
    assert (
        len(one.train["labels"]) == 300 and len(one.valid["labels"]) == 150 and len(one.test["labels"]) == 447
    )
    assert torch.equal(one.train["pixel_values"], again.train["pixel_values"])
    assert not torch.equal(one.train["pixel_values"], other.train["pixel_values"])
    assert torch.equal(one.test["pixel_values"], other.test["pixel_values"])
    few = world.task("negative", 0, shots=3)
    assert few.train["labels"].bincount().tolist() == [3] * 10
    assert torch.equal(few.valid["pixel_values"], one.valid["pixel_values"])


def test_fine_tuning_moves_the_encoder_and_not_the_head(world):
    before = {name: value.clone() for name, value in world.base.items()}
    head = world.heads["left"].weight.clone()
    state = world.tuned("left", seed=1)
    assert set(state) == set(world.base) and any(not torch.equal(state[n], v) for n, v in before.items())
    assert all(torch.equal(world.base[n], v) for n, v in before.items())
    assert torch.equal(world.heads["left"].weight, head) and not any(
        p.requires_grad for p in world.model("left").classifier.parameters()
    )
    kept = world.tuned("left", seed=1)
    assert all(torch.equal(kept[n], v) for n, v in state.items())
    assert set(world.judge("left", state)) == {"valid", "valid_loss", "test", "test_loss"}
    assert ft.state_hash(state) != ft.state_hash(world.base) == ft.state_hash(before)


def test_pictures_of_all_kinds(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "data" / "images"
    for part in ("train", "test"):
        for k in range(10):
            folder = root / "cifar10" / part / f"kind{k}"
            folder.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    for alphabet in ("Greek", "Old_Script"):
        for character in range(2):
            folder = root / "omniglot" / "images_background_small1" / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for i in range(20):
                picture = np.full((105, 105), 255, np.uint8)
                picture[40 + i : 44 + i, 10 + 30 * character : 90] = 0
                Image.fromarray(picture).save(folder / f"{i:02}.png")
    lab = Lab("desk", seeds=1, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    letters = ft._alphabets(lab)
    assert set(letters) == {"greek", "old script"}
    sizes = {part: tuple(images.shape) for part, (images, _) in letters["greek"].items()}
    assert sizes == {"pretrain": (8, 3, 32, 32), "pool": (22, 3, 32, 32), "test": (10, 3, 32, 32)}
    assert letters["greek"]["pool"][0].min() == -1 and letters["greek"]["pool"][0].max() == 1
    photos = ft._photo_tasks(lab)
    assert {name: len(p["pretrain"][1]) + len(p["pool"][1]) for name, p in photos.items()} == {
        "vehicles": 80,
        "animals": 120,
    }
    assert photos["vehicles"]["pool"][1].unique().tolist() == [0, 1, 2, 3]
    task = ft.photo_task(lab, seed=0, per_class=4)
    assert task.train["labels"].bincount().tolist() == task.valid["labels"].bincount().tolist() == [4] * 10
    assert len(task.test["labels"]) == 200
    digits = ft._plain_digits(lab)
    assert {part: len(y) for part, (_, y) in digits.items()} == {"pretrain": 150, "pool": 1200, "test": 447}
    with pytest.raises(Absent, match="fsdd"):
        ft.picture_tasks(lab)
