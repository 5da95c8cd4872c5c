"""From a manifest to arrays: every usable recording or picture, decoded once and kept in a feature cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unfused.data.cache import CachedItems, FeatureCache
from unfused.data.files import Quarantine

if TYPE_CHECKING:
    from unfused.data.manifest import Manifest
    from unfused.nn.log_mel import FrontEnd

__all__ = ["Features", "read_features", "read_images"]

Progress = Callable[[int, int], None]


class Features(NamedTuple):
    """What was read of a manifest.

    Attributes
    ----------
    features : CachedItems
        One read-only, memory-mapped array per usable file, in the manifest's order: log-mels (n_mels, frames)
        in float32, or pictures (3, size, size) in uint8.
    usable : ndarray of bool, shape (rows of the manifest,)
    seconds : ndarray of float, shape (usable files,)
        Length of each recording before trimming; 0 for pictures.
    """

    features: CachedItems
    usable: np.ndarray
    seconds: np.ndarray


def read_features(
    manifest: Manifest,
    front_end: FrontEnd,
    cache_dir: str | os.PathLike[str],
    quarantine: Quarantine,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Features:
    """Log-mels of whole recordings: decoded, resampled and trimmed, not yet cut into windows or normalised.

    Parameters
    ----------
    manifest : Manifest
    front_end : FrontEnd
        Only the settings that its `cache_key` names matter here.
    cache_dir : path
        Folder of the feature cache; several manifests, settings and processes may share it.
    quarantine : Quarantine
        Gets the files that cannot be used, by their name in the manifest.
    workers : int, optional
        Decoding threads. Default: one per processor.
    progress : callable, optional
        Called with (files done, files in all).

    Returns
    -------
    Features
    """
    import soundfile

    from unfused.data.audio import decode
    from unfused.nn.log_mel import log_mel_many

    key = f"{front_end.cache_key} audio-1 libsndfile-{soundfile.__libsndfile_version__}"
    return _read(
        FeatureCache(cache_dir, key, shape=(front_end.n_mels, -1)),
        manifest,
        quarantine,
        decode=partial(decode, sampling_rate=front_end.sampling_rate),
        compute=lambda waveforms: [x.numpy() for x in log_mel_many(waveforms, front_end)],
        measure=lambda waveform: len(waveform) / front_end.sampling_rate,
        workers=workers,
        progress=progress,
    )


def read_images(
    manifest: Manifest,
    size: int,
    cache_dir: str | os.PathLike[str],
    quarantine: Quarantine,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Features:
    """Pictures as squares of RGB bytes.

    Parameters
    ----------
    size : int
        Side in pixels; see `unfused.data.images.decode_image`.
    manifest, cache_dir, quarantine, workers, progress
        As for `read_features`.

    Returns
    -------
    Features
    """
    import PIL

    from unfused.data.images import decode_image

    return _read(
        FeatureCache(cache_dir, f"pixels-1 Pillow-{PIL.__version__}", shape=(3, size, size), dtype="uint8"),
        manifest,
        quarantine,
        decode=partial(decode_image, size=size),
        compute=lambda pictures: pictures,
        workers=workers,
        progress=progress,
    )


def _read(cache: FeatureCache, manifest: Manifest, quarantine: Quarantine, **how: Any) -> Features:
    items = cache.get([os.path.join(manifest.root, path) for path in manifest.paths], **how)
    for position, reason in items.reasons.items():
        quarantine.add(manifest.paths[position], reason)
    usable = items[items.usable]
    return Features(usable, items.usable, usable.values)
