"""Recordings: any file that libsndfile reads becomes mono float32 at one rate, or a reason why not."""

from __future__ import annotations

import base64
import io
import math
import os
import re

import numpy as np
import soundfile
import soxr

from unfused.data.files import BadFile, check_file, kind_of

__all__ = ["AUDIO_EXTENSIONS", "decode", "encode_preview"]

# The last eight cannot be read, but a folder that holds them should say so rather than look empty.
AUDIO_EXTENSIONS = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64"
    " .m4a .mp4 .aac .wma .webm .amr .3gp .mka".split()
)
MIN_SECONDS = 0.01
MAX_SECONDS = 6 * 3600
MAX_PEAK = 1e9  # its square still fits float32, summed over a window
SILENCE = 1e-6  # peak to peak: -120 dB of full scale

_BLOCK_FRAMES = 1 << 16
_UNREADABLE = ("MPEG-4", "Matroska", "Windows Media", "AMR")
_SOUND = ("recording", "an Ogg file", "a RIFF file", "unknown data")
# libsndfile reads a cut-off file without complaint, but notes in its log what the header had promised.
_CUT_CHUNK = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_CUT_STREAM = "without an End-Of-Stream flag"
_UNKNOWN_LENGTH = 0x7FFF0000  # what programs that write to a pipe put there instead of a length


def decode(path: str | os.PathLike[str], sampling_rate: int = 16000) -> np.ndarray:
    """Read a recording, mix its channels to one and resample it.

    Reads and resamples block by block: beside the result, memory does not grow with the recording's length.
    Safe to call from several threads; most of the work runs outside Python's lock.

    Parameters
    ----------
    path : path
        WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, AU, CAF, W64 or RF64; the name's extension is not relied on.
    sampling_rate : int, default=16000
        In Hz, of the result.

    Returns
    -------
    ndarray of shape (n,), float32
        The mean of the channels.

    Raises
    ------
    BadFile
        Missing, empty, not audio, damaged, cut off, silent, shorter than 10 ms, longer than 6 hours, or with
        samples that are not finite numbers.

    Examples
    --------
    >>> import tempfile, soundfile
    >>> path = os.path.join(tempfile.mkdtemp(), "tone.wav")
    >>> soundfile.write(path, np.sin(np.arange(44100) / 20), 44100)
    >>> decode(path, 16000).shape
    (16000,)
    """
    check_file(path)
    try:
        # Bytes, since a str would have to be valid UTF-8.
        with soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else os.fspath(path)) as file:
            length_is_known = file.format != "MP3" or _mp3_states_length(path)
            return _mono(file, sampling_rate, length_is_known)
    except BadFile:
        raise
    except Exception as error:  # libsndfile's errors come as several types, none of which may stop a run
        raise BadFile(_reason(path, error)) from error


def _mono(file: soundfile.SoundFile, sampling_rate: int, length_is_known: bool) -> np.ndarray:
    rate, frames = file.samplerate, file.frames
    _check_header(file)
    stream = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32") if rate != sampling_rate else None
    waveform = np.empty(math.ceil(frames * sampling_rate / rate) + 1, np.float32)
    block = np.empty((min(frames, _BLOCK_FRAMES), file.channels), np.float32)
    low, high, read, filled = np.inf, -np.inf, 0, 0
    while True:
        samples = file.read(out=block[: frames - read]) if read < frames else block[:0]  # (frames, channels)
        mono = samples.mean(axis=1) if file.channels > 1 else samples[:, 0]
        last = not len(mono)
        if last and read < frames and length_is_known:
            raise BadFile(f"truncated: {read:,} of {frames:,} samples could be read")
        if not last:
            read += len(mono)
            low, high = min(low, mono.min()), max(high, mono.max())
            if not np.isfinite(high - low):
                raise BadFile("NaN or infinite samples")
        if stream is not None:
            mono = stream.resample_chunk(mono, last=last)
        waveform[filled : filled + len(mono)] = mono
        filled += len(mono)
        if last:
            break
    if high - low <= SILENCE:
        raise BadFile("silent" if read else "no samples")
    if max(high, -low) > MAX_PEAK:
        raise BadFile(f"samples out of range: up to {max(high, -low):.0e}")
    return waveform[:filled]


def _mp3_states_length(path: str | os.PathLike[str]) -> bool:
    """Whether an MP3 has a Xing header; without one its length is a guess from the first bit rate."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # tags come first, their size in four times seven bits
            size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
            file.seek(10 + size)
        start = file.read(4096)
        return b"Xing" in start or b"Info" in start


def _check_header(file: soundfile.SoundFile) -> None:
    """Find what can be known to be wrong before any sample is decoded."""
    log, rate, frames = file.extra_info, file.samplerate, file.frames
    for promised, there in ((int(a), int(b)) for a, b in _CUT_CHUNK.findall(log)):
        if there < promised < _UNKNOWN_LENGTH:
            raise BadFile(f"truncated: {there:,} of {promised:,} bytes are there")
    if _CUT_STREAM in log:
        raise BadFile("truncated: the Ogg stream has no end")
    if not 100 <= rate <= 10_000_000:
        raise BadFile(f"an impossible sampling rate of {rate:,} Hz")
    if frames == 0:
        raise BadFile("no samples")
    if frames < MIN_SECONDS * rate:
        raise BadFile(f"too short: {frames} sample{'s' * (frames > 1)}")
    if frames > MAX_SECONDS * rate:
        raise BadFile(f"longer than {MAX_SECONDS // 3600} hours: cut it into pieces")


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    kind = kind_of(path)
    if any(name in kind for name in _UNREADABLE):
        return f"{kind}, which cannot be read here: convert it to WAV, FLAC, Ogg or MP3"
    if not kind.endswith(_SOUND):
        return f"not audio: {kind}"
    message = str(getattr(error, "error_string", error)).strip().rstrip(".")
    return f"not audio, or damaged: {message}"


def encode_preview(path: str | os.PathLike[str], seconds: float = 3.0, rate: int = 16000) -> str:
    """Encode the loudest few seconds of a recording for a web page: about 5 kB of MP3 per second, in base64.

    Parameters
    ----------
    path : path
        A recording that `decode` reads.
    seconds : float, default=3.0
        At most this much of it.
    rate : int, default=16000
        Sampling rate in Hz.

    Returns
    -------
    str
        ``data:audio/mpeg;base64,...``, scaled to a peak of 0.9.

    Raises
    ------
    BadFile
        As `decode` does.
    """
    waveform = decode(path, rate)
    length = max(1, round(seconds * rate))
    if len(waveform) > length:
        energy = np.cumsum(np.square(waveform, dtype=np.float64))
        start = int(np.argmax(energy[length:] - energy[:-length]))
        waveform = waveform[start : start + length]
    waveform = waveform * (0.9 / max(float(np.abs(waveform).max()), 1e-12))
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="MP3", bitrate_mode="VARIABLE", compression_level=0.7)
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
