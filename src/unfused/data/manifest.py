"""Manifests: which files a run is about, with the labels, groups and splits that are known of them."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from unfused.data.files import Quarantine, write_csv
from unfused.data.tables import (
    ID_COLUMNS,
    LABEL_COLUMNS,
    PATH_COLUMNS,
    Finder,
    Table,
    label_of,
    read_table,
    relative_to,
)

__all__ = ["Manifest", "check_labels", "read_labels", "read_manifest", "scan", "write_manifest"]

SPLIT_COLUMNS = ("split", "subset")
SPLIT_FOLDERS = frozenset("train training test testing val valid validation dev eval evaluation".split())


@dataclass
class Manifest:
    """The files of a run, in order; each list has one entry per file.

    Attributes
    ----------
    root : Path
        Absolute folder that `paths` are relative to.
    paths : list of str
        With forward slashes; absolute where a table names a file outside `root`.
    labels : list of str or None
        None: unlabelled.
    groups : list of str or None
        Speaker, site, device ... None: not known, and then the file counts as a group of its own.
    split : list of str or None
        A split that comes with the data ("train", "test" ...).
    notes : list of str
        What the user should know about how the source was understood, one line each.
    """

    root: Path
    paths: list[str]
    labels: list[str | None]
    groups: list[str | None]
    split: list[str | None]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, chosen: np.ndarray) -> Manifest:
        """The rows of a mask or of indices, in that order."""
        rows = np.arange(len(self))[chosen].tolist()

        def some(column: list) -> list:
            return [column[row] for row in rows]

        columns = some(self.paths), some(self.labels), some(self.groups), some(self.split)
        return Manifest(self.root, *columns, self.notes)


def read_manifest(
    source: str | os.PathLike[str],
    labels: str | os.PathLike[str] | Literal[False] | None = None,
    group: str | None = None,
    extensions: Iterable[str] | None = None,
    quarantine: Quarantine | None = None,
    export_to: str | os.PathLike[str] | None = None,
) -> Manifest:
    r"""Find the files of a corpus, in whatever form it comes.

    Parameters
    ----------
    source : path or str
        One of

        - a folder, searched with all sub-folders; hidden files are skipped, links followed, each folder once.
          If every file lies in one of two or more sub-folders, their names are the labels; where those are
          called ``train``, ``test`` and the like, they are the split, and the next level names the labels;
        - a CSV, TSV or JSON-lines manifest with a column path (or file, filename, audio, image ...) and perhaps
          label (class, category, target) and split. Paths are relative to the manifest's folder;
        - a data set saved by ``datasets.save_to_disk``, or the id of one on the hub, ``owner/name[:split]``.
    labels : path, column name or False, optional
        A CSV or JSON-lines file with the columns path and label. A path may be relative to the folder,
        absolute, relative to the labels file, or a bare file name if only one file is called so; a blank
        label means unlabelled. Of a `source` with columns, one of them can be named. False: no labels,
        whatever the sub-folders are called.
    group : str, optional
        A column of the manifest or of the labels file, or a regular expression searched in each relative
        path: its first capture group, or the whole match, names the group.
    extensions : iterable of str, optional
        Lower-case, with the dot: which files of a folder count. Default:
        `unfused.data.audio.AUDIO_EXTENSIONS`.
    quarantine : Quarantine, optional
        Gets the folders that cannot be listed.
    export_to : path, optional
        Folder for the files of a `datasets` data set.

    Returns
    -------
    Manifest
        A folder's files sorted by path, a manifest's in its own order.

    Raises
    ------
    ValueError
        If the source is none of these or holds no file, a column does not exist, a file has two different
        labels, or a label belongs to no file.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("dog/1_ann.wav", "dog/2_bob.wav", "cat/1_ann.wav"):
    ...     (folder / name).parent.mkdir(exist_ok=True)
    ...     _ = (folder / name).write_bytes(b"")
    >>> manifest = read_manifest(folder, group=r"_(\w+)\.")
    >>> manifest.paths, manifest.labels, manifest.groups
    (['cat/1_ann.wav', 'dog/1_ann.wav', 'dog/2_bob.wav'], ['cat', 'dog', 'dog'], ['ann', 'ann', 'bob'])
    """
    from unfused.data import hub
    from unfused.data.audio import AUDIO_EXTENSIONS

    source = os.fspath(source)
    extensions = frozenset(AUDIO_EXTENSIONS if extensions is None else extensions)
    if hub.is_dataset(source):
        if export_to is None:
            raise ValueError(f"source={source!r} is a data set: name a folder for its files with export_to")
        source = os.fspath(hub.export(source, export_to))

    tables: list[Table] = []  # that columns may be taken from, each with a row per file
    if os.path.isdir(source):
        manifest = _from_folder(source, extensions, quarantine)
    elif os.path.isfile(source):
        if os.path.splitext(source)[1].lower() in extensions:
            raise ValueError(f"source={source!r} is a single file: give the folder that holds it")
        manifest, table = _from_table(source)
        tables.append(table)
    else:
        raise ValueError(f"source={source!r}: there is no such folder or manifest")

    if labels is False:
        manifest.labels = [None] * len(manifest)
    elif labels is not None and tables and tables[0].find(os.fspath(labels)) is not None:
        manifest.labels = [label_of(cell) for cell in tables[0].column(os.fspath(labels))]
    elif labels is not None:
        manifest.labels, table = _labels_from(labels, manifest)
        tables.append(table)

    if group is not None:
        having = [table for table in tables if table.find(group) is not None]
        if having:
            manifest.groups = [label_of(cell) for cell in having[0].column(group)]
        else:
            columns = [column for table in tables for column in table.columns]
            manifest.groups = _groups_by_pattern(group, manifest.paths, columns)
        if alone := sum(name is None for name in manifest.groups):
            manifest.notes.append(
                f"group: {alone:,} of {len(manifest):,} files have none, and count as one each"
            )
    return manifest


def write_manifest(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Write ``path,label,group,split`` as CSV, atomically; paths below the CSV's folder relative to it."""
    folder = os.path.dirname(os.path.abspath(path))
    names = (relative_to(folder, os.path.join(manifest.root, name)) for name in manifest.paths)
    rows = zip(names, manifest.labels, manifest.groups, manifest.split, strict=True)
    write_csv(path, ("path", "label", "group", "split"), rows)


