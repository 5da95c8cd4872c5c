"""A corpus as it comes: all that can be wrong with a recording is wrong once."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

RATE = 16000


def tone(seconds: float = 0.3, rate: int = RATE, pitch: float = 440.0, channels: int = 1) -> np.ndarray:
    """(samples,), or (samples, channels)."""
    wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def encode(samples: np.ndarray, rate: int = RATE, **how: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **({"format": "WAV"} | how))
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A killed process leaves its writes to the system: waiting for the platter is for power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def make_tone(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, folder: Path = tmp_path, **how: float) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(tone(**how), int(how.get("rate", RATE))))  # type: ignore[arg-type]
        return path

    return make


@pytest.fixture
def bad_recordings(tmp_path: Path) -> tuple[Path, dict[str, str | None]]:
    """A folder, and for each of its files a part of the reason why it is bad, or None where it is good."""
    folder = tmp_path / "bad corpus"
    folder.mkdir()
    good = encode(tone())
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    spoilt = tone()
    contents: dict[str, tuple[bytes, str | None]] = {
        "zero.wav": (b"", "empty file"),
        "header only.wav": (good[:44], "truncated"),
        "cut.wav": (good[: len(good) // 2], "truncated"),
        "cut.flac": (encode(tone(), format="FLAC")[:-2000], "lost sync"),
        "cut.ogg": (encode(tone(2.0), format="OGG")[:-500], "truncated"),
        "cut.mp3": (encode(tone(4.0), format="MP3")[:4000], "truncated"),
        "picture.wav": (png.getvalue(), "a PNG picture"),
        "text.wav": (b"path,label\na.wav,dog\n" * 20, "not audio: text"),
        "page.mp3": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        "noise.wav": (np.random.default_rng(0).bytes(5000), "not audio"),
        "zeros.wav": (bytes(4096), "nothing but zero bytes"),
        "phone.m4a": (b"\x00\x00\x00\x20ftypM4A \x00\x00\x00\x00" + bytes(500), "convert it"),
        "nan.wav": (encode(np.where(np.arange(len(spoilt)) == 99, np.nan, spoilt), subtype="FLOAT"), "NaN"),
        "inf.wav": (encode(np.where(np.arange(len(spoilt)) == 99, np.inf, spoilt), subtype="FLOAT"), "NaN"),
        "huge.wav": (encode(1e30 * spoilt, subtype="FLOAT"), "out of range"),
        "silence.wav": (encode(np.zeros(8000)), "silent"),
        "offset.wav": (encode(np.full(8000, 0.25)), "silent"),
        "one sample.wav": (encode(np.array([0.5])), "too short: 1 sample"),
        "few samples.wav": (encode(tone(0.005)), "too short: 80 samples"),
        "no samples.wav": (encode(np.zeros(0)), "no samples"),
        "1 Hz.wav": (encode(tone(), 1), "impossible sampling rate of 1 Hz"),
        "eight channels.wav": (encode(tone(channels=8)), None),
        "192 kHz.wav": (encode(tone(rate=192000), 192000, subtype="PCM_24"), None),
        "8 kHz.wav": (encode(tone(rate=8000), 8000, subtype="ULAW"), None),
        "really flac.wav": (encode(tone(), format="FLAC"), None),
        "streamed.wav": (good[:4] + b"\xff" * 4 + good[8:40] + b"\xff" * 4 + good[44:], None),
        "with 'quotes\" and, comma.wav": (good, None),
        "new\nline.wav": (good, None),
        "<script>alert(1)</script>".replace("/", "-") + ".wav": (good, None),
        "größe 音.wav": (good, None),
        os.fsdecode(b"latin1 \xe9\xff.wav"): (good, None),
        "-rf.wav": (good, None),
        "x" * 250 + ".wav": (good, None),
        "UPPER.WAV": (good, None),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    reasons = {name: reason for name, (_, reason) in contents.items()}
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    (folder / "circle.wav").symlink_to(folder / "circle.wav")
    os.mkfifo(folder / "pipe.wav")
    reasons |= {"gone.wav": "dangling link", "circle.wav": "circle", "pipe.wav": "not a regular file"}
    # A folder called like a recording is just a folder; links that lead back up are not followed again.
    (folder / "folder.wav").mkdir()
    (folder / "folder.wav" / "inside.wav").write_bytes(good)
    (folder / "folder.wav" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    reasons["folder.wav/inside.wav"] = None
    (folder / ".hidden.wav").write_bytes(good)
    (folder / "notes.txt").write_text("not a recording")
    return folder, reasons
