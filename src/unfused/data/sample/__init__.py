"""The embedded sample: 720 clips of ten words spoken by 36 synthetic voices in 12 accents.

It is what `unfused adapt` runs on when no folder is named, and what the claims and tests run on everywhere.
Made by `tools/make_sample.py` with espeak-ng; the clips are in the public domain (CC0-1.0).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["sample_folder", "sample_manifest"]


def sample_folder() -> Path:
    """Folder of class folders, one per word, of Ogg Opus clips named `<word>_<voice>_<take>.ogg`.

    Examples
    --------
    >>> from unfused.data.sample import sample_folder
    >>> sorted(folder.name for folder in sample_folder().iterdir())[:3]
    ['banana', 'mango', 'metro']
    """
    return Path(__file__).parent / "clips"


def sample_manifest() -> Path:
    """CSV of the clips: path (relative to the CSV), label (the word), group (the voice).

    Examples
    --------
    >>> from unfused.data.sample import sample_manifest
    >>> from unfused.data.manifest import read_manifest
    >>> manifest = read_manifest(sample_manifest(), group="group")
    >>> len(manifest), len(set(manifest.labels)), len(set(manifest.groups))
    (720, 10, 36)
    """
    return Path(__file__).parent / "manifest.csv"