def read_labels(source: str | os.PathLike[str], manifest: Manifest) -> list[str | None]:
    """The labels that a CSV or JSON-lines file has for a manifest's files, as `read_manifest` reads them."""
    return _labels_from(source, manifest)[0]


def check_labels(manifest: Manifest) -> dict[str, int]:
    """Count the labels of each class, and refuse what no classifier can be made of.

    Returns
    -------
    dict of str to int
        Class -> labelled files, sorted by class; empty if there are no labels.

    Raises
    ------
    ValueError
        If there is a single label in all, or all labels are the same.
    """
    counts = Counter(label for label in manifest.labels if label is not None)
    if len(counts) == 1:
        [(name, count)] = counts.items()
        what = f"there is a single label, {name!r}" if count == 1 else f"all {count:,} labels are {name!r}"
        raise ValueError(f"labels: {what}; label files of two classes or more, or none at all")
    return dict(sorted(counts.items()))


def scan(
    root: str | os.PathLike[str], extensions: Iterable[str], quarantine: Quarantine | None = None
) -> list[str]:
    """List the files below `root` with one of `extensions`; links are followed, each folder is listed once.

    Parameters
    ----------
    root : path
    extensions : iterable of str
        Lower-case, with the dot.
    quarantine : Quarantine, optional
        Gets the folders that cannot be listed.

    Returns
    -------
    list of str
        Sorted, relative to `root`, with forward slashes. Names that begin with a dot are skipped. A
        broken link or whatever else cannot be read is listed too: reading it tells the reason.
    """
    return _scan(os.fspath(root), frozenset(extensions), quarantine)[0]


def _scan(
    root: str, extensions: frozenset[str], quarantine: Quarantine | None
) -> tuple[list[str], Counter[str]]:
    paths: list[str] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        # Links last, so that a folder is listed under its own name rather than a link's.
        prefix = folders.pop() if folders else links.pop()
        try:
            status = os.stat(os.path.join(root, prefix))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, prefix)) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if quarantine is not None:
                quarantine.add(prefix or root, f"a folder that cannot be listed: {error.strerror or error}")
            continue
        for entry in found:
            if entry.name.startswith("."):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
            elif suffix in extensions:
                paths.append(prefix + entry.name)
            else:
                others[suffix] += 1
    return sorted(paths), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _from_folder(folder: str, extensions: frozenset[str], quarantine: Quarantine | None) -> Manifest:
    paths, others = _scan(folder, extensions, quarantine)
    others_text = ", ".join(f"{count:,} {suffix or 'without one'}" for suffix, count in others.most_common(5))
    if not paths:
        found = f"the extensions found are {others_text}" if others else "it holds no files"
        raise ValueError(f"{folder!r}: no file with extension {' '.join(sorted(extensions))}; {found}")
    n = len(paths)
    manifest = Manifest(Path(os.path.abspath(folder)), paths, [None] * n, [None] * n, [None] * n)
    if others:
        manifest.notes.append(f"left out by their extension: {others_text}")
    parts = [path.split("/") for path in paths]
    level = 0
    if all(len(part) > 1 and part[0].lower() in SPLIT_FOLDERS for part in parts):
        manifest.split = [part[0] for part in parts]
        level = 1
    if all(len(part) > level + 1 for part in parts):
        names = {part[level] for part in parts}
        if 2 <= len(names) < n:
            manifest.labels = [part[level] for part in parts]
            manifest.notes.append(f"labels: the names of {len(names):,} folders")
    return manifest


