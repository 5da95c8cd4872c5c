"""Reading data: the feature cache, log-mels beside librosa's, memory by the number of recordings, scans.

Run `python benchmarks/bench_data.py [FOLDER]`. Without a folder: the spoken digits of `../shared/data`
where they are, else the embedded sample. Each line ends in the aim and whether it was met.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from unfused.data.audio import decode
from unfused.data.features import read_features
from unfused.data.files import Quarantine
from unfused.data.manifest import read_manifest
from unfused.data.sample import sample_folder
from unfused.nn.log_mel import FrontEnd, log_mel_many

DIGITS = Path(__file__).resolve().parents[2] / "shared" / "data" / "audio" / "fsdd"
ROUNDS = 5


def line(name: str, figures: str, met: bool, aim: str) -> None:
    print(f"{name}: {figures} (aim {aim}: {'met' if met else 'NOT met'})", flush=True)


def cache(folder: Path) -> None:
    """A run that decodes everything, and a second run over the same folder."""
    front_end = FrontEnd()
    for path in folder.rglob("*"):  # both runs find the files in the system's cache
        if path.is_file():
            path.read_bytes()
    first, second = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as scratch:
            for spent in (first, second):
                start = time.perf_counter()
                manifest = read_manifest(folder)
                features = read_features(manifest, front_end, scratch, Quarantine()).features
                spent.append(time.perf_counter() - start)
                assert len(features) == len(manifest)
    ratio = min(first) / min(second)
    figures = (
        f"{len(manifest):,} recordings, first {min(first):.2f} s, second {min(second):.3f} s, {ratio:.0f}x"
    )
    line("feature cache", figures, ratio >= 10, ">= 10x")


def log_mels(folder: Path) -> None:
    """The same clips, one thread each, log-mels of equal value."""
    import librosa

    manifest = read_manifest(folder)
    for name, front_end in {
        "16 kHz, 64 mels, n_fft 1024": FrontEnd(scale_rms=False),
        "8 kHz, 40 mels, n_fft 256": FrontEnd(
            sampling_rate=8000, n_fft=256, hop_length=64, n_mels=40, f_min=50.0, f_max=4000.0, scale_rms=False
        ),
    }.items():
        paths = manifest.paths[:: max(1, len(manifest) // 400)]
        clips = [decode(manifest.root / path, front_end.sampling_rate) for path in paths]
        ours, theirs = [], []
        for _ in range(ROUNDS):  # in turns, so that what else the machine does hits both
            start = time.perf_counter()
            a = log_mel_many(clips, front_end)
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            b = [
                np.log(
                    librosa.feature.melspectrogram(
                        y=clip,
                        sr=front_end.sampling_rate,
                        n_fft=front_end.n_fft,
                        hop_length=front_end.hop_length,
                        n_mels=front_end.n_mels,
                        fmin=front_end.f_min,
                        fmax=front_end.f_max,
                    )
                    + front_end.eps
                )
                for clip in clips
            ]
            theirs.append(time.perf_counter() - start)
        difference = max(float(np.abs(x.numpy() - y).max()) for x, y in zip(a, b, strict=True))
        ratio = min(theirs) / min(ours)
        per_clip = (
            f"{min(ours) / len(clips) * 1e6:.0f} us a clip against {min(theirs) / len(clips) * 1e6:.0f}"
        )
        figures = f"{name}, {per_clip}, {ratio:.1f}x, largest difference {difference:.0e}"
        line("log-mel beside librosa", figures, ratio >= 5 and difference < 1e-4, ">= 5x, < 1e-4")


READ = """
import re, sys
from pathlib import Path
from unfused.data.features import read_features
from unfused.data.files import Quarantine
from unfused.data.manifest import read_manifest
from unfused.nn.log_mel import FrontEnd
read_features(read_manifest(sys.argv[1]), FrontEnd(), sys.argv[2], Quarantine(), workers=2)
# Not ru_maxrss: a child begins with what its parent had.
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def memory() -> None:
    """Peak memory of a process that reads few recordings, and of one that reads many (Linux only)."""
    if not Path("/proc/self/status").exists():
        return
    generator = np.random.default_rng(0)
    few, many = 2000, 6000
    with tempfile.TemporaryDirectory() as scratch:
        for count in (few, many):
            folder = Path(scratch, str(count))
            folder.mkdir()
            for k in range(count):
                samples = generator.integers(-9999, 9999, 1600, dtype=np.int16)
                content = io.BytesIO()  # written to a file directly, each would be flushed to the disk
                soundfile.write(content, samples, 16000, format="WAV")
                (folder / f"{k}.wav").write_bytes(content.getvalue())
        peaks, sizes = [], []
        for count in (few, many):
            cached = Path(scratch, f"cache-{count}")
            command = [sys.executable, "-c", READ, f"{scratch}/{count}", str(cached)]
            peaks.append(
                int(subprocess.check_output(command, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}))
            )
            sizes.append(sum(path.stat().st_size for path in cached.iterdir()) / 1024)
    growth, stored = ((b - a) / 1024 / (many - few) * 1000 for a, b in (peaks, sizes))
    figures = f"{peaks[0] / 1024:.0f} MiB for {few:,}, {peaks[1] / 1024:.0f} MiB for {many:,} recordings; "
    figures += f"{growth:.1f} MiB more per 1,000, while the cache grows by {stored:.1f} MiB on disk"
    line("peak memory", figures, growth < 2, "< 2 MiB: names and places, no sound")


def scanning() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for k in range(10_000):
            Path(scratch, f"{k}.wav").touch()
        start = time.perf_counter()
        assert len(read_manifest(scratch)) == 10_000
        spent = time.perf_counter() - start
    line("scan", f"10,000 files in one folder, {spent * 1000:.0f} ms", spent < 2, "< 2 s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=DIGITS if DIGITS.is_dir() else sample_folder()
    )
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    cache(folder)
    log_mels(folder)
    memory()
    scanning()


if __name__ == "__main__":
    main()
