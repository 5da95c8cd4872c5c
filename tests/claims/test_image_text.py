from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab import image_text as it


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("lab"))


def test_pictures_are_what_they_say():
    pool, again, other = it.draw(300, seed=3), it.draw(300, seed=3), it.draw(300, seed=4)
    assert torch.equal(pool.images, again.images) and not torch.equal(pool.images, other.images)
    assert torch.equal(pool.labels, 8 * pool.attributes.shapes + pool.attributes.colours)
    assert np.bincount(pool.labels, minlength=64).min() >= 4
    assert it.class_names()[int(pool.labels[0])] == (
        f"{it.COLOURS[pool.attributes.colours[0]]} {it.SHAPES[pool.attributes.shapes[0]]}"
    )
    # the corners are ground, and ink covers more of a picture with a large shape
    corner = pool.images[:, :, :2, :2].float().mean((2, 3)) / 255
    assert (corner - it._GROUND[pool.attributes.backgrounds]).abs().mean() < 0.06
    ink = (pool.images.float() / 255 - corner[:, :, None, None]).abs().sum(1) > 0.3
    large = pool.attributes.sizes == 1
    assert ink[large].float().mean() > 1.5 * ink[~large].float().mean()


def test_every_shape_and_colour_differs():
    labels = torch.arange(64)
    zero = torch.zeros(64, dtype=torch.long)
    images = it.render(it.Attributes(labels // 8, labels % 8, zero, zero + 1), seed=0).float().flatten(1)
    apart = torch.cdist(images, images) + 1e9 * torch.eye(64)
    assert apart.min() > 500


def test_biases_are_heeded():
    pool = it.draw(200, seed=0, classes=np.eye(64)[5], backgrounds=[0, 0, 0, 1, 1], sizes=[1, 0])
    assert (pool.labels == 5).all() and (pool.attributes.sizes == 0).all()
    assert set(pool.attributes.backgrounds.tolist()) == {3, 4}
    weights = it.zipf(0)
    assert weights.sum() == pytest.approx(1) and weights.max() / weights.min() == pytest.approx(64)


def test_captions_say_no_more_than_they_may():
    pool = it.draw(500, seed=0)
    full = it.captions(pool.attributes, seed=0, omit=(0, 0, 0, 0))
    for sentence, shape, colour, ground, size in zip(full, *pool.attributes, strict=True):
        wanted = f" {it.SIZES[size]} {it.COLOURS[colour]} {it.SHAPES[shape]} on a {it.BACKGROUNDS[ground]} background"
        assert sentence.endswith(wanted)
    none = it.captions(pool.attributes, seed=0, omit=(1, 1, 1, 1))
    assert {sentence.split(" a ")[-1].removeprefix("a ") for sentence in none} == {"thing"}
    default = it.captions(pool.attributes, seed=0)
    assert 0.3 < np.mean(["background" in sentence for sentence in default]) < 0.7
    tokenizer = it._tokenizer()
    rows = tokenizer([*full, *default, *it.INVENTED])["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in rows)
    assert tokenizer("a mauve circle")["input_ids"].count(tokenizer.unk_token_id) == 1


def test_misread_and_views_and_shift():
    pool = it.draw(2000, seed=0)
    seen = it.misread(pool.attributes, 0.2, seed=1)
    for true, read in zip(pool.attributes, seen, strict=True):
        assert 0.15 < (true != read).float().mean() < 0.25
    assert all(
        torch.equal(a, b) for a, b in zip(it.misread(pool.attributes, 0.0, 1), pool.attributes, strict=True)
    )
    few = pool.images[:50]
    assert it.views(few, 0).shape == few.shape and not torch.equal(it.views(few, 0), it.views(few, 1))
    assert torch.equal(it.shift(few, 0.0), few)
    weak, strong = it.shift(few, 0.1).float() - few, it.shift(few, 0.6).float() - few
    assert weak.abs().mean() < strong.abs().mean()
    assert torch.equal(it.shift(few, 0.5, 3), it.shift(few, 0.5, 3))


def test_support_has_the_shots():
    labels = np.repeat([3, 1, 2], [5, 9, 4])
    rows = it.support(labels, shots=4, seed=0)
    assert len(set(rows)) == 12 and (labels[rows] == np.repeat([1, 2, 3], 4)).all()
    assert not np.array_equal(rows, it.support(labels, shots=4, seed=1))
    with pytest.raises(ValueError, match="shots=5: a class has 4"):
        it.support(labels, 5, 0)


def test_world_is_a_clip_that_is_trained_once(lab):
    from transformers import CLIPModel

    clip = it.world(lab, 0)
    assert isinstance(clip.model, CLIPModel) and it.world(lab, 0) is clip
    it._TRAINED.clear()
    again = it.world(lab, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(clip.model.parameters(), again.model.parameters(), strict=True)
    )
    images = it.draw(5, seed=0).images
    found = it.features(lab, 0, images)
    assert found.shape == (5, 64) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(found, clip.features(images, batch_size=2), atol=1e-5)
    weights = clip.class_features(it.class_names())
    assert weights.shape == (64, 64) and np.allclose(np.linalg.norm(weights, axis=1), 1, atol=1e-5)
    # padding beside longer sentences changes nothing
    alone, beside = (
        clip.text_features(["a circle"]),
        clip.text_features(["a circle", "a photo of a small red thing"]),
    )
    assert np.allclose(alone[0], beside[0], atol=1e-5)


def test_domain_parts_do_not_overlap(lab):
    parts = it.domain(lab, 0, 0.3, {"pool": 70, "test": 30}, classes=it.zipf(0), sizes=[1, 0])
    assert {name: (x.shape, y.shape) for name, (x, y) in parts.items()} == {
        "pool": ((70, 64), (70,)),
        "test": ((30, 64), (30,)),
    }
    again = it.domain(lab, 0, 0.3, {"pool": 70, "test": 30}, classes=it.zipf(0), sizes=[1, 0])
    assert np.array_equal(parts["test"][0], again["test"][0])
    assert not (parts["pool"][0][:, None] == parts["test"][0]).all(-1).any()