def _from_table(source: str) -> tuple[Manifest, Table]:
    table = read_table(source)
    root = os.path.dirname(os.path.abspath(source))
    label_column, split_column = table.find(*LABEL_COLUMNS), table.find(*SPLIT_COLUMNS)
    first: dict[str, int] = {}
    for row, cell in enumerate(table.column(*PATH_COLUMNS)):
        if not label_of(cell):
            raise ValueError(f"{source!r}: row {row + 1} below the header has no path")
        path = _path_meant(str(cell), root)
        earlier = table.rows[first.setdefault(path, row)]
        for column in (label_column, split_column):
            if column is not None and label_of(earlier[column]) != label_of(table.rows[row][column]):
                name, (a, b) = table.columns[column], (earlier[column], table.rows[row][column])
                raise ValueError(f"{source!r} lists {path!r} twice, with {name} {a!r} and {b!r}: drop one")
    if not first:
        raise ValueError(f"{source!r} lists no files")
    if not any(_exists(os.path.join(root, path)) for path in first):
        raise ValueError(
            f"{source!r}: none of its {len(first):,} files exists, such as {next(iter(first))!r}; "
            f"paths are taken relative to {root!r}"
        )
    table = Table(table.path, table.columns, [table.rows[row] for row in first.values()])

    def cells(index: int | None) -> list[str | None]:
        return [None if index is None else label_of(row[index]) for row in table.rows]

    groups: list[str | None] = [None] * len(first)
    return Manifest(Path(root), list(first), cells(label_column), groups, cells(split_column)), table


def _path_meant(cell: str, root: str) -> str:
    spellings = dict.fromkeys((cell, cell.strip(), cell.strip().replace("\\", "/")))
    path = next((name for name in spellings if _exists(os.path.join(root, name))), cell.strip())
    return relative_to(root, path) if os.path.isabs(path) else posixpath.normpath(path)


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # characters that no file name can hold
        return False


def _labels_from(source: str | os.PathLike[str], manifest: Manifest) -> tuple[list[str | None], Table]:
    """Labels of the manifest's files, and the table they stand in with its rows in the manifest's order."""
    table = read_table(source)
    cells = table.column(*LABEL_COLUMNS)
    rows = Finder(manifest.root, manifest.paths, Path(source).parent).rows(
        table.column(*PATH_COLUMNS, *ID_COLUMNS), table.path
    )
    labels: list[str | None] = [None] * len(manifest)
    aligned: list[list[str | None]] = [[None] * len(table.columns)] * len(manifest)
    for row, cell, record in zip(rows, cells, table.rows, strict=True):
        label = label_of(cell)
        if label is not None and labels[row] not in (None, label):
            path = manifest.paths[row]
            raise ValueError(f"{table.path!r} labels {path!r} both {labels[row]!r} and {label!r}: drop one")
        labels[row] = label or labels[row]
        aligned[row] = record
    return labels, Table(table.path, table.columns, aligned)


def _groups_by_pattern(group: str, paths: list[str], columns: list[str]) -> list[str | None]:
    is_no_column = "no column" + (f" ({', '.join(map(repr, columns))})" if columns else "")
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"group={group!r} is {is_no_column} and no regular expression: {error}") from None
    matches = [pattern.search(path) for path in paths]
    if not any(matches):
        raise ValueError(
            f"group={group!r} is {is_no_column}, and as a regular expression it matches no path, "
            f"such as {paths[0]!r}"
        )
    first = 1 if pattern.groups else 0
    return [(match.group(first) or match.group(0) or None) if match else None for match in matches]
