"""Data sets of the Hugging Face `datasets` library, written out as a folder of files with a manifest, or as a table."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

from unfused.data.files import disk_errors, read_json, write_csv, write_json

__all__ = ["export", "is_dataset"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+%\[\]:-]+)?", re.ASCII)
_SUFFIXES = {
    b"RIFF": ".wav",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"\x89PNG": ".png",
    b"\xff\xd8\xff\xe0": ".jpg",
}


def is_dataset(source: str) -> bool:
    """Whether `source` is a folder made by ``save_to_disk``, or reads like a hub id and like no path here."""
    if os.path.isdir(source):
        names = set(os.listdir(source)) if os.access(source, os.R_OK) else set()
        return "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names
    is_path = os.path.lexists(source) or os.path.isdir(os.path.dirname(source))
    return not is_path and bool(_HUB_ID.fullmatch(source))


def export(source: str, folder: str | os.PathLike[str], tables: bool = False) -> Path:
    """Write a data set's recordings or pictures as files, with a ``manifest.csv``; once, until it changes.

    Encoded files are copied byte for byte and bare arrays become WAV. Nothing is decoded: a broken
    recording is found where all are, when it is read.

    Parameters
    ----------
    source : str
        Hub id ``owner/name[:split]``, or a folder made by ``save_to_disk``.
    folder : path
        The files go to a sub-folder of it.
    tables : bool, default=False
        Write a data set without recordings or pictures too: its plain values, as ``table.csv``.

    Returns
    -------
    Path
        The manifest: path, split, and every column of plain values, classes by their names. The table: the same without
        paths.

    Raises
    ------
    ValueError
        If `datasets` is not installed, or the data set cannot be loaded or has no Audio or Image column.
    """
    splits = _load(source)
    state = {name: split._fingerprint for name, split in splits.items()}
    name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source
    target = Path(folder) / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data")
    done = target / "export.json"
    has_media = all(_columns(source, split.features, tables)[0] is not None for split in splits.values())
    manifest = target / ("manifest.csv" if has_media else "table.csv")
    if done.exists() and manifest.exists() and read_json(done) == state:
        return manifest
    with disk_errors(folder):
        target.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        columns: dict[str, None] = {}
        rows: list[dict[str, Any]] = []
        for name, split in splits.items():
            media, plain = _columns(source, split.features, tables)
            classes = {column: getattr(split.features[column], "names", None) for column in plain}
            columns |= dict.fromkeys(plain)
            if media is None:
                rows += [
                    {"split": name} | {column: _plain(row[column], classes[column]) for column in plain}
                    for row in split.select_columns(plain)
                ]
                continue
            (target / name).mkdir(exist_ok=True)
            for number, row in enumerate(_undecoded(split, media)):
                content, suffix = _encoded(row[media])
                path = f"{name}/{number:06d}{suffix}"
                (target / path).write_bytes(content)
                cells = {column: _plain(row[column], classes[column]) for column in plain}
                rows.append({"path": path, "split": name} | cells)
        several = len(splits) > 1 or has_media
        header = [*(["path"] if has_media else []), *(["split"] if several else []), *columns]
        write_csv(manifest, header, ([row.get(column) for column in header] for row in rows))
        write_json(done, state)
    return manifest


def _load(source: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"source={source!r} is a data set of the `datasets` library: pip install 'unfused[hub]' for it"
        ) from None
    try:
        if os.path.isdir(source):
            loaded = datasets.load_from_disk(source)
        else:
            name, _, split = source.partition(":")
            loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # whatever the network, the hub or a broken folder gives
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        here = "" if os.path.isdir(source) else "is no folder here, and "
        raise ValueError(f"source={source!r} {here}cannot be loaded as a data set: {reason}") from error
    return (
        dict(loaded)
        if isinstance(loaded, dict)
        else {re.sub(r"\W.*", "", str(loaded.split or "all")): loaded}
    )


def _columns(source: str, features: Any, tables: bool) -> tuple[str | None, list[str]]:
    """The column of recordings or pictures, if there is one, and those of plain values."""
    import datasets

    def is_media(feature: Any) -> bool:
        if isinstance(feature, datasets.Audio | datasets.Image):
            return True
        return isinstance(feature, dict) and {"array", "sampling_rate"} <= feature.keys()

    media = [name for name, feature in features.items() if is_media(feature)]
    plain = [name for name, f in features.items() if isinstance(f, datasets.Value | datasets.ClassLabel)]
    plain = [name for name in plain if name.lower() not in ("path", "split")]
    if not media and not (tables and plain):
        raise ValueError(
            f"source={source!r} has no Audio or Image column; its columns are {', '.join(features)}"
        )
    return (media[0] if media else None), plain


def _undecoded(split: Any, media: str) -> Any:
    feature = split.features[media]
    return split if isinstance(feature, dict) else split.cast_column(media, type(feature)(decode=False))


def _encoded(value: dict[str, Any] | None) -> tuple[bytes, str]:
    """Content and extension of a file for one cell; nothing if the cell is empty."""
    if not value:
        return b"", ".bin"
    if value.get("array") is not None:
        import numpy as np
        import soundfile

        buffer = io.BytesIO()
        samples = np.asarray(value["array"], np.float32)
        soundfile.write(buffer, samples.T, int(value["sampling_rate"]), format="WAV", subtype="FLOAT")
        return buffer.getvalue(), ".wav"
    path, content = value.get("path") or "", value.get("bytes")
    if content is None:
        content = Path(path).read_bytes() if os.path.isfile(path) else b""
    return content, Path(path).suffix.lower() or _SUFFIXES.get(content[:4], ".bin")


def _plain(value: Any, names: list[str] | None) -> Any:
    if names is None or value is None:
        return value
    return names[value] if value >= 0 else None  # -1: not labelled
