"""The data that claims are tested on: real sets where they are found, small ones that ship with us."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unfused.claims.lab.sources import PACKAGE

if TYPE_CHECKING:
    from unfused.claims.lab import Lab
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
    paths : list of Path, length N
    labels : ndarray of int64, shape (N,)
        Index into `classes`.
    classes : list of str
    groups : ndarray of str, shape (N,)
        Speaker, fold or voice: what must not be on both sides of a split.
    """

    name: str
    root: Path
    paths: list[Path]
    labels: np.ndarray
    classes: list[str]
    groups: np.ndarray
    lab: Lab

    def log_mels(self, front_end: FrontEnd) -> list[np.ndarray]:
        """Log-mel of each whole clip, (n_mels, frames) float32; computed once, then read from disk."""
        files = [[p.relative_to(self.root).as_posix(), p.stat().st_size] for p in self.paths]

        def compute() -> dict[str, np.ndarray]:
            from unfused.data.audio import decode
            from unfused.nn.log_mel import log_mel_many, trim

            mels = []
            for start in range(0, len(self.paths), 256):
                clips = [decode(path, front_end.sampling_rate) for path in self.paths[start : start + 256]]
                if front_end.trim_db is not None:
                    clips = [trim(clip, front_end.trim_db) for clip in clips]
                mels += [np.asarray(mel, np.float32) for mel in log_mel_many(clips, front_end)]
            return {"mels": np.concatenate(mels, 1), "frames": np.array([mel.shape[1] for mel in mels])}

        params = {"files": files, "front_end": front_end.cache_key}
        saved = self.lab.cached(f"log-mel-{self.name}", params, compute)
        return np.split(saved["mels"], np.cumsum(saved["frames"])[:-1], axis=1)


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
        return _sample(lab)
    if name in _AUDIO:
        if lab.data_dir is None or not (lab.data_dir / "audio" / name).is_dir():
            where = lab.data_dir / "audio" / name if lab.data_dir else "no data folder"
            raise Absent(f"{name}: {where} is not here; give --data DIR or set UNFUSED_DATA")
        return _audio(name, lab.data_dir / "audio" / name, _AUDIO[name], lab)
    raise ValueError(f"world={name!r} is not known: choose one of {', '.join(NAMES)}")


def _audio(name: str, root: Path, group: str, lab: Lab) -> AudioWorld:
    from unfused.data.manifest import read_manifest

    manifest = read_manifest(root, group=group)
    labels = [str(label) for label in manifest.labels]
    classes = sorted(set(labels))
    return AudioWorld(
        name,
        root,
        [manifest.root / path for path in manifest.paths],
        np.searchsorted(classes, labels).astype(np.int64),
        classes,
        np.array([str(g) for g in manifest.groups]),
        lab,
    )


def _sample(lab: Lab) -> AudioWorld:
    raise Absent("sample: the embedded sample is not part of this installation")


def _digits() -> ImageWorld:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)  # (N, 1, 8, 8)
    return ImageWorld("digits", images, digits.target.astype(np.int64), [str(c) for c in digits.target_names])
