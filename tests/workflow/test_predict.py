"""A saved model on files, from Python and through transformers (without us: `tests/nn/test_audio_model.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import corpora
import numpy as np
import pytest
import soundfile

from unfused.data.files import Quarantine
from unfused.workflow.predict import AdaptedModel, load


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A run on recordings of one to three windows."""
    from unfused import adapt

    folder = tmp_path_factory.mktemp("sounds") / "long"
    rows = [
        row
        for k, seconds in enumerate((2.6, 3.5, 5.0))
        for row in [
            (f"{k}/{name}", label) for name, label in corpora.write_tones(folder / str(k), 6, seconds=seconds)
        ]
    ]
    labels = corpora.write_labels(folder.parent / "labels.csv", rows)
    run = adapt(
        folder,
        labels,
        output=folder.parent / "runs",
        **corpora.TINY | dict(fine_tune_steps=20, distil_steps=20),
    )
    return folder, run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from unfused import adapt

    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    corpora.write_pictures(folder)
    return folder, adapt(folder, output=folder.parent / "runs", **corpora.TINY)


def stage_probabilities(run) -> np.ndarray:
    return np.load(run.path / "stages" / "unfused" / "0" / "probabilities.npy")


@pytest.mark.parametrize("kind", ["sounds", "pictures"])
def test_it_predicts_what_the_run_evaluated(kind, request):
    """The saved model on the files gives the probabilities that the metrics were computed from."""
    folder, run = request.getfixturevalue(kind)
    paths = [row["path"] for row in corpora.read_rows(run.path / "pseudo_labels.csv")]
    found = run.model.predict_proba([folder / path for path in paths])
    assert found.shape == (len(paths), len(run.metrics["data"]["classes"])) and found.dtype == np.float32
    np.testing.assert_allclose(found, stage_probabilities(run), atol=2e-4)
    classes = np.array(run.metrics["data"]["classes"])
    assert run.model.classes == classes.tolist()
    assert run.model.predict([folder / path for path in paths]) == classes[found.argmax(1)].tolist()


def test_words_too(tones, tmp_path):
    """The front end of short sounds, which trims and stretches."""
    from unfused import adapt

    run = adapt(tones, tones.parent / "labels.csv", output=tmp_path, **corpora.TINY)
    found = run.model.predict_proba(sorted(tones.iterdir()))
    np.testing.assert_allclose(found, stage_probabilities(run), atol=2e-4)


def test_loading(sounds):
    _, run = sounds
    assert load is not None
    for folder in (run.path, run.path / "model", str(run.path / "model")):
        model = AdaptedModel.load(folder)
        assert model.config.id2label == {0: "high", 1: "low", 2: "mid"}
        assert not model.training
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute
    with pytest.raises(ValueError, match=r"holds no config\.json: give the folder that"):
        AdaptedModel.load(run.path / "stages")


def test_odd_files(sounds, tmp_path):
    """Any length, rate and channel count; a bad one is named."""
    _, run = sounds
    odd = {"8 channels.wav": (1.0, 44100, 8), "short.wav": (0.05, 8000, 1), "192 kHz.wav": (0.5, 192000, 2)}
    for name, (seconds, rate, channels) in odd.items():
        wave = corpora.tone(1, 0, seconds, rate=rate)
        soundfile.write(tmp_path / name, np.repeat(wave[:, None], channels, 1), rate)
    paths: list = [tmp_path / name for name in odd]
    assert np.isfinite(run.model.predict_proba(paths)).all()
    (tmp_path / "text.wav").write_text("hello")
    bad = Quarantine()
    paths = [paths[0], str(tmp_path / "text.wav"), tmp_path / "gone.wav", os.fsencode(paths[1]).decode()]
    found = run.model.predict_proba(paths, bad)
    assert np.isnan(found).all(1).tolist() == [False, True, True, False]
    assert [reason for _, reason in bad.rows] == ["no such file (moved or deleted?)", "not audio: text"]
    with pytest.raises(ValueError, match=r"text\.wav: not audio: text"):
        run.model.predict(paths)


def test_arguments(sounds):
    _, run = sounds
    assert run.model.predict([]) == []
    assert run.model.predict_proba([]).shape == (0, 3)
    with pytest.raises(TypeError, match="is one path: give a list"):
        run.model.predict("a.wav")


def test_many_files_come_in_batches(sounds):
    folder, run = sounds
    paths = [folder / "0" / "00_s0.wav", folder / "2" / "01_s0.wav"] * 20
    found = run.model.predict_proba(paths)
    np.testing.assert_allclose(found[:2], found[-2:], atol=1e-5)


# --- transformers ----------------------------------------------------------------------------------------


def test_pipeline_of_sounds(sounds):
    import transformers

    folder, run = sounds
    classify = transformers.pipeline("audio-classification", model=str(run.path / "model"))
    path = folder / "2" / "00_s0.wav"
    wave, rate = soundfile.read(path, dtype="float32")
    scores = {row["label"]: row["score"] for row in classify({"raw": wave, "sampling_rate": rate}, top_k=3)}
    expected = run.model.predict_proba([path])[0]
    np.testing.assert_allclose([scores[name] for name in run.model.classes], expected, atol=1e-3)


def test_auto_class_and_saving_again(sounds, tmp_path):
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    folder, run = sounds
    model = AutoModelForAudioClassification.from_pretrained(run.path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(run.path / "model")
    wave, rate = soundfile.read(folder / "1" / "02_s0.wav", dtype="float32")
    assert rate == extractor.sampling_rate
    with torch.inference_mode():
        logits = model.eval()(**extractor(wave, sampling_rate=rate, return_tensors="pt")).logits
    expected = run.model.predict_proba([folder / "1" / "02_s0.wav"])
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=1e-4)
    run.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        run.path / "model" / "model.safetensors"
    ).read_bytes()


def test_pipeline_of_pictures(pictures):
    import transformers

    folder, run = pictures
    path = folder / "red" / "1.png"
    classify = transformers.pipeline("image-classification", model=str(run.path / "model"))
    scores = {row["label"]: row["score"] for row in classify(str(path))}
    expected = run.model.predict_proba([path])[0]
    np.testing.assert_allclose(
        [scores[name] for name in run.model.classes], expected, atol=0.01
    )  # it crops to whole pixels


def test_model_card(sounds):
    text = (Path(sounds[1].path) / "model" / "README.md").read_text()
    assert text.startswith("---\n") and "audio-classification" in text and "unfused" in text


def test_push_to_hub_uploads_the_folder_with_our_card(sounds, monkeypatch):
    import huggingface_hub

    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **how):
            calls["repo"] = repo_id, how
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls["files"] = repo_id, {p.name for p in Path(folder_path).iterdir()}
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    _, run = sounds
    assert load(run.path).push_to_hub("birds", private=True, token="t") == "https://hub/commit"
    assert calls["repo"] == ("birds", {"private": True, "exist_ok": True}) and calls["token"] == "t"
    repo, files = calls["files"]
    assert repo == "me/birds" and {"README.md", "model.safetensors", "preprocessor_config.json"} <= files
