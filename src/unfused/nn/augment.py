"""Batched augmentation of log-mels and pictures.

Every module takes a batch, draws anew for each item and has no loop over items. All draws come from torch's
global generator and all state lies in persistent buffers, so a resumed run goes on exactly where it stopped.
As with dropout, ``eval()`` switches augmentation off.

Log-mels are normalised (zero mean, unit deviation over the data set): strengths that add to them are in
deviations, widths and shifts are fractions of an axis.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "AudioAugment",
    "CepstralLift",
    "ImageAugment",
    "LogMixupExp",
    "Masks",
    "NoiseFloor",
    "RandomResizeCrop",
    "Recenter",
    "SpectralTilt",
    "Warp",
    "warp",
]


class _LogMelAugment(nn.Module):
    """Identity in eval mode; in training mode ``augment`` in float32, outside autograd and autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"log-mels must have shape (batch, 1, mels, frames), got {tuple(x.shape)}")
        # Autocast would run the interpolation's matrix products in bfloat16: 1 % of noise on every bin.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.augment(x.float())

    def augment(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def _uniform(low: float, high: float, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, device=like.device).uniform_(low, high)


@lru_cache
def _dct(size: int, rank: int) -> Tensor:
    """First ``rank`` rows of the orthonormal DCT-II matrix, (rank, size)."""
    phase = math.pi / size * (torch.arange(size) + 0.5)
    basis = torch.cos(phase * torch.arange(rank)[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def _smooth(scales: tuple[float, ...], x: Tensor) -> Tensor:
    """Random smooth spectra (batch, 1, mels, 1): normal amounts of half a cosine, a whole one, ..."""
    batch, _, mels, _ = x.shape
    cosines = _dct(mels, len(scales) + 1)[1:].to(x) * math.sqrt(mels / 2)  # amplitude 1
    amounts = torch.randn(batch, len(scales), device=x.device) * torch.tensor(scales, device=x.device)
    return (amounts @ cosines)[:, None, :, None]


def _linear(distance: Tensor) -> Tensor:
    return 1 - distance


def _cubic(distance: Tensor, a: float = -0.75) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance.square() + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, far)


def _interpolation(positions: Tensor, size: int, low, high, kernel=_linear) -> Tensor:
    """Matrices (batch, n, size) that read an axis of ``size`` samples at ``positions`` (batch, n).

    Samples beyond ``low`` and ``high`` repeat the one on that border; of what is left, samples outside of the
    axis are zero.
    """
    reach = 1 if kernel is _linear else 2
    taps = positions.floor()[..., None] + torch.arange(1 - reach, 1 + reach, device=positions.device)
    weights = kernel((positions[..., None] - taps).abs())
    taps = torch.minimum(torch.maximum(taps, torch.as_tensor(low).to(taps)), torch.as_tensor(high).to(taps))
    weights = weights * ((taps >= 0) & (taps < size))
    matrix = positions.new_zeros(*positions.shape, size)
    return matrix.scatter_add_(2, taps.clamp(0, size - 1).long(), weights)


def _resample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # Boxes and warps along the axes are separable: two small matrix products, several times faster than
    # grid_sample.
    return torch.bmm(torch.bmm(rows, x[:, 0]), columns.mT)[:, None]


class LogMixupExp(_LogMelAugment):
    """Mixes each clip with a random earlier one as sounds mix: in the power domain.

    ``log((1 - l) exp(x) + l exp(z) + eps)``, ``l ~ U(0, alpha)``, z from the last ``bank`` clips. Clips enter
    the bank after their batch, unmixed, so the first batch passes unchanged. The bank takes its shape from
    the first batch.

    Parameters
    ----------
    alpha : float, default=0.4
        Largest share of the earlier clip.
    bank : int, default=2048
        Clips remembered, first in, first out.

    References
    ----------
    BYOL for Audio, arXiv:2103.06695.

    Examples
    --------
    >>> mix = LogMixupExp()
    >>> first, second = torch.zeros(2, 1, 8, 4), torch.ones(2, 1, 8, 4)
    >>> mix(first).equal(first), mix(second).equal(second), int(mix.seen)
    (True, False, 4)
    """

    bank: Tensor
    seen: Tensor

    def __init__(self, alpha: float = 0.4, bank: int = 2048) -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha}: the earlier clip's share must lie in [0, 1)")
        if bank < 1:
            raise ValueError(f"bank={bank}: must hold at least one clip")
        self.alpha, self.size = alpha, bank
        self.register_buffer("bank", torch.zeros(0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def augment(self, x: Tensor) -> Tensor:
        if self.bank.numel() == 0:
            self.bank = x.new_zeros(self.size, *x.shape[1:])
        if self.bank.shape[1:] != x.shape[1:]:
            raise ValueError(f"the bank's clips are {tuple(self.bank.shape[1:])}, got {tuple(x.shape[1:])}")
        batch = len(x)
        held = self.seen.clamp(max=self.size)
        earlier = self.bank[(torch.rand(batch, device=x.device) * held).long()]
        share = _uniform(0, self.alpha, (batch, 1, 1, 1), x)
        mixed = ((1 - share) * x.exp() + share * earlier.exp() + torch.finfo(x.dtype).eps).log()
        mixed = torch.where(held > 0, mixed, x)
        newest = torch.arange(max(0, batch - self.size), batch, device=x.device)
        self.bank[(self.seen + newest) % self.size] = x[newest]
        self.seen += batch
        return mixed

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        saved = state_dict.get(prefix + "bank")
        if saved is not None:
            self.bank = self.bank.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RandomResizeCrop(_LogMelAugment):
    """Cuts a random box from an empty canvas around the clip and resizes it, bicubically, to the clip's size.

    Parameters
    ----------
    canvas : (float, float), default=(1.0, 1.5)
        Height (mels) and width (frames) of the canvas, times the clip's. Its empty part is 0, the mean level.
    scale : (float, float), default=(0.6, 1.5)
        Range of the box's height and, independently, width, times the clip's; clipped to the canvas.

    References
    ----------
    BYOL for Audio, arXiv:2103.06695.

    Examples
    --------
    >>> RandomResizeCrop()(torch.randn(4, 1, 64, 96)).shape
    torch.Size([4, 1, 64, 96])
    """

    def __init__(
        self, canvas: tuple[float, float] = (1.0, 1.5), scale: tuple[float, float] = (0.6, 1.5)
    ) -> None:
        super().__init__()
        if min(canvas) < 1:
            raise ValueError(f"canvas={canvas}: must not be smaller than the clip (1.0)")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={scale}: must be an increasing pair above 0")
        self.canvas, self.scale = canvas, scale

    def augment(self, x: Tensor) -> Tensor:
        return _resample(x, *(self._box(x, axis) for axis in (0, 1)))

    def _box(self, x: Tensor, axis: int) -> Tensor:
        batch, size = len(x), x.shape[2 + axis]
        canvas = int(self.canvas[axis] * size)
        length = (_uniform(*self.scale, (batch, 1), x) * size).floor().clamp(1, canvas)
        start = (torch.rand(batch, 1, device=x.device) * (canvas - length + 1)).floor()
        start = start - (canvas - size) // 2  # from the canvas's corner to the clip's
        positions = start + torch.linspace(0, 1, size, device=x.device) * (length - 1)
        return _interpolation(positions, size, start[..., None], (start + length - 1)[..., None], _cubic)


def warp(
    x: Tensor,
    frequency: Tensor | float = 1.0,
    frequency_shift: Tensor | float = 0.0,
    time: Tensor | float = 1.0,
    time_shift: Tensor | float = 0.0,
    time_bend: Tensor | None = None,
) -> Tensor:
    """Read log-mels at warped positions (linear interpolation, the border repeats).

    Bin u of 0..1 becomes what was at ``frequency * u + frequency_shift``: scaled from the bottom, as a longer
    or shorter vocal tract does. Frame v of 0..1 becomes what was at ``time * (v - 1/2) + 1/2 + time_shift +
    sum_k time_bend_k sin(pi k v)``.

    Parameters
    ----------
    x : Tensor, (batch, 1, mels, frames)
    frequency, frequency_shift, time, time_shift : float or Tensor (batch,)
        Scales, and shifts as fractions of the axis.
    time_bend : Tensor (batch, K), optional
        Amplitudes of the bends, fractions of the axis.

    Examples
    --------
    >>> x = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> warp(x, frequency=0.5).flatten()
    tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """
    batch, _, mels, frames = x.shape

    def column(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, 1).expand(batch, 1)

    u = torch.linspace(0, 1, mels, device=x.device)
    v = torch.linspace(0, 1, frames, device=x.device)
    rows = u * column(frequency) + column(frequency_shift)
    columns = (v - 0.5) * column(time) + 0.5 + column(time_shift)
    if time_bend is not None:
        orders = torch.arange(1, time_bend.shape[1] + 1, device=x.device)
        columns = columns + time_bend @ torch.sin(math.pi * orders[:, None] * v)
    return _resample(
        x,
        _interpolation(rows * (mels - 1), mels, 0, mels - 1),
        _interpolation(columns * (frames - 1), frames, 0, frames - 1),
    )


class Warp(_LogMelAugment):
    """Random :func:`warp`: other voices (frequency scale and shift), other tempi and onsets (time).

    Parameters
    ----------
    frequency, time : float, default=0.15
        Scales are drawn from ``U(1 - s, 1 + s)``.
    frequency_shift, time_shift : float, default=0.05
        Shifts are drawn from ``U(-s, s)``, fractions of the axis.
    time_bend : float, default=0.0
        Deviation of the first bend, a fraction of the axis; the second has half of it.
    """

    def __init__(
        self,
        frequency: float = 0.15,
        time: float = 0.15,
        frequency_shift: float = 0.05,
        time_shift: float = 0.05,
        time_bend: float = 0.0,
    ) -> None:
        super().__init__()
        self.frequency, self.time, self.time_bend = frequency, time, time_bend
        self.frequency_shift, self.time_shift = frequency_shift, time_shift

    def augment(self, x: Tensor) -> Tensor:
        batch = (len(x),)
        bend = None
        if self.time_bend:
            bend = torch.randn(len(x), 2, device=x.device) * self.time_bend
            bend[:, 1] /= 2
        return warp(
            x,
            frequency=_uniform(1 - self.frequency, 1 + self.frequency, batch, x),
            frequency_shift=_uniform(-self.frequency_shift, self.frequency_shift, batch, x),
            time=_uniform(1 - self.time, 1 + self.time, batch, x),
            time_shift=_uniform(-self.time_shift, self.time_shift, batch, x),
            time_bend=bend,
        )


class SpectralTilt(_LogMelAugment):
    """Adds a random smooth spectrum, constant in time: another microphone, room or vocal effort.

    Parameters
    ----------
    strength : float, default=0.5
        Deviation of the amplitude of the first cosine over the mel axis.
    weights : tuple of float, default=(1, 0.8, 0.6, 0.5)
        Relative deviation of each cosine.
    """

    def __init__(self, strength: float = 0.5, weights: tuple[float, ...] = (1.0, 0.8, 0.6, 0.5)) -> None:
        super().__init__()
        self.scales = tuple(strength * weight for weight in weights)

    def augment(self, x: Tensor) -> Tensor:
        return x + _smooth(self.scales, x)


class Masks(_LogMelAugment):
    """Sets random bands of mels and of frames to 0, the mean level.

    Parameters
    ----------
    frequency, time : float, default=0.2 and 0.1875
        Widest band, a fraction of the axis; widths are drawn from ``U(0, widest)``.
    count : int, default=1
        Bands of each kind.

    References
    ----------
    SpecAugment, arXiv:1904.08779.
    """

    def __init__(self, frequency: float = 0.2, time: float = 0.1875, count: int = 1) -> None:
        super().__init__()
        for name, value in (("frequency", frequency), ("time", time)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: a fraction of the axis, in [0, 1]")
        self.frequency, self.time, self.count = frequency, time, count

    def augment(self, x: Tensor) -> Tensor:
        keep_mels = self._kept(self.frequency, x.shape[2], x)
        keep_frames = self._kept(self.time, x.shape[3], x)
        return x * keep_mels[:, None, :, None] * keep_frames[:, None, None, :]

    def _kept(self, widest: float, size: int, x: Tensor) -> Tensor:
        start, width = torch.rand(2, len(x), self.count, 1, device=x.device)
        width = width * widest * size
        start = start * (size - width)
        index = torch.arange(size, device=x.device) + 0.5
        return ((index < start) | (index >= start + width)).all(1)


class NoiseFloor(_LogMelAugment):
    """Adds stationary noise of a random smooth spectrum, as powers add: ``log(exp x + exp n)``.

    Parameters
    ----------
    level : float, default=0.0
        Loudest floor, in deviations from the mean level; levels are drawn from ``U(level - span, level)``.
    span : float, default=4.0
    """

    def __init__(self, level: float = 0.0, span: float = 4.0) -> None:
        super().__init__()
        self.level, self.span = level, span

    def augment(self, x: Tensor) -> Tensor:
        floor = _uniform(self.level - self.span, self.level, (len(x), 1, 1, 1), x) + _smooth((0.5,) * 4, x)
        return torch.logaddexp(x, floor + 0.3 * torch.randn_like(x))


class CepstralLift(_LogMelAugment):
    """Attenuates the fine structure of the spectrum (the harmonics of the pitch), keeps its envelope.

    Parameters
    ----------
    cepstra : int, default=12
        Cosines over the mel axis that make up the envelope; the rest is multiplied by a factor drawn from
        ``U(0, 1)``.
    """

    def __init__(self, cepstra: int = 12) -> None:
        super().__init__()
        if cepstra < 1:
            raise ValueError(f"cepstra={cepstra}: the envelope needs at least one")
        self.cepstra = cepstra

    def augment(self, x: Tensor) -> Tensor:
        basis = _dct(x.shape[2], self.cepstra).to(x)
        envelope = (basis.mT @ basis) @ x
        return torch.lerp(envelope, x, torch.rand(len(x), 1, 1, 1, device=x.device))


class Recenter(_LogMelAugment):
    """Subtracts each clip's mean level, which the modules before it have moved."""

    def augment(self, x: Tensor) -> Tensor:
        return x - x.mean((1, 2, 3), keepdim=True)


def _voice(
    frequency: float = 0.15,
    frequency_shift: float = 0.05,
    time: float = 0.15,
    time_shift: float = 0.05,
    time_bend: float = 0.0,
    tilt: float = 0.5,
    frequency_mask: float = 0.2,
    time_mask: float = 0.1875,
    masks: int = 1,
    noise: float | None = None,
    cepstra: int | None = None,
) -> list[nn.Module]:
    return [
        *([] if cepstra is None else [CepstralLift(cepstra)]),
        Warp(frequency, time, frequency_shift, time_shift, time_bend),
        SpectralTilt(tilt),
        *([] if noise is None else [NoiseFloor(noise)]),
        Masks(frequency_mask, time_mask, masks),
        Recenter(),
    ]


def _byola(
    alpha: float = 0.4,
    bank: int = 2048,
    canvas: tuple[float, float] = (1.0, 1.5),
    scale: tuple[float, float] = (0.6, 1.5),
) -> list[nn.Module]:
    return [LogMixupExp(alpha, bank), RandomResizeCrop(canvas, scale)]


def _sound(
    alpha: float = 0.4,
    bank: int = 2048,
    canvas: tuple[float, float] = (1.0, 1.5),
    scale: tuple[float, float] = (0.6, 1.5),
    tilt: float = 0.3,
    frequency_mask: float = 0.2,
    time_mask: float = 0.1875,
    masks: int = 1,
) -> list[nn.Module]:
    return [
        *_byola(alpha, bank, canvas, scale),
        SpectralTilt(tilt),
        Masks(frequency_mask, time_mask, masks),
        Recenter(),
    ]


def _none() -> list[nn.Module]:
    return []


_PRESETS: dict[str, Callable[..., list[nn.Module]]] = {
    "voice": _voice,
    "byola": _byola,
    "sound": _sound,
    "none": _none,
}


class AudioAugment(nn.Sequential):
    """A chain of augmentations for normalised log-mels (batch, 1, mels, frames).

    Parameters
    ----------
    preset : {"voice", "byola", "sound", "none"}, default="voice"
        ``"voice"``: [CepstralLift,] Warp, SpectralTilt, [NoiseFloor,] Masks, Recenter; for words, whose
        speaker is to be ignored. ``"byola"``: LogMixupExp, RandomResizeCrop, as published. ``"sound"``: these
        two, then SpectralTilt, Masks, Recenter; for sounds other than speech.
    **strengths
        Of ``"voice"``: ``frequency=0.15, frequency_shift=0.05, time=0.15, time_shift=0.05, time_bend=0.0,
        tilt=0.5, frequency_mask=0.2, time_mask=0.1875, masks=1, noise=None, cepstra=None`` (the last two
        off). Of ``"byola"``: ``alpha=0.4, bank=2048, canvas=(1.0, 1.5), scale=(0.6, 1.5)``. Of ``"sound"``:
        those, ``tilt=0.3`` and the masks'. Units as in the modules.

    Raises
    ------
    ValueError, TypeError
        Unknown preset; a strength that the preset does not have.

    Examples
    --------
    >>> augment = AudioAugment("voice", frequency=0.2, noise=-1.0)
    >>> augment(torch.randn(8, 1, 40, 32)).shape
    torch.Size([8, 1, 40, 32])
    """

    def __init__(self, preset: str = "voice", **strengths) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"preset={preset!r}: choose one of {sorted(_PRESETS)}")
        chain = _PRESETS[preset]
        known = list(inspect.signature(chain).parameters)
        if unknown := sorted(set(strengths) - set(known)):
            raise TypeError(f"preset {preset!r} has {', '.join(known)}; it knows no {', '.join(unknown)}")
        super().__init__(*chain(**strengths))
        self.preset, self.strengths = preset, strengths

    def extra_repr(self) -> str:
        return f"preset={self.preset!r}"


class ImageAugment(nn.Module):
    """Random crop, flip, rotation and colour: one affine map of the plane and one of RGB for each picture.

    Knows the normalisation: raw pictures (uint8) come out normalised; normalised ones (float) are changed in
    RGB all the same. In eval mode nothing is changed except that raw pictures are resized and normalised, as
    :func:`unfused.nn.encoders.image_processor` does.

    Parameters
    ----------
    size : int, optional
        Side of the pictures that come out; by default that of the input.
    scale : (float, float), default=(0.3, 1.0)
        Range of the crop's area, a fraction of the picture; its aspect ratio is drawn from 3/4 to 4/3.
    flip : bool, default=True
        Mirror half of the pictures. False for characters and whatever else has a handedness.
    rotation : float, default=10.0
        Largest angle, degrees.
    jitter : float, default=0.4
        Brightness, contrast and saturation factors are drawn from ``U(1 - jitter, 1 + jitter)``.
    hue : float, default=0.05
        Largest rotation of the hue, turns.
    grayscale : float, default=0.1
        Probability.
    mean, std : sequence of 3 floats
        Normalisation of RGB in 0..1. Default: ImageNet's.

    Examples
    --------
    >>> augment = ImageAugment(64)
    >>> pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    >>> augment(pictures).shape, augment.eval()(pictures).dtype
    (torch.Size([4, 3, 64, 64]), torch.float32)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (0.3, 1.0),
        flip: bool = True,
        rotation: float = 10.0,
        jitter: float = 0.4,
        hue: float = 0.05,
        grayscale: float = 0.1,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale}: must be an increasing pair in (0, 1]")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter={jitter}: must lie in [0, 1]")
        self.size, self.scale, self.flip, self.rotation = size, scale, flip, rotation
        self.jitter, self.hue, self.grayscale = jitter, hue, grayscale
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (batch, 3, side, side), uint8 or normalised floats, to (batch, 3, size, size) floats."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"pictures must have shape (batch, 3, height, width), got {tuple(x.shape)}")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rgb = x.float() * self.std + self.mean if x.is_floating_point() else x.float() / 255
            side = self.size or x.shape[-1]
            if self.training:
                rgb = self._colour(self._cut(rgb, side)).clamp_(0, 1)
            elif x.shape[-2:] != (side, side):
                rgb = F.interpolate(rgb, (side, side), mode="bicubic", antialias=True).clamp_(0, 1)
            elif x.is_floating_point():
                return x
            return (rgb - self.mean) / self.std

    def _cut(self, rgb: Tensor, side: int) -> Tensor:
        batch = len(rgb)
        area = _uniform(*self.scale, (batch,), rgb)
        ratio = _uniform(math.log(3 / 4), math.log(4 / 3), (batch,), rgb).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        right, down = _uniform(-1, 1, (2, batch), rgb) * torch.stack([1 - width, 1 - height])
        if self.flip:
            width = width * (1 - 2 * torch.randint(0, 2, (batch,), device=rgb.device))
        angle = _uniform(-self.rotation, self.rotation, (batch,), rgb).deg2rad()
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack([width * cos, -height * sin, right, width * sin, height * cos, down], 1)
        grid = F.affine_grid(theta.reshape(batch, 2, 3), [batch, 3, side, side], align_corners=False)
        return F.grid_sample(rgb, grid, padding_mode="reflection", align_corners=False)

    def _colour(self, rgb: Tensor) -> Tensor:
        """All of it is affine in RGB, contrast included: one matrix and one offset per picture."""
        batch = len(rgb)
        brightness, contrast, saturation = _uniform(1 - self.jitter, 1 + self.jitter, (3, batch, 1, 1), rgb)
        saturation = saturation * (torch.rand(batch, 1, 1, device=rgb.device) >= self.grayscale)
        angle = _uniform(-self.hue, self.hue, (batch, 1, 1), rgb) * 2 * math.pi
        one, ones = torch.eye(3, device=rgb.device), torch.ones(3, 3, device=rgb.device)
        # Hue: a rotation about the grey axis (Rodrigues).
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=rgb.device) / math.sqrt(3)
        turn = angle.cos() * one + (1 - angle.cos()) * ones / 3 + angle.sin() * cross
        luma = torch.tensor([0.299, 0.587, 0.114], device=rgb.device)
        matrix = brightness * (saturation * one + (1 - saturation) * luma) @ turn  # (batch, 3, 3)
        pixels = rgb.flatten(2)
        grey = ((luma @ matrix) * pixels.mean(2)).sum(1)  # the picture's mean level, which contrast keeps
        offset = (1 - contrast) * grey[:, None, None]
        return torch.baddbmm(offset, contrast * matrix, pixels).reshape(rgb.shape)
