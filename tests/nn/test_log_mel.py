"""The front end: against librosa, against itself one clip at a time, and at its edges."""

from __future__ import annotations

import dataclasses
import json

import librosa
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unfused.nn.log_mel import (
    BLOCK_FRAMES,
    FrontEnd,
    fit_frames,
    fit_frames_many,
    log_mel,
    log_mel_many,
    mel_filters,
    num_windows,
    prepare,
    trim,
)

pytestmark = pytest.mark.filterwarnings("ignore:n_fft=.* is too large:UserWarning")

WORDS = FrontEnd(
    sampling_rate=8000,
    n_fft=256,
    hop_length=64,
    n_mels=40,
    f_min=50,
    f_max=4000,
    trim_db=30,
    frames=32,
    fit="stretch",
)
FRONT_ENDS = [
    WORDS,
    FrontEnd(),
    FrontEnd(sampling_rate=8000, n_fft=512, hop_length=100, n_mels=64, f_min=0, f_max=3800),
    FrontEnd(n_fft=400, hop_length=160, n_mels=20, f_min=125, f_max=7500),
    FrontEnd(n_fft=2048, hop_length=512, n_mels=128, f_min=0, f_max=8000),
    FrontEnd(n_fft=512, hop_length=700, n_mels=7, f_min=20, f_max=8000),  # a hop beyond the window
]


def of_librosa(waveform: np.ndarray, front_end: FrontEnd) -> np.ndarray:
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=front_end.sampling_rate,
        n_fft=front_end.n_fft,
        hop_length=front_end.hop_length,
        n_mels=front_end.n_mels,
        fmin=front_end.f_min,
        fmax=front_end.f_max,
        power=2,
        center=True,
        pad_mode="constant",
        htk=False,
        norm="slaney",
    )
    return np.log(power + front_end.eps)


