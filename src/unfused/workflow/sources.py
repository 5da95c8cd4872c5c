"""What a source holds: recordings and pictures (files), texts or rows of a table (records); and its items, listed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import Quarantine, printable
from unfused.data.manifest import Manifest
from unfused.data.records import TABLE_SUFFIXES, TEXT_COLUMNS, Records, read_records
from unfused.data.tables import PATH_COLUMNS
from unfused.workflow.modality import Audio, Image, Modality
from unfused.workflow.settings import Settings

__all__ = ["open_source"]


def open_source(settings: Settings, quarantine: Quarantine, export_to: Path) -> tuple[Modality, Manifest]:
    """The kind of data and the manifest of its items.

    A table with a column of paths is about those files. Any other is texts where a column of them is named or there is one
    alone, and otherwise rows; where both could be meant, a ValueError says which option tells.
    """
    from unfused.data import hub

    source = settings.source
    if hub.is_dataset(source):
        source = os.fspath(hub.export(source, export_to, tables=True))
    wanted = settings.modality in ("text", "table") or settings.text_column is not None
    if os.path.splitext(source)[1].lower() in (".xlsx", ".xls", ".ods", ".numbers"):
        raise ValueError(f"source={printable(settings.source)} is a spreadsheet: save it as CSV or Parquet")
    if os.path.isfile(source) and os.path.splitext(source)[1].lower() in TABLE_SUFFIXES:
        aside = Quarantine()
        records = read_records(source, aside)
        if wanted or not _lists_files(records, settings):
            for row, reason in aside.rows:
                quarantine.add(row, reason)
            return _of_records(settings, records)
    elif wanted and os.path.exists(source):
        name = "modality" if settings.text_column is None else "text_column"
        raise ValueError(
            f"{name}={getattr(settings, name)!r}: {printable(settings.source)} is no table: give CSV, TSV, JSONL or Parquet"
        )
    return _of_files(settings, source, quarantine, export_to)


def _lists_files(records: Records, settings: Settings) -> bool:
    """Whether the rows name files; a column called so whose files are all missing still does, unless a target is given."""
    index = records.find(*PATH_COLUMNS)
    if settings.modality in ("audio", "image"):
        return True
    if index is None:
        return False
    root = os.path.dirname(os.path.abspath(records.path))
    cells = [cell.strip() for row in records.rows[:1000] if (cell := row[index])]

    def exists(cell: str) -> bool:
        try:
            return any(os.path.lexists(os.path.join(root, name)) for name in (cell, cell.replace("\\", "/")))
        except ValueError:
            return False

    if any(map(exists, cells)):
        return True
    looks_so = any(os.path.splitext(cell)[1][1:].isalnum() for cell in cells)
    return looks_so and settings.target is None


def _names_files(records: Records, index: int) -> bool:
    """Whether a column that is not called so holds names of recordings or pictures that are there."""
    from unfused.data.audio import AUDIO_EXTENSIONS
    from unfused.data.images import IMAGE_EXTENSIONS

    root = os.path.dirname(os.path.abspath(records.path))
    cells = [cell.strip() for row in records.rows[:5] if (cell := row[index])]
    return any(
        os.path.splitext(cell)[1].lower() in AUDIO_EXTENSIONS | IMAGE_EXTENSIONS
        and os.path.isfile(os.path.join(root, cell))
        for cell in cells
    )


# --- records ---------------------------------------------------------------------------------------------


def _of_records(settings: Settings, records: Records) -> tuple[Modality, Manifest]:
    from unfused.workflow.modality_table import Rows
    from unfused.workflow.modality_text import Text

    if not records.rows:
        raise ValueError(f"source={printable(settings.source)} has no row below its header that can be used")
    manifest, special = records.manifest(settings.labels, settings.target, settings.group)
    if settings.text_column is not None:
        if settings.modality == "table":
            raise ValueError("text_column and modality='table' contradict each other: give one")
        records.column(settings.text_column)  # or a ValueError that names those that exist
        index = records.find(settings.text_column)
        assert index is not None
    else:
        index = _text_column(settings, records, special)
    if index is not None:
        return Text(records, records.columns[index], settings.width), manifest
    columns = [index for index in range(len(records.columns)) if index not in special]
    for index in columns:
        if _names_files(records, index):
            raise ValueError(
                f"column {records.columns[index]!r} of {records.path!r} names files: call it 'path'"
            )
    if not columns:
        raise ValueError(
            f"source={printable(settings.source)} has no column beside ids, labels, groups and splits"
        )
    return Rows(records, columns, settings.width), manifest


def _text_column(settings: Settings, records: Records, special: set[int]) -> int | None:
    """The column of texts, None where the rows themselves are meant."""
    if settings.modality == "table":
        return None
    texts, others = records.texts_and_others(special)
    names = [records.columns[index] for index in texts]
    if settings.modality == "text":
        if len(texts) != 1:
            free = [name for index, name in enumerate(records.columns) if index not in special]
            several = (
                f"any of {', '.join(map(repr, names))}" if texts else "none of its columns reads like one"
            )
            if not texts and len(free) == 1:
                return records.find(free[0])
            raise ValueError(
                f"modality='text': which column of {records.path!r} holds the texts ({several})? Name it with text_column "
                f"(--text-column {(names or free or ['NAME'])[0]!r})"
            )
        return texts[0]
    if not texts or (settings.target is not None and others):
        return None
    if len(texts) == 1 and not others:
        return texts[0]
    if len(texts) == 1 and names[0].lower() in TEXT_COLUMNS and len(others) <= 1 and settings.labels is None:
        return texts[0]  # a text with one remark beside it
    what = f"{len(texts)} columns of texts ({', '.join(map(repr, names[:5]))})"
    beside = f" and {len(others)} others" if others else ""
    raise ValueError(
        f"{records.path!r} holds {what}{beside}: name the texts with text_column (--text-column {names[0]!r}), or the column "
        "to predict from the others with target (--target NAME)"
    )


# --- files -----------------------------------------------------------------------------------------------


def _of_files(
    settings: Settings, source: str, quarantine: Quarantine, export_to: Path
) -> tuple[Modality, Manifest]:
    from unfused.data.audio import AUDIO_EXTENSIONS
    from unfused.data.images import IMAGE_EXTENSIONS
    from unfused.data.manifest import read_manifest

    labels: Any = settings.labels
    if settings.target is not None:
        if labels is not None:
            raise ValueError(
                f"labels={labels!r} and target={settings.target!r} both say where the labels are: give one"
            )
        if not os.path.isfile(source):
            raise ValueError(f"target={settings.target!r}: {printable(settings.source)} has no columns")
        labels = settings.target
    extensions = {"audio": AUDIO_EXTENSIONS, "image": IMAGE_EXTENSIONS}.get(
        settings.modality, AUDIO_EXTENSIONS | IMAGE_EXTENSIONS
    )
    manifest = read_manifest(
        source,
        labels=labels,
        group=settings.group,
        extensions=extensions,
        quarantine=quarantine,
        export_to=export_to,
    )
    kind = settings.modality
    if kind == "auto":
        pictures = sum(os.path.splitext(p)[1].lower() in IMAGE_EXTENSIONS for p in manifest.paths)
        kind = "image" if pictures * 2 > len(manifest.paths) else "audio"
        wrong = AUDIO_EXTENSIONS if kind == "image" else IMAGE_EXTENSIONS
        keep = [os.path.splitext(p)[1].lower() not in wrong for p in manifest.paths]
        for skipped, kept in zip(manifest.paths, keep, strict=True):
            if not kept:
                quarantine.add(skipped, f"not {kind}: most files of this folder are; see modality")
        manifest = manifest.select(np.array(keep))
    modality: Modality = Image(settings.width) if kind == "image" else Audio(settings.width)
    return modality, manifest
