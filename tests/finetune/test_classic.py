import numpy as np
import pytest
from scipy.fft import dct
from sklearn.base import clone

import unfused.finetune.classic as module
from unfused.finetune import Classic, audio_features, image_features
from unfused.finetune.classic import mfcc


def words(n: int = 60, seed: int = 0):
    """Log-mels of one second or so: a tone that rises, falls or stays, in noise. Order matters."""
    rng = np.random.default_rng(seed)
    labels, clips = np.arange(n) % 3, []
    for label in labels:
        frames = int(rng.integers(30, 90))
        clip = rng.normal(size=(40, frames)).astype(np.float32)
        track = {0: np.linspace(5, 30, frames), 1: np.linspace(30, 5, frames), 2: np.full(frames, 18)}[label]
        clip += 5 * np.exp(-((np.arange(40)[:, None] - track) ** 2) / 20)
        clips.append(clip)
    return clips, labels


def textures(n: int = 60, seed: int = 0):
    """Long clips that differ in how they fluctuate, at no particular time."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    return [rng.normal(size=(40, 300)).astype(np.float32) * (1 + 2 * label) for label in labels], labels


def test_mfcc_is_scipys_dct():
    clips, _ = words(3)
    for ours, clip in zip(mfcc(clips, 13), clips, strict=True):
        np.testing.assert_allclose(ours, dct(clip, axis=0, norm="ortho")[:13], atol=1e-4)


@pytest.mark.parametrize(("data", "chosen"), [(words, "mfcc"), (textures, "statistics")])
def test_takes_the_representation_that_suits_the_sounds(data, chosen):
    (clips, labels), (unseen, truth) = data(seed=0), data(seed=1)
    model = Classic().fit(clips, labels)
    assert model.representation_ == chosen
    assert model.score(unseen, truth) > 0.9


def test_pictures_by_shape_and_by_colour():
    rng = np.random.default_rng(0)
    y = np.arange(80) % 4
    images = rng.integers(0, 60, (80, 3, 24, 24), dtype=np.uint8)
    images[y == 1, 0] += 120
    images[y == 2, :, ::4] += 120
    images[y == 3, :, :, ::4] += 120
    model = Classic().fit(images[:40], y[:40])
    assert set(model.losses_) == {"pixels", "descriptors"}
    assert model.score(images[40:], y[40:]) > 0.9
    assert image_features(images)["descriptors"].shape == (80, 3 * 3 * 36 + 64)


def test_one_frame_clips_probabilities_and_clone():
    clips, labels = words(30)
    clips[0] = clips[0][:, :1]
    model = clone(Classic("statistics", seed=2)).fit(
        clips, [str(label) for label in labels], groups=np.arange(30) % 5
    )
    probabilities = model.predict_proba(clips)
    assert list(model.classes_) == ["0", "1", "2"]
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_mistakes_are_named():
    clips, labels = words(6)
    with pytest.raises(ValueError, match="representation='hog'"):
        Classic("hog").fit(clips, labels)
    with pytest.raises(ValueError, match="same n_mels"):
        Classic().fit([np.zeros((40, 5)), np.zeros((41, 5))], [0, 1])
    with pytest.raises(ValueError, match="empty"):
        Classic().fit([], [])
    model = Classic("mfcc").fit(clips, labels)
    with pytest.raises(ValueError, match="another kind"):
        model.predict(np.zeros((2, 3, 8, 8), np.uint8))


def test_features_computed_once_give_the_same_model(monkeypatch):
    clips, labels = words(30)
    whole = audio_features(clips)
    monkeypatch.setattr(module, "CHUNK", 7)
    chunks = audio_features(clips)
    for name in ("mfcc", "statistics"):
        np.testing.assert_allclose(whole[name], chunks[name], atol=1e-4)
    direct, stored = Classic().fit(clips, labels), Classic().fit(whole, labels)
    np.testing.assert_allclose(direct.predict_proba(clips), stored.predict_proba(whole))