def sound(kind: str, length: int, seed: int, rate: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(length) / rate
    waveform = {
        "noise": lambda: rng.normal(size=length),
        "tone": lambda: np.sin(2 * np.pi * rng.uniform(100, 3000) * time),
        "decay": lambda: np.sin(2 * np.pi * 440 * time) * np.exp(-20 * time) + 1e-3 * rng.normal(size=length),
        "clicks": lambda: (rng.random(length) < 0.001).astype(float),
        "silence": lambda: np.zeros(length),
        "constant": lambda: np.ones(length),
    }[kind]()
    return waveform.astype(np.float32)


KINDS = ["noise", "tone", "decay", "clicks", "silence", "constant"]


@pytest.mark.parametrize("front_end", FRONT_ENDS, ids=range(len(FRONT_ENDS)))
def test_filters_equal_librosa(front_end):
    f = front_end
    theirs = librosa.filters.mel(
        sr=f.sampling_rate, n_fft=f.n_fft, n_mels=f.n_mels, fmin=f.f_min, fmax=f.f_max
    )
    np.testing.assert_allclose(mel_filters(f), theirs, rtol=1e-5, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    index=st.integers(0, len(FRONT_ENDS) - 1),
    kind=st.sampled_from(KINDS),
    length=st.integers(1, 9000),
    seed=st.integers(0, 2**32 - 1),
)
@example(index=0, kind="tone", length=1, seed=0)
@example(index=1, kind="noise", length=160, seed=0)
@example(index=1, kind="tone", length=16000, seed=0)
@example(index=5, kind="noise", length=699, seed=0)
@example(index=2, kind="decay", length=2849, seed=1)  # 1.02e-4 away in plain float32
def test_log_mel_equals_librosa(index, kind, length, seed):
    front_end = FRONT_ENDS[index]
    waveform = prepare(sound(kind, length, seed), front_end)
    ours = log_mel(waveform[None], front_end)[0].numpy()
    np.testing.assert_allclose(ours, of_librosa(waveform, front_end), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(
        log_mel_many([waveform], dataclasses.replace(front_end, trim_db=None, scale_rms=False))[0], ours
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_log_mel_equals_librosa_at_a_tiny_eps_and_any_amplitude(kind, dtype):
    front_end = FrontEnd(eps=1e-10)
    for amplitude in (1, 100):
        waveform = (amplitude * sound(kind, 8000, 0)).astype(dtype)
        ours = log_mel(waveform[None], front_end)
        assert ours.dtype == torch.from_numpy(waveform).dtype
        np.testing.assert_allclose(ours[0], of_librosa(waveform, front_end), rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    index=st.integers(0, len(FRONT_ENDS) - 1),
    lengths=st.lists(st.integers(1, 20000), min_size=2, max_size=12),
    seed=st.integers(0, 1000),
)
def test_company_changes_no_bit_of_a_clip(index, lengths, seed):
    front_end = FRONT_ENDS[index]
    clips = [sound(KINDS[(seed + i) % 3], length, seed + i) for i, length in enumerate(lengths)]
    order = np.random.default_rng(seed).permutation(len(clips))
    together = log_mel_many(clips, front_end)
    shuffled = log_mel_many([clips[i] for i in order], front_end)
    for i, j in enumerate(order):
        assert torch.equal(shuffled[i], together[j])
    assert torch.equal(log_mel_many(clips[:1], front_end)[0], together[0])
    equal = np.stack([clips[0]] * 3)
    raw = dataclasses.replace(front_end, trim_db=None, scale_rms=False)
    alone = log_mel_many(clips[:1], raw)[0]
    assert all(torch.equal(x, alone) for x in log_mel(equal, raw))


def test_more_than_one_tape_and_longer_clips_than_a_block():
    front_end = FrontEnd()
    clips = [sound("noise", 300_000, i) for i in range(4)]
    assert 300_000 // front_end.hop_length > BLOCK_FRAMES
    for clip, ours in zip(clips, log_mel_many(clips, front_end), strict=True):
        np.testing.assert_allclose(ours, of_librosa(prepare(clip, front_end), front_end), rtol=0, atol=1e-4)
    assert log_mel_many([], front_end) == []


def test_inputs_of_many_kinds():
    front_end = FrontEnd()
    waveform = sound("noise", 500, 0)
    readonly = waveform.copy()
    readonly.setflags(write=False)
    expected = log_mel_many([waveform], front_end)[0]
    for same in (
        readonly,
        torch.from_numpy(waveform),
        waveform.tolist(),
        waveform.astype(np.float64),
        waveform[::-1][::-1],
    ):
        assert torch.equal(log_mel_many([same], front_end)[0], expected)
    assert torch.isfinite(log_mel_many([np.int16([5, -5] * 300)], front_end)[0]).all()
    assert log_mel(torch.from_numpy(waveform)[None].bfloat16(), front_end).dtype == torch.float32
    assert not log_mel(torch.ones(1, 50, requires_grad=True), front_end).requires_grad


@pytest.mark.parametrize(
    "waveform", [np.zeros((2, 100)), np.zeros(0), np.float32([1, np.nan]), np.float32([np.inf, 0])]
)
@pytest.mark.parametrize("trim_db", [None, 30])
def test_unusable_waveforms_are_refused(waveform, trim_db):
    with pytest.raises(ValueError, match="waveform"):
        log_mel_many([waveform], FrontEnd(trim_db=trim_db))
    with pytest.raises(ValueError, match="batch"):
        log_mel(np.zeros((0,)), FrontEnd())


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.sampled_from([0.0, 1e-4, 0.01, 0.1, 1.0]), min_size=1, max_size=9),
    rest=st.integers(0, 15),
    trim_db=st.sampled_from([10.0, 30.0, 60.0]),
)
def test_trim_equals_a_loop_over_frames(levels, rest, trim_db):
    waveform = np.repeat(np.float32(levels), 16)
    waveform = np.append(waveform, np.full(rest, 0.5, np.float32))
    frames = [waveform[i : i + 16] for i in range(0, len(waveform), 16)]
    power = [float(np.mean(np.square(x, dtype=np.float64))) for x in frames]
    loud = [i for i, p in enumerate(power) if p >= max(power) * 10 ** (-trim_db / 10) * 0.999]
    expected = np.concatenate(frames[loud[0] : loud[-1] + 1])
    np.testing.assert_array_equal(trim(waveform, trim_db, 16), expected)


def test_trim_keeps_at_least_the_loudest_frame():
    click = np.zeros(1000, np.float32)
    click[500] = 1
    assert 1 <= len(trim(click, 30, 100)) <= 100
    assert len(trim(np.zeros(1000, np.float32), 30)) == 1000
    assert len(trim(np.ones(1, np.float32), 30)) == 1
    assert trim(click, None) is click


def test_scaling_makes_level_irrelevant():
    front_end = WORDS
    clip = sound("decay", 4000, 0, 8000)
    quiet, loud = log_mel_many([clip * 1e-3, clip * 50], front_end)
    torch.testing.assert_close(quiet, loud, atol=1e-4, rtol=0)
    assert np.sqrt(np.mean(prepare(clip, front_end) ** 2)) == pytest.approx(0.1, rel=1e-5)
    unscaled = dataclasses.replace(front_end, scale_rms=False, trim_db=None)
    np.testing.assert_array_equal(prepare(clip, unscaled), clip)


def test_stretch_resamples_the_whole_clip():
    ramp = torch.linspace(0, 1, 64).repeat(40, 1)
    out = fit_frames(ramp, dataclasses.replace(WORDS, level=False))
    assert out.shape == (1, 40, 32)
    torch.testing.assert_close(
        out[0, :, 1:-1], ramp.unflatten(1, (32, 2)).mean(2)[:, 1:-1]
    )  # antialiased, centred
    single = fit_frames(torch.full((40, 1), 3.0), dataclasses.replace(WORDS, level=False))
    assert (single == 3).all()


@pytest.mark.parametrize(
    ("have", "starts"),
    [(96, [0]), (97, [0, 1]), (144, [0, 48]), (145, [0, 48, 49]), (300, [0, 48, 96, 144, 192, 204])],
)
def test_windows_overlap_by_half_and_end_flush(have, starts):
    x = torch.arange(have).float().repeat(4, 1)
    front_end = FrontEnd(n_mels=4, level=False)
    out = fit_frames(x, front_end)
    assert out.shape == (len(starts), 4, 96) and num_windows(have, front_end) == len(starts)
    assert out[:, 0, 0].tolist() == starts
    assert torch.equal(out[:, 2, -1], out[:, 2, 0] + 95)


def test_a_short_clip_lies_in_the_middle_of_its_own_floor():
    x = torch.randn(4, 10)
    out = fit_frames(x, FrontEnd(n_mels=4, level=False))[0]
    assert torch.equal(out[:, 43:53], x)
    assert (
        torch.equal(out[:, :43], x.amin(1, keepdim=True).expand(4, 43)) and (out[:, 53:] == out[:, :1]).all()
    )


@pytest.mark.parametrize("fit", ["window", "stretch"])
def test_normalisation_takes_one_level_per_clip_then_the_statistics(fit):
    x = torch.randn(5, 250) + 7
    plain = FrontEnd(n_mels=5, fit=fit, level=False)
    levelled = fit_frames(x, dataclasses.replace(plain, level=True))
    torch.testing.assert_close(levelled, fit_frames(x - x.mean(), plain))
    scaled = fit_frames(x, dataclasses.replace(plain, level=True, mean=0.5, std=2.0))
    torch.testing.assert_close(scaled, (levelled - 0.5) / 2)


@pytest.mark.parametrize("front_end", [WORDS, FrontEnd(n_mels=40)], ids=["stretch", "window"])
def test_fit_frames_in_batches_equals_one_by_one(front_end):
    clips = [torch.randn(40, length) for length in (1, 50, 96, 50, 97, 400, 400, 50)]
    for clip, batched in zip(clips, fit_frames_many(clips, front_end), strict=True):
        assert torch.equal(batched, fit_frames(clip, front_end))
        assert torch.equal(batched, fit_frames(clip.numpy(), front_end))
    assert fit_frames(torch.randn(2, 3, 40, 200), front_end).shape[:2] == (2, 3)
    assert fit_frames_many([], front_end) == []


def test_fit_frames_leaves_its_input_alone(tmp_path):
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=(64, 200))
    stored[:] = 1
    stored.flush()
    view = np.memmap(tmp_path / "x", np.float32, "r", shape=(64, 200))
    fit_frames(view, FrontEnd(mean=3))
    assert (view == 1).all()


