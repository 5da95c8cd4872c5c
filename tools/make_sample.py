"""Make the embedded sample: ten international words in many synthetic voices and accents, by espeak-ng.

    python tools/make_sample.py            # writes src/unfused/data/sample/{clips/<word>/*.ogg, manifest.csv}

Each voice is one language's pronunciation (the words are spelled alike in all of them) with one timbre,
pitch, pace, room and microphone; a voice says each word twice. Each take varies in pitch, pace, level,
background noise and the silence around it. So what differs between two voices is what differs between two
real speakers and their devices, and a model that learns voices instead of words is found out on unheard
voices.

Needs espeak-ng (Debian: `apt install espeak-ng`; version 1.51 made the committed files), soundfile and soxr.
Every random number is drawn from `SEED`, the voice, the word and the take: the same espeak-ng and libsndfile
give the same bytes. The clips are synthetic speech made for this project and are given to the public domain
(CC0-1.0); the GPL of espeak-ng covers the program, not what it says.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SEED = 2303_05668
RATE = 16_000
TAKES = 2
WORDS = ("banana", "mango", "metro", "piano", "polo", "radio", "solo", "tango", "taxi", "video")
LANGUAGES = "cs de en-gb-scotland en-us es fi hu id it nl pl sv".split()
TIMBRES = (
    "m1 f1 m2 f2 m3 f3 m4 f4 m5 f5 m6 linda m7 steph m8 Andrea Alex anika paul belinda victor aunty john "
    "Annie Hugo steph2 zac grandma grandpa steph3 Lee Alicia marcelo Denis pablo max"
).split()
SIGNAL_TO_NOISE = (10.0, 30.0)  # dB
LEVEL = (-38.0, -16.0)  # dB of full scale, root mean square
FOLDER = Path(__file__).parents[1] / "src" / "unfused" / "data" / "sample"


@dataclass(frozen=True)
class Voice:
    """A speaker with the room and microphone he is recorded in."""

    name: str
    espeak: str  # language+variant
    pitch: float  # espeak's 0..99
    pace: float  # words a minute
    tilt: float  # dB an octave around 1 kHz
    band: tuple[float, float]  # Hz
    reverberation: float  # s until the tail is 60 dB down
    noise_slope: float  # of the noise's power spectrum: 0 white, 1 pink, 2 brown

    @classmethod
    def draw(cls, index: int) -> Voice:
        rng = np.random.default_rng([SEED, index])
        language, timbre = LANGUAGES[index % len(LANGUAGES)], TIMBRES[index]
        return cls(
            name=f"{language}-{timbre.lower()}",
            espeak=f"{language}+{timbre}",
            pitch=rng.uniform(30, 70),
            pace=rng.uniform(130, 190),
            tilt=rng.uniform(-2, 2),
            band=(rng.uniform(40, 150), rng.uniform(4500, 7800)),
            reverberation=rng.uniform(0.03, 0.15),
            noise_slope=rng.uniform(0, 2),
        )


def speak(voice: Voice, word: str, rng: np.random.Generator) -> np.ndarray:
    """One clean utterance without the silence around it, float32 (n,) at `RATE`."""
    pitch = int(np.clip(voice.pitch + rng.normal(0, 6), 0, 99))
    pace = int(np.clip(voice.pace * rng.uniform(0.85, 1.15), 110, 220))
    command = ["espeak-ng", "-z", "-v", voice.espeak, "-p", str(pitch), "-s", str(pace), "--stdout", word]
    audio, rate = soundfile.read(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout))
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    return soxr.resample(audio[loud[0] : loud[-1] + 1], rate, RATE)


def record(voice: Voice, clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The utterance as the voice's room, microphone and background leave it, float32 (n,) at `RATE`."""
    before, after = (int(RATE * rng.uniform(0.02, 0.2)) for _ in range(2))
    audio = np.pad(clean, (before, after))
    n = int(RATE * voice.reverberation)
    tail = 0.15 * rng.normal(size=n) * 10 ** (-3 * np.arange(n) / n)
    tail[0] = 1.0
    audio = np.convolve(audio, tail)[: len(audio)]

    frequency = np.fft.rfftfreq(len(audio), 1 / RATE)
    low, high = voice.band
    microphone = (np.maximum(frequency, 50) / 1000) ** (voice.tilt / 6.02)
    microphone /= np.sqrt((1 + (low / np.maximum(frequency, 1)) ** 4) * (1 + (frequency / high) ** 8))
    audio = np.fft.irfft(np.fft.rfft(audio) * microphone, len(audio))

    spectrum = np.fft.rfft(rng.normal(size=len(audio))) * np.maximum(frequency, 50) ** (
        -voice.noise_slope / 2
    )
    noise = np.fft.irfft(spectrum, len(audio))
    ratio = rng.uniform(*SIGNAL_TO_NOISE)
    audio += noise * np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-ratio / 20)
    level = rng.uniform(*LEVEL)
    audio *= 10 ** (level / 20) / np.sqrt(np.mean(audio**2))
    return np.clip(audio, -1, 1).astype(np.float32)


def encode(audio: np.ndarray) -> bytes:
    """Ogg Opus at about 31 kbit/s, always with stream number 0: libsndfile draws it from the clock."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, RATE, format="OGG", subtype="OPUS", compression_level=0.9)
    data = bytearray(buffer.getvalue())
    start = 0
    while start < len(data):  # page header: 27 bytes, then one length byte for each of its segments
        segments = data[start + 26]
        end = start + 27 + segments + sum(data[start + 27 : start + 27 + segments])
        data[start + 14 : start + 18] = bytes(4)
        data[start + 22 : start + 26] = bytes(4)
        data[start + 22 : start + 26] = _ogg_crc(data[start:end]).to_bytes(4, "little")
        start = end
    return bytes(data)


def _ogg_crc(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ 0x104C11DB7 if crc & 0x80000000 else crc << 1
    return crc


def main() -> None:
    clips = FOLDER / "clips"
    shutil.rmtree(clips, ignore_errors=True)
    rows = []
    for index in range(len(TIMBRES)):
        voice = Voice.draw(index)
        for w, word in enumerate(WORDS):
            (clips / word).mkdir(parents=True, exist_ok=True)
            for take in range(TAKES):
                rng = np.random.default_rng([SEED, index, w, take])
                path = clips / word / f"{word}_{voice.name}_{take}.ogg"
                path.write_bytes(encode(record(voice, speak(voice, word, rng), rng)))
                rows.append((path.relative_to(FOLDER).as_posix(), word, voice.name))
    with open(FOLDER / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "group"))
        writer.writerows(sorted(rows))
    size = sum(path.stat().st_size for path in clips.rglob("*.ogg"))
    print(f"{len(rows)} clips of {len(TIMBRES)} voices, {size / 1e6:.2f} MB in {FOLDER}")


if __name__ == "__main__":
    main()
