"""Log-mel front end: waveforms in, normalised canvases for an encoder out.

This file needs only numpy and torch: it is copied into every saved model folder, so that a model can be loaded
where `unfused` is not installed.

Speed comes from one idea. Clips of any lengths are laid on one long tape with half a window of silence between
neighbours; because centred frames look no further than that, every frame of the tape that belongs to a clip equals the
frame which that clip alone would give. The tape is transformed in blocks of a fixed number of frames, which keeps the
work inside the processor's cache and makes a clip's result independent, to the last bit, of its company.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

__all__ = [
    "FrontEnd",
    "fit_frames",
    "fit_frames_many",
    "log_mel",
    "log_mel_many",
    "mel_filters",
    "num_windows",
    "prepare",
    "trim",
]

TARGET_RMS = 0.1
BLOCK_FRAMES = 256  # transformed at once on a CPU: large enough for the kernels, small enough for the cache
EXACT_FRAMES = 32  # transformed at once in float64, where float32 would not do
BAND = 16  # mel filters applied in one matrix product: a vector register of float32
TAPE_SAMPLES = 1 << 19  # a tape is closed beyond this; bounds the memory of `log_mel_many` besides its result


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """Everything that turns a waveform into an encoder's input.

    Parameters
    ----------
    sampling_rate : int, default=16000
        Samples per second of the waveforms.
    n_fft : int, default=1024
        Samples of a (Hann) analysis window; even.
    hop_length : int, default=160
        Samples between the centres of neighbouring frames.
    n_mels : int, default=64
        Number of mel filters (Slaney scale, Slaney area normalisation).
    f_min, f_max : float, default=60.0, 7800.0
        Lower and upper edge of the filters in Hz.
    trim_db : float or None, default=None
        Cut what lies more than this many dB below the loudest 16 ms from both ends of a clip. None: cut nothing.
    scale_rms : bool, default=True
        Scale every waveform to a root mean square of 0.1 after trimming, so that `eps` is the same floor for all.
    eps : float, default=1e-6
        Added to the mel power before the logarithm. At an RMS of 0.1 it lies about 45 dB (n_fft 256, 8 kHz) to 54 dB
        (n_fft 1024, 16 kHz) below the mean power of a flat spectrum.
    frames : int, default=96
        Width of the canvas that the encoder sees.
    fit : {"window", "stretch"}, default="window"
        How a clip gets `frames` frames. "window": a shorter clip is centred on its own floor, a longer one is cut into
        windows that overlap by half. "stretch": the whole clip is resampled, which suits isolated words.
    level : bool, default=True
        Subtract one number from each clip, its mean over all bins and frames.
    mean, std : float, default=0.0, 1.0
        Statistics of the data set, over all bins and frames, after `level`: the canvas is `(x - mean) / std`.

    Raises
    ------
    ValueError
        If a field is out of range, or a mel filter would be so narrow that it holds no FFT bin.

    Examples
    --------
    >>> front_end = FrontEnd(sampling_rate=8000, n_fft=256, hop_length=64, n_mels=40, f_min=50, f_max=4000)
    >>> log_mel(np.ones((2, 8000)), front_end).shape
    torch.Size([2, 40, 126])
    >>> FrontEnd.from_dict(front_end.to_dict()) == front_end
    True
    """

    sampling_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    n_mels: int = 64
    f_min: float = 60.0
    f_max: float = 7800.0
    trim_db: float | None = None
    scale_rms: bool = True
    eps: float = 1e-6
    frames: int = 96
    fit: str = "window"
    level: bool = True
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "n_fft", "hop_length", "n_mels", "frames"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number, 1 or more")
            object.__setattr__(self, name, int(value))
        for name in ("f_min", "f_max", "eps", "mean", "std", "trim_db"):  # 50 and 50.0 must be one cache key
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.n_fft % 2:
            raise ValueError(f"n_fft={self.n_fft}: give an even number")
        if not 0 <= self.f_min < self.f_max <= self.sampling_rate / 2:
            raise ValueError(
                f"f_min={self.f_min}, f_max={self.f_max}: 0 <= f_min < f_max <= {self.sampling_rate / 2:g} Hz must "
                f"hold at sampling_rate={self.sampling_rate}"
            )
        if self.fit not in ("window", "stretch"):
            raise ValueError(f"fit={self.fit!r}: give 'window' or 'stretch'")
        for name in ("eps", "std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number above 0")
        if self.trim_db is not None and not self.trim_db > 0:
            raise ValueError(f"trim_db={self.trim_db!r}: give a number of dB above 0, or None")
        mel_filters(self)

    @property
    def cache_key(self) -> str:
        """Name of the settings that decide a whole clip's log-mel, for a feature cache."""
        later = {"frames", "fit", "level", "mean", "std"}  # applied to what comes from the cache
        fields = {name: value for name, value in self.to_dict().items() if name not in later}
        text = json.dumps({"version": 1} | fields, sort_keys=True)
        return "log-mel-" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> FrontEnd:
        """The inverse of `to_dict`; an unknown name raises ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"unknown front-end fields {unknown}; there are {known}")
        return cls(**fields)


def mel_filters(front_end: FrontEnd) -> np.ndarray:
    """Slaney's mel filters, equal to `librosa.filters.mel(htk=False, norm="slaney")`.

    Returns
    -------
    numpy.ndarray of shape (n_mels, 1 + n_fft // 2), float32
        Read-only: it is shared by all callers.
    """
    f = front_end
    return _mel_filters(f.sampling_rate, f.n_fft, f.n_mels, f.f_min, f.f_max)


@lru_cache(maxsize=32)
def _mel_filters(sampling_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float) -> np.ndarray:
    # Slaney's scale: linear below 1 kHz (15 mel), logarithmic above with 27 mel to a factor of 6.4
    step, knee, log_step = 200 / 3, 1000.0, np.log(6.4) / 27

    def to_mel(hertz: float) -> float:
        return hertz / step if hertz < knee else knee / step + np.log(hertz / knee) / log_step

    mels = np.linspace(to_mel(f_min), to_mel(f_max), n_mels + 2)
    edges = np.where(mels < knee / step, mels * step, knee * np.exp(log_step * (mels - knee / step)))[:, None]
    bins = np.fft.rfftfreq(n_fft, 1 / sampling_rate)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (bins - low) / (centre - low), (high - bins) / (high - centre)
    filters = np.maximum(0, np.minimum(rise, fall)) * (2 / (high - low))
    if not filters.any(axis=1).all():
        raise ValueError(
            f"n_mels={n_mels} with n_fft={n_fft} at {sampling_rate} Hz leaves mel filters without a single FFT bin: "
            "lower n_mels or raise n_fft"
        )
    filters = filters.astype(np.float32)
    filters.setflags(write=False)
    return filters


@lru_cache(maxsize=32)
def _window_and_bands(
    front_end: FrontEnd, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
    """The analysis window, and per 16 filters: the FFT bins they use, and a matrix (bins, 16) from these.

    A filter is zero outside a few bins, and a band's matrix leaves most of these zeros out. The last band is filled
    up with filters of zeros: with columns that do not fill a register, results depend on a row's place in the block.
    """
    filters = np.pad(mel_filters(front_end), ((0, -front_end.n_mels % BAND), (0, 0)))
    bands = []
    for band in filters.reshape(-1, BAND, filters.shape[1]):
        used = np.flatnonzero(band.any(axis=0))
        bins = slice(used[0], used[-1] + 1)
        bands.append((bins, torch.from_numpy(band[:, bins].T.copy()).to(device, dtype)))
    return torch.hann_window(front_end.n_fft, dtype=torch.float64).to(device, dtype), bands


def trim(waveform: np.ndarray, trim_db: float | None, frame_length: int = 256) -> np.ndarray:
    """Cut the quiet ends off a clip.

    Parameters
    ----------
    waveform : numpy.ndarray of shape (n,)
    trim_db : float or None
        Frames whose mean power lies more than `trim_db` dB below that of the loudest frame are cut, from both ends up to
        the first frame that is louder. None: the clip is returned as it is.
    frame_length : int, default=256
        Samples per (non-overlapping) frame.

    Returns
    -------
    numpy.ndarray of shape (m,), 1 <= m <= n
        A view; at least the loudest frame. A silent clip stays whole.

    Examples
    --------
    >>> trim(np.repeat([0.0, 1.0, 0.5, 0.001], 4), trim_db=30, frame_length=4)
    array([1. , 1. , 1. , 1. , 0.5, 0.5, 0.5, 0.5])
    """
    if trim_db is None:
        return waveform
    whole = len(waveform) // frame_length * frame_length
    frames, rest = waveform[:whole].reshape(-1, frame_length), waveform[whole:]
    power = np.einsum("ij,ij->i", frames, frames) / frame_length
    if len(rest):
        power = np.append(power, np.dot(rest, rest) / len(rest))
    loud = np.flatnonzero(power >= power.max() * 10 ** (-trim_db / 10))
    if not len(loud):  # NaN compares false: leave the clip to whoever checks it
        return waveform
    return waveform[loud[0] * frame_length : (loud[-1] + 1) * frame_length]


def prepare(waveform: Any, front_end: FrontEnd) -> np.ndarray:
    """Check, trim and scale one waveform: what `log_mel_many` does to each clip first.

    Parameters
    ----------
    waveform : array-like or tensor of shape (n,), n >= 1
    front_end : FrontEnd
        `trim_db`, `scale_rms` and `sampling_rate` are used.

    Returns
    -------
    numpy.ndarray of shape (m,), float32

    Raises
    ------
    ValueError
        If the waveform is not one-dimensional, is empty, or holds NaN or infinite samples.
    """
    waveform = np.asarray(waveform, dtype=np.float32)
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"waveform of shape {waveform.shape}: give one channel, (n,) with n >= 1")
    waveform = trim(waveform, front_end.trim_db, max(1, round(0.016 * front_end.sampling_rate)))
    power = float(np.dot(waveform, waveform)) / len(waveform)
    if not np.isfinite(power):
        raise ValueError("waveform holds NaN or infinite samples: clean or leave out this clip")
    if front_end.scale_rms and power > 0:
        waveform = waveform * np.float32(TARGET_RMS / np.sqrt(power))
    return waveform


@torch.no_grad()
def log_mel(waveforms: Any, front_end: FrontEnd) -> torch.Tensor:
    """Natural logarithm of the mel power spectrogram, of waveforms of one length as they are (not trimmed, not scaled).

    Equals, to 1e-4, `numpy.log(librosa.feature.melspectrogram(y=waveforms, power=2, center=True, pad_mode="constant",
    htk=False, norm="slaney", ...) + eps)`.

    Parameters
    ----------
    waveforms : array-like or tensor of shape (batch, n), n >= 1
        On any device. float64 is computed in float64; all else in float32, but for the frames whose quietest bins would
        suffer from its rounding.
    front_end : FrontEnd

    Returns
    -------
    torch.Tensor of shape (batch, n_mels, 1 + n // hop_length)
    """
    waveforms = torch.as_tensor(waveforms)
    waveforms = waveforms if waveforms.dtype == torch.float64 else waveforms.float()
    if waveforms.ndim != 2 or not waveforms.shape[1]:
        raise ValueError(f"waveforms of shape {tuple(waveforms.shape)}: give (batch, n) with n >= 1")
    batch, length = waveforms.shape
    hop, half, slots = front_end.hop_length, front_end.n_fft // 2, _slots(length, front_end)
    tape = waveforms.new_zeros(_tape_length(batch * slots, front_end, waveforms.device))
    tape[half : half + batch * slots * hop].view(batch, -1)[:, :length] = waveforms
    rows = _log_mel_of_tape(tape, front_end)[: batch * slots].unflatten(0, (batch, slots))
    return rows[:, : 1 + length // hop].transpose(1, 2).contiguous()


@torch.no_grad()
def log_mel_many(waveforms: Sequence[Any], front_end: FrontEnd) -> list[torch.Tensor]:
    """`prepare` and log-mel of clips of any lengths; each result is what the clip alone would give, to the last bit.

    Parameters
    ----------
    waveforms : sequence of array-like or CPU tensor, each of shape (n_i,), n_i >= 1
    front_end : FrontEnd

    Returns
    -------
    list of torch.Tensor, each of shape (n_mels, 1 + m_i // hop_length), float32
        With m_i the samples left of clip i after trimming.

    Examples
    --------
    >>> [x.shape for x in log_mel_many([np.ones(1), np.ones(16000)], FrontEnd())]
    [torch.Size([64, 1]), torch.Size([64, 101])]
    """
    hop, half = front_end.hop_length, front_end.n_fft // 2
    results: list[torch.Tensor] = []
    for clips in _tapefuls(waveforms, front_end):
        *starts, end = np.cumsum([0] + [_slots(len(clip), front_end) for clip in clips]).tolist()  # in frames
        tape = np.zeros(_tape_length(end, front_end, torch.device("cpu")), np.float32)
        for start, clip in zip(starts, clips, strict=True):
            tape[half + start * hop :][: len(clip)] = clip
        rows = _log_mel_of_tape(torch.from_numpy(tape), front_end)
        for start, clip in zip(starts, clips, strict=True):
            results.append(rows[start : start + 1 + len(clip) // hop].T.contiguous())
    return results


def _tapefuls(waveforms: Sequence[Any], front_end: FrontEnd) -> Iterator[list[np.ndarray]]:
    clips: list[np.ndarray] = []
    samples = 0
    for waveform in waveforms:
        clips.append(prepare(waveform, front_end))
        samples += len(clips[-1])
        if samples >= TAPE_SAMPLES:
            yield clips
            clips, samples = [], 0
    if clips:
        yield clips


def _slots(length: int, front_end: FrontEnd) -> int:
    """Frames of tape that a clip takes up: its samples and the half window of silence after it."""
    return -(-(length + front_end.n_fft // 2) // front_end.hop_length)


def _block(device: torch.device) -> int:
    return BLOCK_FRAMES if device.type == "cpu" else 1 << 14


def _tape_length(frames: int, front_end: FrontEnd, device: torch.device) -> int:
    """Samples of a tape for `frames` frames and for what is missing to whole blocks.

    With whole blocks only, the kernels take the same path for every frame.
    """
    block = _block(device)
    return (-(-frames // block) * block - 1) * front_end.hop_length + front_end.n_fft


def _log_mel_of_tape(tape: torch.Tensor, front_end: FrontEnd) -> torch.Tensor:
    """Log-mel of all frames of a tape (samples,), frame k beginning at sample k * hop: (frames, n_mels)."""
    eps, block = front_end.eps, _block(tape.device)
    frames = tape.unfold(0, front_end.n_fft, front_end.hop_length)
    mels = tape.new_empty(len(frames), front_end.n_mels + -front_end.n_mels % BAND)
    energy = tape.new_empty(len(frames))
    for start in range(0, len(frames), block):
        rows = slice(start, start + block)
        _mel_power(frames[rows], front_end, out=(mels[rows], energy[rows]))
    mels = mels[:, : front_end.n_mels]
    if tape.dtype == torch.float32:
        # Rounding in a float32 FFT adds noise to all bins, about 1.2e-7 of the frame's norm. It changes the logarithm
        # of a mel power m by sqrt(2 m noise) / (m + eps) in the mean square. 2.5 times that stays below 1e-4: where it
        # would not, the frame is done in float64.
        noise = energy.mul_(1.2e-7**2 * 2 / front_end.n_fft * mel_filters(front_end).sum(1).max().item())
        margin = mels.reciprocal().mul_(eps**2).add_(mels).amin(1).add_(2 * eps)
        fragile = (2 * noise > (1e-4 / 2.5) ** 2 * margin).nonzero()[:, 0]
        if len(fragile):
            for rows in F.pad(fragile, (0, -len(fragile) % EXACT_FRAMES), value=int(fragile[0])).split(
                EXACT_FRAMES
            ):
                mels[rows] = _mel_power(frames[rows].double(), front_end)[0][:, : front_end.n_mels].float()
    return mels.add_(eps).log_()


def _mel_power(
    frames: torch.Tensor, front_end: FrontEnd, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of frames (block, n_fft): mel power (block, n_mels filled up to whole bands), and power of all bins (block,)."""
    window, bands = _window_and_bands(front_end, frames.dtype, frames.device)
    mels, energy = out or (frames.new_empty(len(frames), BAND * len(bands)), frames.new_empty(len(frames)))
    spectrum = torch.fft.rfft(frames * window)
    real, imaginary = (
        torch.view_as_real(spectrum).square_().unbind(-1)
    )  # several times as fast as spectrum.abs()
    power = real + imaginary  # (block, bins)
    torch.sum(power, 1, out=energy)
    for i, (bins, weights) in enumerate(bands):
        torch.mm(power[:, bins], weights, out=mels[:, BAND * i : BAND * (i + 1)])
    return mels, energy


@torch.no_grad()
def fit_frames(log_mel: Any, front_end: FrontEnd) -> torch.Tensor:
    """Bring a clip to the encoder's width, one or more windows, and normalise it.

    Parameters
    ----------
    log_mel : array or tensor of shape (..., n_mels, F), F >= 1
        One clip, or clips of one length.
    front_end : FrontEnd
        `frames`, `fit`, `level`, `mean` and `std` are used.

    Returns
    -------
    torch.Tensor of shape (..., windows, n_mels, frames), float32
        windows is 1 with `fit="stretch"` and for clips of at most `frames` frames.

    Examples
    --------
    >>> fit_frames(torch.zeros(64, 200), FrontEnd()).shape
    torch.Size([4, 64, 96])
    """
    x = log_mel if isinstance(log_mel, torch.Tensor) else torch.from_numpy(np.array(log_mel, np.float32))
    x, width, have = x.float(), front_end.frames, log_mel.shape[-1]
    if front_end.level:
        x = x - x.mean(dim=(-2, -1), keepdim=True)
    if front_end.fit == "stretch":
        flat = x.reshape(-1, 1, *x.shape[-2:])
        flat = F.interpolate(flat, (x.shape[-2], width), mode="bilinear", antialias=True, align_corners=False)
        x = flat.reshape(*x.shape[:-2], 1, x.shape[-2], width)
    elif have <= width:
        canvas = x.amin(dim=-1, keepdim=True).repeat_interleave(width, -1)
        left = (width - have) // 2
        canvas[..., left : left + have] = x
        x = canvas.unsqueeze(-3)
    else:
        starts = torch.tensor(_starts(have, width))
        x = x[..., starts[:, None] + torch.arange(width)].movedim(-2, -3)  # (..., windows, n_mels, frames)
    return ((x - front_end.mean) / front_end.std).contiguous()


def _starts(have: int, width: int) -> list[int]:
    """First frames of the windows of a clip longer than one: half overlapped, the last flush with the end."""
    return [*range(0, have - width, max(1, width // 2)), have - width]


def num_windows(frames: int, front_end: FrontEnd) -> int:
    """How many windows `fit_frames` makes of a clip of so many frames.

    Examples
    --------
    >>> num_windows(200, FrontEnd()), num_windows(10, FrontEnd())
    (4, 1)
    """
    if front_end.fit == "stretch" or frames <= front_end.frames:
        return 1
    return len(_starts(frames, front_end.frames))


def fit_frames_many(log_mels: Sequence[Any], front_end: FrontEnd) -> list[torch.Tensor]:
    """`fit_frames` of clips of any lengths; clips of one length are done together.

    Returns
    -------
    list of torch.Tensor, each of shape (windows_i, n_mels, frames)
    """
    by_length: dict[int, list[int]] = {}
    for i, x in enumerate(log_mels):
        by_length.setdefault(x.shape[-1], []).append(i)
    results: list[Any] = [None] * len(log_mels)
    for indices in by_length.values():
        batch = torch.from_numpy(np.stack([np.asarray(log_mels[i], np.float32) for i in indices]))
        for i, x in zip(indices, fit_frames(batch, front_end), strict=True):
            results[i] = x
    return results
