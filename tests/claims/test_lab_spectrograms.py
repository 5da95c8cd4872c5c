from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.claims.lab import Lab
from unfused.claims.lab.spectrograms import _held_out, mfcc_accuracy, sound_backbone, sounds, words_world


@pytest.fixture
def lab(tmp_path):
    return Lab("smoke", cache_dir=tmp_path)


def test_sounds_are_of_the_kind_they_say():
    waves, kinds = sounds(100, torch.Generator().manual_seed(0))
    assert waves.shape == (100, 20480) and waves.isfinite().all() and len(kinds.unique()) == 12
    power = torch.fft.rfft(waves).abs().square()
    peaked = power.amax(1) / power.sum(1)
    tone, noise = peaked[kinds == 0].median(), peaked[kinds == 4].median()
    assert tone > 20 * noise
    again, same = sounds(100, torch.Generator().manual_seed(0))
    assert torch.equal(waves, again) and torch.equal(kinds, same)


def test_words_are_tested_on_voices_without_a_label(lab):
    world = words_world(lab, "sample", 3)
    task = world.task(0)
    assert task.num_labels == 10 and len(task.train["labels"]) == 30
    assert task.train["input_values"].shape[1:] == (32, 40)
    known = {x.numpy().tobytes() for x in (*task.train["input_values"], *task.valid["input_values"])}
    assert not known & {x.numpy().tobytes() for x in task.test["input_values"]}
    audio = lab.world("sample")
    held = _held_out(audio, 0)
    assert not set(audio.groups[held]) & set(audio.groups[~held]) and 0.2 < held.mean() < 0.5
    assert mfcc_accuracy(task) > 0.15


def test_backbone_reads_the_mean_of_all_tokens(lab):
    model = sound_backbone(lab, 4)
    x = torch.randn(2, 32, 40)
    with torch.no_grad():
        tokens = model.audio_spectrogram_transformer(x).last_hidden_state
        assert tokens.shape == (2, 37, 48)
        torch.testing.assert_close(model(input_values=x).logits, model.classifier(tokens.mean(1)))
    labels = torch.tensor([0, 3])
    assert np.isfinite(model(input_values=x, labels=labels).loss.item())
