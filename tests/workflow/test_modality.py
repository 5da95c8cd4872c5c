"""Modalities: how files become the model's inputs, and what is kept of them."""

from __future__ import annotations

import os
from pathlib import Path

import corpora
import numpy as np
import pytest
import soundfile
from PIL import Image as Pillow

from unfused.data.files import Quarantine
from unfused.data.images import IMAGE_EXTENSIONS
from unfused.data.manifest import read_manifest
from unfused.workflow.modality import Audio, Image, Inputs, choose_front_end, choose_size


def sounds(folder: Path, seconds: list[float], rate: int = 16000):
    folder.mkdir(exist_ok=True)
    for k, length in enumerate(seconds):
        soundfile.write(folder / f"{k:02d}.wav", corpora.tone(k % 3, 0, length, k, rate), rate)
    return read_manifest(folder)


# --- inputs ----------------------------------------------------------------------------------------------


def test_pooling_windows_to_clips():
    inputs = Inputs(np.zeros((6, 1, 2, 2)), np.array([0, 0, 1, 2, 2, 2]), {})
    per_window = np.arange(12.0).reshape(6, 2)
    np.testing.assert_allclose(inputs.pool(per_window, 3), [[1, 2], [4, 5], [8, 9]])
    assert inputs.of(np.array([True, False, True])).tolist() == [0, 1, 3, 4, 5]


def test_windows_of_recordings(tmp_path):
    manifest = sounds(tmp_path / "long", [0.4, 2.0, 9.0, 3.0])
    modality = Audio(width=4)
    corpus = modality.read(manifest, tmp_path / "cache", Quarantine())
    assert len(corpus) == 4 and corpus.seconds == pytest.approx([0.4, 2.0, 9.0, 3.0], abs=0.01)
    pool = np.array([True, True, True, False])
    inputs = modality.inputs(corpus, pool, tmp_path)
    counts = np.bincount(inputs.clip)
    assert counts[0] == 1 and counts[2] > counts[3] >= 2
    assert inputs.values.shape == (counts.sum(), 1, modality.front_end.n_mels, modality.front_end.frames)
    inside = inputs.values[pool[inputs.clip]]
    assert inside.mean() == pytest.approx(0, abs=1e-5) and inside.std() == pytest.approx(1, abs=1e-5)
    saved = np.load(tmp_path / "inputs.npy", mmap_mode="r")
    np.testing.assert_array_equal(saved, inputs.values)


def test_the_file_of_the_inputs_has_its_room(tmp_path):
    """No holes: a disk that fills up later cannot fail a write through the memory map, which would be SIGBUS."""
    manifest = sounds(tmp_path / "words", [0.5] * 40)
    modality = Audio(width=4)
    corpus = modality.read(manifest, tmp_path / "cache", Quarantine())
    modality.inputs(corpus, np.ones(40, bool), tmp_path)
    status = (tmp_path / "inputs.npy").stat()
    assert status.st_blocks * 512 >= status.st_size


def test_one_constant_picture_among_others(tmp_path):
    corpora.write_pictures(tmp_path / "pictures", 5)
    Pillow.new("RGB", (30, 30), "white").save(tmp_path / "pictures" / "red" / "white.png")
    manifest = read_manifest(tmp_path / "pictures", extensions=IMAGE_EXTENSIONS)
    modality = Image(width=4)
    corpus = modality.read(manifest, tmp_path / "cache", Quarantine())
    inputs = modality.inputs(corpus, np.ones(6, bool), tmp_path)
    assert inputs.values.shape == (6, 3, modality.size, modality.size)
    np.testing.assert_allclose(inputs.values.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.values.std((0, 2, 3)), 1, atol=1e-4)


# --- fingerprints ----------------------------------------------------------------------------------------


def test_digest_is_of_names_and_contents(tmp_path):
    manifest = sounds(tmp_path / "a", [0.3, 0.4, 0.5])

    def digest(manifest) -> str:
        return Audio(4).read(manifest, tmp_path / "cache", Quarantine()).digest

    first = digest(manifest)
    assert digest(sounds(tmp_path / "b", [0.3, 0.4, 0.5])) == first
    manifest.labels = ["x", "y", "x"]
    assert digest(manifest) == first  # labels may change without anything being computed anew
    assert digest(sounds(tmp_path / "b", [0.3, 0.4, 0.6])) != first
    (tmp_path / "a" / "02.wav").rename(tmp_path / "a" / "03.wav")
    assert digest(read_manifest(tmp_path / "a")) != first


# --- what suits the files --------------------------------------------------------------------------------


def test_front_end_that_suits_the_files(tmp_path):
    words = choose_front_end(sounds(tmp_path / "words", [0.4, 1.0, 2.0], 8000))
    assert (words.fit, words.sampling_rate) == ("stretch", 8000)
    scenes = choose_front_end(sounds(tmp_path / "scenes", [5.0, 5.0, 1.0]))
    assert (scenes.fit, scenes.sampling_rate) == ("window", 16000)
    assert scenes.f_max <= 8000 and words.f_max <= 4000


def test_headers_that_cannot_be_read_do_not_stop_it(tmp_path):
    """A pipe is not waited for, and a name that is no text is opened by its bytes."""
    folder = tmp_path / "words"
    manifest = sounds(folder, [0.5])
    (folder / "text.wav").write_text("hello")
    os.mkfifo(folder / "pipe.wav")
    (folder / "gone.wav").symlink_to("nowhere.wav")
    (folder / "00.wav").rename(folder / os.fsdecode(b"\xff.wav"))
    manifest = read_manifest(folder)
    assert len(manifest) == 4
    assert choose_front_end(manifest).sampling_rate == 16000
    assert choose_front_end(manifest).fit == "stretch"
    assert choose_front_end(manifest.select(np.zeros(4, bool))).fit == "window"


def test_size_that_suits_the_pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    for k, side in enumerate((40, 90, 90, 300)):
        Pillow.new("RGB", (side, side + 20)).save(folder / f"{k}.png")
    manifest = read_manifest(folder, extensions=IMAGE_EXTENSIONS)
    assert choose_size(manifest) == 64
    assert choose_size(manifest.select(np.array([0]))) == 32


# --- previews --------------------------------------------------------------------------------------------


def test_previews(tmp_path):
    sounds(tmp_path / "words", [0.4])
    corpora.write_pictures(tmp_path / "pictures", 2)
    assert Audio().preview(tmp_path / "words" / "00.wav").startswith("data:audio/")
    assert Image().preview(tmp_path / "pictures" / "red" / "1.png").startswith("data:image/")
