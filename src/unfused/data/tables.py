"""Tables that people write about files, CSV and JSON lines, and the files that their rows mean."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ID_COLUMNS",
    "LABEL_COLUMNS",
    "PATH_COLUMNS",
    "Finder",
    "Table",
    "label_of",
    "read_table",
    "relative_to",
]

PATH_COLUMNS = tuple("path file filename file_name filepath file_path audio recording image picture".split())
ID_COLUMNS = tuple(
    "id row_id rowid uid uuid guid key index __index_level_0__".split()
)  # of rows that are no files
LABEL_COLUMNS = ("label", "class", "category", "target")


@dataclass
class Table:
    """Column names, and rows of as many cells each (None: no value).

    Attributes
    ----------
    path : str
        Where it was read, for messages.
    columns : list of str
    rows : list of list of str or None
    """

    path: str
    columns: list[str]
    rows: list[list[str | None]]

    def find(self, *names: str) -> int | None:
        """Index of the first of `names` that is a column, upper and lower case being the same."""
        columns = [column.strip().lower() for column in self.columns]
        return next((columns.index(name.lower()) for name in names if name.lower() in columns), None)

    def column(self, *names: str) -> list[str | None]:
        """The cells below the first of `names` that is a column; a ValueError tells those that exist."""
        index = self.find(*names)
        if index is None:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            there = ", ".join(map(repr, self.columns[:40])) + (", ..." if len(self.columns) > 40 else "")
            raise ValueError(f"{self.path!r} has no column {names[0]!r}{others}; its columns are {there}")
        return [row[index] for row in self.rows]


def read_table(path: str | os.PathLike[str]) -> Table:
    r"""Read a CSV file (comma, semicolon, tab or bar: what its header shows) or a JSON-lines file.

    UTF-8 with or without byte-order mark, or UTF-16 with one. Bytes that are not UTF-8 are kept as
    `os.fsdecode` keeps them, so that names of files survive.

    Raises
    ------
    ValueError
        If the file is missing, empty or malformed; the message names the line.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "labels.csv")
    >>> _ = path.write_text("\ufeffPath;Label\na.wav;dog\n", encoding="utf-8")
    >>> read_table(path).column("path")
    ['a.wav']
    """
    name = os.fspath(path)
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = content.decode("utf-16", "replace")
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    if not text.strip():
        raise ValueError(f"{name!r} is empty")
    is_json = os.path.splitext(name)[1].lower() in (".jsonl", ".ndjson", ".json")
    return Table(name, *(_parse_json(name, text) if is_json else _parse_csv(name, text)))


def delimiter_of(name: str, text: str) -> str:
    """Comma, semicolon, tab or bar: under which the header names known columns and the next row has as many cells."""
    known = {*PATH_COLUMNS, *LABEL_COLUMNS}

    def fit(delimiter: str) -> tuple[int, bool, int]:
        (_, header), (_, second) = (*itertools.islice(_records(name, text, delimiter), 2), (0, [""]))[:2]
        return sum(cell.strip().lower() in known for cell in header), len(second) == len(header), len(header)

    return max(",;\t|", key=fit)


def _parse_csv(name: str, text: str) -> tuple[list[str], list[list[str | None]]]:
    delimiter = delimiter_of(name, text)
    (_, columns), *records = _records(name, text, delimiter)
    rows: list[list[str | None]] = []
    for line, record in records:
        if len(record) > len(columns):
            raise ValueError(
                f"{name!r}, line {line}: {len(record)} cells, but the header has {len(columns)}; "
                f"put quotes around what contains {delimiter!r}"
            )
        rows.append([*record, *[None] * (len(columns) - len(record))])
    return columns, rows


def _records(name: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for record in reader:
            if any(cell.strip() for cell in record):
                yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{name!r}, line {reader.line_num}: {error}") from None


def _parse_json(name: str, text: str) -> tuple[list[str], list[list[str | None]]]:
    records: list[dict[str, Any]] = []
    whole = text.lstrip().startswith("[")  # one list instead of a line each
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line) if whole else [json.loads(line)]
            for record in values:
                if not isinstance(record, dict):
                    raise ValueError('not an object like {"path": ..., "label": ...}')
                records.append({key: _cell(value) for key, value in record.items()})
        except ValueError as error:
            raise ValueError(f"{name!r}, line {number}: {error}") from None
    columns = list(dict.fromkeys(key for record in records for key in record))
    return columns, [[record.get(column) for column in columns] for record in records]


def _cell(value: Any) -> str | None:
    if isinstance(value, dict) and isinstance(value.get("path"), str):  # {"audio": {"path": ...}}
        value = value["path"]
    if value is None or value != value:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    text.encode(
        "utf-8", "surrogateescape"
    )  # half of a surrogate pair is a ValueError: no file can be called so
    return text


def label_of(cell: str | None) -> str | None:
    """The text of a cell without the blanks around it, None if nothing is left."""
    return (cell or "").strip() or None


def relative_to(root: str, path: str) -> str:
    """`path`, made absolute, relative to the absolute folder `root` if it lies below it."""
    path, prefix = os.path.abspath(path), os.path.join(root, "")
    return path[len(prefix) :] if path.startswith(prefix) else path


class Finder:
    """Finds the files of a manifest by the names that people write into tables.

    Parameters
    ----------
    root : path
        Folder that `paths` are relative to.
    paths : sequence of str
    base : path
        Folder of the table.
    """

    def __init__(self, root: str | os.PathLike[str], paths: Sequence[str], base: str | os.PathLike[str]):
        self.root, self.base = os.path.abspath(root), os.path.abspath(base)
        self._exact = {path: row for row, path in enumerate(paths)}
        # macOS keeps names decomposed, tables are mostly composed.
        self._composed = {_composed(path): row for path, row in self._exact.items()}
        self._by_name: dict[str, list[int]] = {}
        for path, row in self._exact.items():
            self._by_name.setdefault(_composed(path.rpartition("/")[2]), []).append(row)

    def find(self, name: str) -> int | None:
        """Row of the file that `name` means, or None; a bare name that fits several files is a ValueError."""
        for spelling in dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/"))):
            row = self._find(spelling)
            if row is not None:
                return row
        return None

    def _find(self, name: str) -> int | None:
        row = self._row(name, posixpath.normpath(name))
        if row is None and "/" not in name:
            rows = self._by_name.get(_composed(name), [])
            if len(rows) > 1:
                raise ValueError(
                    f"{len(rows)} files are called {name!r}: write the path relative to {self.root!r}"
                )
            row = rows[0] if rows else None
        if row is None and "\0" not in name:
            absolute = os.path.join(self.base, name)
            row = self._row(relative_to(self.root, absolute))
            if row is None:
                row = self._row(relative_to(os.path.realpath(self.root), os.path.realpath(absolute)))
        return row

    def _row(self, *names: str) -> int | None:
        for name in names:
            row = self._exact.get(name, self._composed.get(_composed(name)))
            if row is not None:
                return row
        return None

    def rows(self, names: Sequence[str | None], source: str) -> list[int]:
        """Row of each of `names`, read in the file `source`; those that fit no file are a ValueError."""
        found = [self.find(name) if name else None for name in names]
        missing = [name for name, row in zip(names, found, strict=True) if row is None]
        if missing:
            some = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{source!r}: {len(missing):,} of its {len(names):,} rows name no file that is "
                f"among the {len(self._exact):,} of {self.root!r}: {some}"
            )
        return [row for row in found if row is not None]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
