"""Modalities: what `adapt` has to know of recordings and of pictures, and nothing else.

UnFuSeD needs a teacher's features and a student; all that differs between kinds of data is how a file becomes a tensor,
which encoder reads it, how it is varied, what the classic baseline measures and what the saved model is called.
A new kind of data is one more class; `modality_text` and `modality_table` hold those whose items are no files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unfused.data.files import Quarantine, check_file
from unfused.data.manifest import Manifest


@dataclass
class Corpus:
    """The usable recordings (pictures, texts, rows) of a run.

    Attributes
    ----------
    manifest : Manifest
        One row per usable file.
    raw : sequence
        Per file what was read, memory-mapped: log-mel `(mels, frames)`, or picture `(3, height, width)` in 0..255. Of texts
        the strings, of a table its rows of cells.
    seconds : ndarray of shape (n_files,)
        Durations; zeros for all but recordings.
    digest : str
        Fingerprint of all contents and of the front end, in order.
    """

    manifest: Manifest
    raw: Sequence[Any]
    seconds: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.manifest.paths)


@dataclass
class Inputs:
    """The model's view of a corpus: windows in one memory-mapped array.

    Attributes
    ----------
    values : ndarray of shape (n_windows, channels, height, width), float32 or uint8
        Of texts ids (n_windows, tokens), int32; of a table (n_rows, columns), float32.
    clip : ndarray of shape (n_windows,)
        The row of the corpus that each window was cut from, ascending.
    normaliser : dict
        `mean` and `std` over the pool, part of the saved model.
    """

    values: np.ndarray
    clip: np.ndarray
    normaliser: dict[str, Any]

    def of(self, clips: np.ndarray) -> np.ndarray:
        """Indices of the windows of the given clips (boolean mask over clips)."""
        return np.flatnonzero(clips[self.clip])

    def pool(self, per_window: np.ndarray, num_clips: int) -> np.ndarray:
        """Mean over each clip's windows: (n_windows, d) -> (n_clips, d)."""
        starts = np.searchsorted(self.clip, np.arange(num_clips))
        sums = np.add.reduceat(per_window, starts, axis=0)
        return sums / np.bincount(self.clip, minlength=num_clips)[:, None]


def _corpus(manifest: Manifest, found: Any, front_end: str) -> Corpus:
    """The usable rows; the digest is of their names, labels apart, and of what was read from them."""
    import hashlib

    usable = manifest.select(found.usable)
    content = hashlib.blake2b(front_end.encode(), digest_size=16)
    for path, array in zip(usable.paths, found.features, strict=True):
        content.update(
            path.encode("utf-8", "surrogateescape") + b"\0" + np.ascontiguousarray(array).tobytes()
        )
    return Corpus(usable, found.features, found.seconds, content.hexdigest())


