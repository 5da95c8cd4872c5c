from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from unfused.data.audio import AUDIO_EXTENSIONS, decode, encode_preview
from unfused.data.files import BadFile


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 192000])
@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("seconds", [0.02, 4.1])
def test_decode_equals_soxr_on_the_whole(tmp_path: Path, rate: int, channels: int, seconds: float) -> None:
    samples = np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", samples / 10, rate, subtype="FLOAT")
    ours = decode(tmp_path / "x.wav", 16000)
    mono = (samples / 10).mean(axis=1)
    whole = mono if rate == 16000 else soxr.resample(mono, rate, 16000)
    assert ours.dtype == np.float32 and ours.ndim == 1 and abs(len(ours) - len(whole)) <= 1
    common = min(len(ours), len(whole))
    np.testing.assert_allclose(ours[:common], whole[:common], atol=1e-6)


@pytest.mark.parametrize("how", ["FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64"])
def test_formats(tmp_path: Path, how: str) -> None:
    wave = 0.3 * np.sin(np.arange(16000) / 10)
    soundfile.write(tmp_path / "x.bin", wave, 16000, format=how)  # whatever the extension
    decoded = decode(tmp_path / "x.bin")
    assert len(decoded) == 16000
    np.testing.assert_allclose(decoded[2000:-2000], wave[2000:-2000], atol=0.05)


def test_bad_recordings(bad_recordings: tuple[Path, dict[str, str | None]]) -> None:
    folder, reasons = bad_recordings
    for name, reason in reasons.items():
        if reason is None:
            decoded = decode(folder / name)
            assert abs(len(decoded) - 4800) <= 1 and np.isfinite(decoded).all()
        else:
            with pytest.raises(BadFile) as caught:
                decode(folder / name)
            assert reason in caught.value.reason, (name, caught.value.reason)
            assert caught.value.reason.isprintable()


@pytest.mark.parametrize("how", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, how: str) -> None:
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    soundfile.write(buffer, generator.standard_normal((4000, 2)) / 10, 16000, format=how)
    path = tmp_path / "x.wav"
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for place in (len(content) * generator.random(4) ** 3).astype(int):
            content[place] = generator.integers(256)
        path.write_bytes(content[: int(len(content) * generator.uniform(0.5, 1.5))])
        try:
            decoded = decode(path)
        except BadFile:
            continue
        assert decoded.dtype == np.float32 and len(decoded) > 1 and np.isfinite(decoded).all()


def test_mp3_without_a_length(tmp_path: Path) -> None:
    quiet_then_loud = np.concatenate([np.zeros(32000), 0.3 * np.random.default_rng(0).standard_normal(32000)])
    buffer = io.BytesIO()
    soundfile.write(buffer, quiet_then_loud, 16000, format="MP3", bitrate_mode="VARIABLE")
    content = buffer.getvalue()
    second_frame = content.index(content[:2], 10)
    path = tmp_path / "x.mp3"
    path.write_bytes(content[second_frame:])  # the first holds the length; the estimate is twice too long
    assert abs(len(decode(path)) - 64000) < 3000


def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "x.wav", np.ones(20000) / 2, 16000)
    monkeypatch.setattr("unfused.data.audio.MAX_SECONDS", 1)
    with pytest.raises(BadFile, match="cut it into pieces"):
        decode(tmp_path / "x.wav")


def test_unreadable_and_vanished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadFile, match="no such file"):
        decode(tmp_path / "x.wav")
    soundfile.write(tmp_path / "x.wav", np.ones(1000) / 2, 16000)
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no memory"))
    )
    with pytest.raises(BadFile, match="no memory"):
        decode(tmp_path / "x.wav")


def test_threads_give_what_one_thread_gives(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{k}.flac" for k in range(24)]
    for path in paths:
        soundfile.write(path, generator.standard_normal(4000) / 10, 44100)
    with ThreadPoolExecutor(4) as pool:
        for one, several in zip(map(decode, paths), pool.map(decode, paths), strict=True):
            assert np.array_equal(one, several)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_long_recording_takes_little_memory_beside_the_result(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "x.flac", "w", 48000, 8) as file:
        block = np.random.default_rng(0).standard_normal((48000, 8)) / 1000
        for _ in range(60):
            file.write(block)
    script = (
        "import re, sys; sys.path[:0] = sys.argv[2:]\n"
        "from unfused.data.audio import decode\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); n = len(decode(sys.argv[1])); print((peak() - before) * 1024 - 4 * n)"
    )
    output = subprocess.check_output([sys.executable, "-c", script, str(tmp_path / "x.flac"), *sys.path])
    assert int(output) < 30e6  # whole in float64: 184 MB


def test_preview(tmp_path: Path) -> None:
    wave = np.concatenate([np.zeros(160000), 0.01 * np.sin(np.arange(32000) / 5), np.zeros(160000)])
    path = tmp_path / os.fsdecode(b"\xff<script>.wav")
    soundfile.write(os.fsencode(path), wave, 16000, format="WAV")
    kind, _, content = encode_preview(path, seconds=2).partition(",")
    assert kind == "data:audio/mpeg;base64" and len(content) < 20_000
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert rate == 16000 and abs(len(samples) - 32000) < 3000
    assert 0.8 < np.abs(samples).max() < 1.0  # the loud part, made louder


def test_extensions_are_lower_case_with_dot() -> None:
    assert all(e.startswith(".") and e == e.lower() for e in AUDIO_EXTENSIONS)