def test_front_end_round_trip_and_cache_key():
    front_end = FrontEnd(f_min=np.float32(50), std=np.float64(2), n_mels=np.int64(40), trim_db=30)
    restored = FrontEnd.from_dict(json.loads(json.dumps(front_end.to_dict())))
    assert restored == front_end and restored.cache_key == front_end.cache_key
    assert FrontEnd(f_min=50).cache_key == FrontEnd(f_min=50.0).cache_key
    changed = {"frames": 32, "fit": "stretch", "level": False, "mean": 1.0, "std": 3.0}
    for name, value in changed.items():
        assert dataclasses.replace(front_end, **{name: value}).cache_key == front_end.cache_key
    others = {
        "sampling_rate": 22050,
        "n_fft": 512,
        "hop_length": 100,
        "n_mels": 41,
        "f_min": 51,
        "f_max": 7000,
    }
    others |= {"trim_db": None, "scale_rms": False, "eps": 1e-5}
    assert set(changed) | set(others) == {field.name for field in dataclasses.fields(FrontEnd)}
    assert (
        len({dataclasses.replace(front_end, **{name: value}).cache_key for name, value in others.items()})
        == 9
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"n_fft": 255},
        {"n_fft": 0},
        {"hop_length": 1.5},
        {"n_mels": 0},
        {"f_max": 8001},
        {"f_min": 7800},
        {"f_min": -1},
        {"fit": "crop"},
        {"eps": 0},
        {"std": 0},
        {"trim_db": 0},
        {"n_mels": 600},
    ],
)
def test_bad_settings_name_the_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        FrontEnd(**fields)


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match="window_length"):
        FrontEnd.from_dict({"window_length": 3})