def _new_array(path: Path, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A memory-mapped array with all its room on the disk taken: a full one is an OSError here, SIGBUS later."""
    values = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values


class Modality(Protocol):
    """The contract; see `Audio` and `Image`.

    `inputs` may learn something from the pool (a vocabulary, the columns' means); what it writes into the stage's folder,
    `attach` takes up, in this command or a later one, before anything below it is called.
    """

    name: str
    task: str
    classic_on_one_scale: bool  # whether the dimensions of `classic_features` may be compared as they are

    @property
    def notes(self) -> Sequence[str]:
        """Of what `inputs` learned, for the user."""

    def settings(self) -> dict[str, Any]: ...
    def read(
        self, manifest: Manifest, cache: Path, quarantine: Quarantine, progress: Callable | None
    ) -> Corpus: ...
    def inputs(self, corpus: Corpus, pool: np.ndarray, folder: Path) -> Inputs: ...
    def attach(self, folder: Path, pool: np.ndarray) -> None: ...
    def encoder(self) -> Any: ...
    def augment(self, normaliser: dict[str, Any]) -> Any: ...
    def classic_input(self, corpus: Corpus) -> Any: ...
    def classic_features(self, corpus: Corpus) -> np.ndarray: ...
    def classic(self, seed: int) -> Any: ...
    def classifier(self, encoder: Any, head: Any, classes: list[str]) -> Any: ...
    def processor(self, normaliser: dict[str, Any]) -> Any: ...
    def preview(self, path: Path) -> str | None: ...
    def shown(self, corpus: Corpus, row: int) -> dict[str, str]: ...


class _OfFiles:
    """What recordings and pictures have in common."""

    notes: Sequence[str] = ()
    classic_on_one_scale = False

    def attach(self, folder: Path, pool: np.ndarray) -> None:
        """Nothing: windows are normalised by numbers that lie beside them."""

    def classic(self, seed: int) -> Any:
        from unfused.finetune.classic import Classic

        return Classic(seed=seed)

    def shown(self, corpus: Corpus, row: int) -> dict[str, str]:
        """Cells to show beside an item's name; files are played or looked at instead."""
        return {}


class Audio(_OfFiles):
    """Recordings: log-mel windows, AudioNTT, voice augmentation, MFCC statistics.

    Parameters
    ----------
    width : int, default=32
        Channels of the encoder's blocks; the paper's is 64 (28 times the multiplications on its 64 x 96 input).
    front_end : FrontEnd, optional
        By default chosen from the files (`choose_front_end`).
    """

    name = "audio"
    task = "audio-classification"

    def __init__(self, width: int = 32, front_end: Any = None) -> None:
        self.width = width
        self.front_end = front_end
        self.cache: Path | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "modality": self.name,
            "front_end": self.front_end.to_dict(),
            "encoder": repr(self.encoder()),
            "augment": repr(self.augment({})),
        }

    def read(
        self, manifest: Manifest, cache: Path, quarantine: Quarantine, progress: Callable | None = None
    ) -> Corpus:
        from unfused.data.features import read_features

        self.cache = cache
        if self.front_end is None:
            self.front_end = choose_front_end(manifest)
        found = read_features(manifest, self.front_end, cache, quarantine, progress=progress)
        return _corpus(manifest, found, self.front_end.cache_key)

    def inputs(self, corpus: Corpus, pool: np.ndarray, folder: Path) -> Inputs:
        """Cut every recording into windows, streaming; normalise by one mean and one deviation of the pool."""
        import torch

        from unfused.nn.log_mel import fit_frames, num_windows

        raw_front_end = replace(self.front_end, mean=0.0, std=1.0)
        counts = np.array([num_windows(clip.shape[-1], raw_front_end) for clip in corpus.raw])
        clip = np.repeat(np.arange(len(corpus)), counts)
        shape = (len(clip), 1, self.front_end.n_mels, self.front_end.frames)
        values = _new_array(folder / "inputs.npy", shape)
        row, total, squares, size = 0, 0.0, 0.0, 0
        for index, log_mel in enumerate(corpus.raw):
            windows = fit_frames(torch.from_numpy(np.array(log_mel)), raw_front_end).numpy()
            values[row : row + len(windows), 0] = windows
            row += len(windows)
            if pool[index]:
                total += float(windows.sum(dtype=np.float64))
                squares += float(np.square(windows, dtype=np.float64).sum())
                size += windows.size
        mean = total / size
        std = math.sqrt(max(squares / size - mean**2, 1e-12))
        for start in range(0, len(values), 4096):
            values[start : start + 4096] = (values[start : start + 4096] - mean) / std
        values.flush()  # type: ignore[attr-defined]
        return Inputs(values, clip, {"mean": mean, "std": std})

    def encoder(self) -> Any:
        from unfused.nn.audio_model import AudioNTT

        pooling = "segments" if self.front_end.fit == "stretch" else "max-mean"
        return AudioNTT(self.front_end.n_mels, self.width, 16 * self.width, pooling, cepstra=13)

    def augment(self, normaliser: dict[str, Any]) -> Any:
        from unfused.nn.augment import AudioAugment

        if self.front_end.fit == "stretch":  # strengths measured on spoken digits, see docs/unfused.md
            return AudioAugment("voice", frequency=0.1, tilt=0.2, time_bend=0.05, cepstra=14)
        return AudioAugment("sound")

    def classic_input(self, corpus: Corpus) -> np.ndarray:
        """MFCC and their statistics of whole, untrimmed clips: on spoken digits the baseline is the better for it."""
        from unfused.data.features import read_features
        from unfused.finetune.classic import audio_features

        if self.front_end.trim_db is None or self.cache is None:
            return audio_features(corpus.raw)
        whole = replace(self.front_end, trim_db=None)
        found = read_features(corpus.manifest, whole, self.cache, Quarantine())
        return audio_features(found.features if found.usable.all() else corpus.raw)

    def classic_features(self, corpus: Corpus) -> np.ndarray:
        """One vector per clip for the neighbour graph: cepstra of the stretched word, or statistics over time."""
        from unfused.finetune.classic import mfcc_frames, mfcc_statistics

        return (mfcc_frames if self.front_end.fit == "stretch" else mfcc_statistics)(list(corpus.raw))

    def classifier(self, encoder: Any, head: Any, classes: list[str]) -> Any:
        model = encoder.to_classifier(dict(enumerate(classes)))
        model.classifier.load_state_dict(head.state_dict())
        return model.eval()

    def processor(self, normaliser: dict[str, Any]) -> Any:
        from unfused.nn.audio_model import UnfusedFeatureExtractor

        return UnfusedFeatureExtractor(**replace(self.front_end, **normaliser).to_dict())

    def preview(self, path: Path) -> str | None:
        from unfused.data.audio import encode_preview

        return encode_preview(path)


class Image(_OfFiles):
    """Pictures: square RGB tensors, a small ResNet of transformers, colour and shape augmentation, pixel statistics."""

    name = "image"
    task = "image-classification"

    def __init__(self, width: int = 32, size: int = 0) -> None:
        self.width = width
        self.size = size  # 0: chosen from the files

    def settings(self) -> dict[str, Any]:
        return {"modality": self.name, "size": self.size, "encoder": repr(self.encoder())}

    def read(
        self, manifest: Manifest, cache: Path, quarantine: Quarantine, progress: Callable | None = None
    ) -> Corpus:
        from unfused.data.features import read_images

        if not self.size:
            self.size = choose_size(manifest)
        found = read_images(manifest, self.size, cache, quarantine, progress=progress)
        return _corpus(manifest, found, f"picture-{self.size}")

    def inputs(self, corpus: Corpus, pool: np.ndarray, folder: Path) -> Inputs:
        shape = (len(corpus), 3, self.size, self.size)
        values = _new_array(folder / "inputs.npy", shape)
        total, squares, size = np.zeros(3), np.zeros(3), 0
        for index, picture in enumerate(corpus.raw):
            values[index] = np.asarray(picture, np.float32) / 255
            if pool[index]:
                total += values[index].sum((1, 2), dtype=np.float64)
                squares += np.square(values[index], dtype=np.float64).sum((1, 2))
                size += self.size**2
        mean = total / size
        std = np.sqrt(np.maximum(squares / size - mean**2, 1e-6))
        for start in range(0, len(values), 1024):
            block = values[start : start + 1024]
            values[start : start + 1024] = (block - mean[:, None, None]) / std[:, None, None]
        values.flush()  # type: ignore[attr-defined]
        return Inputs(values, np.arange(len(corpus)), {"mean": mean.tolist(), "std": std.tolist()})

    def encoder(self) -> Any:
        from unfused.nn.encoders import ResNetEncoder

        return ResNetEncoder(width=self.width)

    def augment(self, normaliser: dict[str, Any]) -> Any:
        from unfused.nn.augment import ImageAugment

        return ImageAugment(mean=normaliser["mean"], std=normaliser["std"])

    def classic_input(self, corpus: Corpus) -> np.ndarray:
        from unfused.finetune.classic import image_features

        return image_features(corpus.raw)

    def classic_features(self, corpus: Corpus) -> np.ndarray:
        from unfused.finetune.classic import descriptors

        return descriptors(list(corpus.raw))

    def classifier(self, encoder: Any, head: Any, classes: list[str]) -> Any:
        model = encoder.to_classifier(len(classes), dict(enumerate(classes)))
        encoder.load_head(model, head)
        return model.eval()

    def processor(self, normaliser: dict[str, Any]) -> Any:
        from unfused.nn.encoders import image_processor

        return image_processor(self.size, normaliser["mean"], normaliser["std"])

    def preview(self, path: Path) -> str | None:
        from unfused.data.images import encode_thumbnail

        return encode_thumbnail(path)


def choose_size(manifest: Manifest, sample: int = 100) -> int:
    """Side of the square that pictures are brought to: 32, 64 or 96, the largest that half of them fill."""
    from PIL import Image as Pillow

    sides = []
    for path in manifest.paths[:: max(1, len(manifest.paths) // sample)]:
        try:
            check_file(manifest.root / path)  # a pipe would be waited for
            with Pillow.open(manifest.root / path) as picture:
                sides.append(min(picture.size))
        except Exception:  # what is wrong with it is said when it is read
            continue
    middle = np.median(sides) if sides else 64
    return 32 if middle < 64 else 64 if middle < 128 else 96


def choose_front_end(manifest: Manifest, sample: int = 200) -> Any:
    """The front end that fits the files, from the rates and durations that the headers of up to `sample` of them tell.

    Short isolated sounds (95 % under 2.5 s: words, calls, strokes) are trimmed and stretched to 32 frames of 40 mels, the
    setting of the card's trials; anything longer is cut into half-overlapping windows of 48 frames of 40 mels (1.92 s), a third
    of the published input's size.
    """
    import soundfile

    from unfused.nn.log_mel import FrontEnd

    chosen: Any = (
        np.unique(np.linspace(0, len(manifest.paths) - 1, sample).astype(int)) if manifest.paths else []
    )
    durations, rates = [], []
    for index in chosen:
        path = manifest.root / manifest.paths[index]
        try:
            check_file(path)  # a pipe would be waited for
            header = soundfile.info(os.fsencode(path) if os.name == "posix" else str(path))
        except Exception:  # what is wrong with it is said when it is read
            continue
        durations.append(header.duration)
        rates.append(header.samplerate)
    rate = 8000 if rates and np.median(rates) <= 12000 else 16000
    milliseconds = rate // 1000
    if durations and np.quantile(durations, 0.95) <= 2.5:
        return FrontEnd(
            sampling_rate=rate,
            n_fft=32 * milliseconds,
            hop_length=8 * milliseconds,
            n_mels=40,
            f_min=50.0,
            f_max=min(rate / 2, 7800.0),
            trim_db=30.0,
            frames=32,
            fit="stretch",
        )
    return FrontEnd(
        sampling_rate=rate,
        n_fft=64 * milliseconds,
        hop_length=40 * milliseconds,
        n_mels=40,
        f_min=60.0,
        f_max=min(rate / 2, 7800.0),
        frames=48,
        fit="window",
    )
