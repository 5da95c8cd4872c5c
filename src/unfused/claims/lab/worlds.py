"""The data that claims are tested on: real sets where they are found, small ones that ship with us."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unfused.claims.lab.sources import PACKAGE

if TYPE_CHECKING:
    from unfused.claims.lab import Lab
    from unfused.data.manifest import Manifest
    from unfused.nn.log_mel import FrontEnd

NAMES = ("sample", "fsdd", "esc10", "digits")
_AUDIO = {"fsdd": r"_([a-z]+)_\d+\.wav$", "esc10": r"(\d)-[^/]*\.ogg$"}
"""Folder under `audio/` -> pattern of a clip's group: the speaker, the fold."""


class Absent(LookupError):
    """A world's data are not on this machine; the message says where they were looked for."""


@dataclass(frozen=True, eq=False)
class AudioWorld:
    """Labelled recordings.

    Attributes
    ----------
    name : str
    manifest : Manifest
        N files with their labels and groups; `manifest.root` is what `unfused adapt` can be given.
    labels : ndarray of int64, shape (N,)
        Index into `classes`.
    classes : list of str
    groups : ndarray of str, shape (N,)
        Speaker, fold or voice: what must not be on both sides of a split.
    cache_dir : Path
        Of the features.
    """

    name: str
    manifest: Manifest
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray
    cache_dir: Path

    @classmethod
    def of(cls, name: str, manifest: Manifest, cache_dir: Path) -> AudioWorld:
        names = [str(label) for label in manifest.labels]
        classes = sorted(set(names))
        labels = np.searchsorted(classes, names).astype(np.int64)
        return cls(name, manifest, labels, classes, np.array([str(g) for g in manifest.groups]), cache_dir)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Changes with the files (names and sizes), labels and groups."""
        files = [[name, (self.manifest.root / name).stat().st_size] for name in self.manifest.paths]
        text = json.dumps([files, self.manifest.labels, self.groups.tolist()])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def select(self, chosen: np.ndarray) -> AudioWorld:
        """The clips of a mask or of indices."""
        return AudioWorld.of(self.name, self.manifest.select(chosen), self.cache_dir)

    def log_mels(self, front_end: FrontEnd) -> Sequence[np.ndarray]:
        """Log-mel of each whole clip, (n_mels, frames) float32; computed once, then mapped from disk."""
        from unfused.data.features import read_features
        from unfused.data.files import Quarantine

        bad = Quarantine()
        found = read_features(self.manifest, front_end, self.cache_dir, bad)
        if bad.rows:
            raise ValueError(
                f"{self.name}: {len(bad)} clips are damaged, such as {bad.rows[0]}; fetch it again"
            )
        return found.features


@dataclass(frozen=True, eq=False)
class ImageWorld:
    """Labelled pictures: `images` (N, 3 or 1, H, W), float32 in [0, 1] for digits; `labels` (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: list[str]


def data_dir(given: str | Path | None = None) -> Path | None:
    """Where the real sets are: the argument, `$UNFUSED_DATA`, or `../shared/data` beside a checkout."""
    if given is not None:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"data={str(given)!r} is not a folder: give the one that holds audio/, images/, text/"
            )
        return folder
    beside = PACKAGE.parents[2] / "shared" / "data"
    found = Path(os.environ["UNFUSED_DATA"]).expanduser() if os.environ.get("UNFUSED_DATA") else beside
    return found if found.is_dir() else None


def load(name: str, lab: Lab) -> AudioWorld | ImageWorld:
    if name == "digits":
        return _digits()
    if name == "sample":
        from unfused.data.sample import sample_manifest

        return _audio(name, sample_manifest(), "group", lab)
    if name in _AUDIO:
        if lab.data_dir is None or not (lab.data_dir / "audio" / name).is_dir():
            where = lab.data_dir / "audio" / name if lab.data_dir else "no data folder"
            raise Absent(f"{name}: {where} is not here; give --data DIR or set UNFUSED_DATA")
        return _audio(name, lab.data_dir / "audio" / name, _AUDIO[name], lab)
    raise ValueError(f"world={name!r} is not known: choose one of {', '.join(NAMES)}")


def _audio(name: str, source: Path, group: str, lab: Lab) -> AudioWorld:
    from unfused.data.manifest import read_manifest

    return AudioWorld.of(name, read_manifest(source, group=group), lab.cache_dir / "features")


def _digits() -> ImageWorld:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8)
    return ImageWorld("digits", images, digits.target.astype(np.int64), [str(c) for c in digits.target_names])
