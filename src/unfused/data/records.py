"""Records: texts, and rows of numbers and names, out of CSV, TSV, JSON lines or Parquet.

Where a manifest lists files, each record is the thing itself. It is called by the cell of an id column, where there is one
whose values all differ, and else by its place: `row 17` is the 17th below the header, also when others are set aside.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unfused.data.files import Quarantine, kind_of
from unfused.data.manifest import SPLIT_COLUMNS, Manifest, _groups_by_pattern, _labels_from
from unfused.data.tables import ID_COLUMNS, LABEL_COLUMNS, PATH_COLUMNS, Table, _cell, delimiter_of, label_of

__all__ = ["TABLE_SUFFIXES", "Records", "is_text", "read_records"]

TABLE_SUFFIXES = frozenset(".csv .tsv .tab .jsonl .ndjson .json .parquet .pq".split())
TEXT_COLUMNS = tuple(
    "text body sentence content message utterance query question review comment abstract description document title".split()
)
NO_VALUE = frozenset(
    ("", "na", "n/a", "nan", "null", "?")
)  # in lower case: how tables say that there is none
MOST_CLASSES = 1000
_ESCAPED = re.compile("[\ud800-\udfff]")  # what `surrogateescape` makes of bytes that are no UTF-8
_BEYOND_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]")


@dataclass
class Records(Table):
    """A table whose rows are the items of a run.

    Attributes
    ----------
    ids : list of str
        What each row is called; they differ.
    id_column : int or None
    notes : list of str
        How it was understood, a line each.
    """

    ids: list[str] = field(default_factory=list)
    id_column: int | None = None
    notes: list[str] = field(default_factory=list)

    def select(self, rows: Sequence[int]) -> Records:
        return Records(
            self.path,
            self.columns,
            [self.rows[row] for row in rows],
            [self.ids[row] for row in rows],
            self.id_column,
            self.notes,
        )

    def cells(self, index: int) -> list[str | None]:
        """One column; None where it has no value."""
        return [
            None if (cell := row[index]) is None or cell.strip().lower() in NO_VALUE else cell
            for row in self.rows
        ]

    def manifest(
        self, labels: str | None = None, target: str | None = None, group: str | None = None
    ) -> tuple[Manifest, set[int]]:
        """The rows as a manifest, and the columns that say something about a row instead of being part of it.

        Parameters
        ----------
        labels : str, optional
            A column, or a CSV or JSON-lines file of ids and labels.
        target : str, optional
            A column. Default: label, class, category or target, where there is one.
        group : str, optional
            A column, or a regular expression on the ids.

        Raises
        ------
        ValueError
            A column does not exist; both `labels` and `target` are given; the labels are numbers on a scale.
        """
        if labels is not None and target is not None:
            raise ValueError(
                f"labels={labels!r} and target={target!r} both say where the labels are: give one"
            )
        special = set() if self.id_column is None else {self.id_column}
        nothing: list[str | None] = [None] * len(self.rows)
        root = Path(os.path.dirname(os.path.abspath(self.path)))
        manifest = Manifest(
            root, list(self.ids), list(nothing), list(nothing), list(nothing), list(self.notes)
        )
        name = target if target is not None else labels
        own = self.find(*LABEL_COLUMNS) if name is None or self.find(name) is None else self.find(name)
        tables: list[Table] = [self]
        if target is not None:
            self.column(target)  # or a ValueError that names those that exist
        if own is not None:
            special.add(own)
        if labels is not None and self.find(labels) is None:
            if not os.path.isfile(labels):
                there = ", ".join(map(repr, self.columns[:40]))
                raise ValueError(
                    f"labels={labels!r} is no column of {self.path!r} and no file; its columns are {there}"
                )
            manifest.labels, found = _labels_from(labels, manifest)
            tables.append(found)
            if own is not None:
                manifest.notes.append(
                    f"column {self.columns[own]!r} is not looked at: the labels are in {labels}"
                )
        elif own is not None:
            manifest.labels = [label_of(row[own]) for row in self.rows]
            self._check_classes(self.columns[own], manifest.labels)
        if (split := self.find(*SPLIT_COLUMNS)) is not None and split != own:
            manifest.split = [label_of(row[split]) for row in self.rows]
            special.add(split)
        if group is not None:
            having = [table for table in tables if table.find(group) is not None]
            if having:
                manifest.groups = [label_of(cell) for cell in having[0].column(group)]
                if having[0] is self:
                    special.add(self.find(group))  # type: ignore[arg-type]
            else:
                columns = [column for table in tables for column in table.columns][:40]
                manifest.groups = _groups_by_pattern(group, manifest.paths, columns)
            if alone := sum(name is None for name in manifest.groups):
                manifest.notes.append(
                    f"group: {alone:,} of {len(manifest):,} rows have none, and count as one each"
                )
        return manifest, special

    def _check_classes(self, name: str, labels: Sequence[str | None]) -> None:
        counts = Counter(label for label in labels if label is not None)
        fractions = sum(_is_number(label) and not label.lstrip("+-").isdigit() for label in counts)
        if len(counts) > 20 and fractions > len(counts) / 2:
            raise ValueError(
                f"column {name!r} holds {len(counts):,} different numbers: classes are told apart here, not amounts; "
                "name another column with target, or put the numbers into classes first"
            )
        if len(counts) > max(20, len(self.rows) // 2) or len(counts) > MOST_CLASSES:
            raise ValueError(
                f"column {name!r} holds {len(counts):,} different labels in {len(labels):,} rows: that is a name of each row "
                "rather than its class; name another column with target"
            )

    def texts_and_others(self, special: set[int]) -> tuple[list[int], list[int]]:
        """Columns of texts, and those of numbers or names that say something; by a sample of the rows."""
        sample = self.rows[:: max(1, len(self.rows) // 200)]
        texts, others = [], []
        for index, name in enumerate(self.columns):
            if index in special:
                continue
            cells = [
                cell
                for row in sample
                if (cell := row[index]) is not None and cell.strip().lower() not in NO_VALUE
            ]
            different = len(set(cells))
            if is_text(cells, name):
                texts.append(index)
            elif different > 1:
                others.append(index)
        return texts, others


def is_text(cells: Sequence[str], name: str = "") -> bool:
    """Whether a column reads like texts: mostly different, of five words on average or, called `body` say, of fewer."""
    if not cells:
        return False
    different = len(set(cells)) > len(cells) / 2
    words = sum(len(cell.split()) for cell in cells) / len(cells)
    # A sentence of Chinese or Thai is one word between blanks.
    unspaced = (
        sum(len(_BEYOND_ASCII.findall(cell)) >= max(6, len(cell) / 2) for cell in cells) > len(cells) / 2
    )
    named = name.strip().lower() in TEXT_COLUMNS and not all(map(_is_number, cells))
    return different and (words >= 5 or unspaced or (named and words > 1))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_records(path: str | os.PathLike[str], quarantine: Quarantine) -> Records:
    r"""Read a table of records; rows that cannot be read are set aside, and the others keep their numbers.

    UTF-8, or UTF-16 with its mark. A file none of whose bytes beyond ASCII is UTF-8 is read as Windows-1252, with a note; in
    any other, rows with bytes that are not UTF-8 are set aside.

    Parameters
    ----------
    path : path
        CSV (comma, semicolon, tab or bar), TSV, JSON lines (or one list), or Parquet, by its extension.
    quarantine : Quarantine
        Gets rows with too many cells, broken JSON, undecodable bytes, or nothing at all in them.

    Raises
    ------
    ValueError
        The file is missing, empty or no table, or pyarrow is not installed for Parquet.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "texts.csv")
    >>> _ = path.write_text("id,body\n7,hello\n8,one, two\n9,good bye\n")
    >>> records, aside = read_records(path, quarantine := Quarantine()), quarantine.rows
    >>> records.ids, aside
    (['7', '9'], [('row 2', '3 cells, but the header has 2: put quotes around what contains the separator')])
    """
    name = os.fspath(path)
    suffix = os.path.splitext(name)[1].lower()
    notes: list[str] = []
    if suffix in (".parquet", ".pq"):
        columns, rows = _read_parquet(name, notes)
        numbered: list[tuple[int, list[str | None]]] = list(enumerate(rows, 1))
    else:
        text = _read_text(name, notes)
        parse = _json_records if suffix in (".jsonl", ".ndjson", ".json") else _csv_records
        columns, numbered = parse(name, text, "\t" if suffix in (".tsv", ".tab") else None, quarantine)
    columns = _distinct(columns)
    kept, numbers = [], []
    for number, row in numbered:
        reason = None
        if not any(cell and cell.strip() for cell in row):
            reason = "an empty row"
        elif wrong := next(
            (c for c, cell in zip(columns, row, strict=True) if cell and _ESCAPED.search(cell)), None
        ):
            reason = f"bytes that are not UTF-8 in column {wrong!r}"
        if reason:
            quarantine.add(f"row {number}", reason)
        else:
            kept.append(row)
            numbers.append(number)
    records = Records(name, columns, kept, notes=notes)
    _name_rows(records, numbers)
    return records


def _name_rows(records: Records, numbers: Sequence[int]) -> None:
    records.ids = [f"row {number}" for number in numbers]
    lower = [column.strip().lower() for column in records.columns]
    for name in (*ID_COLUMNS, *PATH_COLUMNS):
        if name not in lower:
            continue
        index = lower.index(name)
        cells = [label_of(row[index]) or "" for row in records.rows]
        if all(_is_number(cell) and not cell.lstrip("-").isdigit() for cell in cells):
            continue  # measurements
        if "" not in cells and len(set(cells)) == len(cells):
            records.ids, records.id_column = cells, index
            return
        if name in ID_COLUMNS:
            records.notes.append(
                f"column {records.columns[index]!r} does not name each row: rows are called by their number"
            )


def _distinct(columns: Sequence[str]) -> list[str]:
    """Names without blanks around them; nameless and repeated ones get a number."""
    result: list[str] = []
    taken: set[str] = set()
    for number, column in enumerate(columns, 1):
        name = (column or "").strip() or (
            "index" if number == 1 else f"column {number}"
        )  # pandas writes its index so
        base, copy = name, 1
        while name in taken:
            copy += 1
            name = f"{base} ({copy})"
        taken.add(name)
        result.append(name)
    return result


# --- text files ------------------------------------------------------------------------------------------


def _read_text(name: str, notes: list[str]) -> str:
    try:
        content = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not content:
        raise ValueError(f"{name!r} is empty")
    kind = kind_of(name)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = content.decode("utf-16", "replace")
    elif kind not in ("text", "a web page", "unknown data"):
        raise ValueError(f"{name!r} is {kind}, not a table: give CSV, TSV, JSON lines or Parquet")
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
        if _ESCAPED.search(text) and not _BEYOND_ASCII.search(text):
            text = content.decode("cp1252", "replace")
            notes.append("not UTF-8: read as Windows-1252 (Western European)")
    if not text.strip():
        raise ValueError(f"{name!r} is empty")
    return text


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_records(
    name: str, text: str, delimiter: str | None, quarantine: Quarantine
) -> tuple[list[str], list[tuple[int, list[str | None]]]]:
    with _cells_of_any_size():
        delimiter = delimiter or delimiter_of(name, text)
        header = next(csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter))
        if len(header) == 1:  # one column: nothing separates, and a comma is a comma
            delimiter = "\x1f"
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns: list[str] | None = None
        rows: list[tuple[int, list[str | None]]] = []
        number = 0
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                number += 1
                quarantine.add(f"row {number}", f"unreadable: {error}")
                continue
            if record is None:
                break
            if not record:  # a blank line
                continue
            if columns is None:
                columns = record
                continue
            number += 1
            if len(record) > len(columns):
                quarantine.add(
                    f"row {number}",
                    f"{len(record)} cells, but the header has {len(columns)}: put quotes around what contains the separator",
                )
            else:
                rows.append((number, [*record, *[None] * (len(columns) - len(record))]))
    return columns or header, rows


def _json_records(
    name: str, text: str, delimiter: str | None, quarantine: Quarantine
) -> tuple[list[str], list[tuple[int, list[str | None]]]]:
    found: list[tuple[int, Any]] = []
    if text.lstrip().startswith("["):
        try:
            found = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ValueError(f"{name!r} is no list in JSON: {error}") from None
    else:
        for number, line in enumerate((line for line in text.split("\n") if line.strip()), 1):
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                quarantine.add(f"row {number}", f"broken JSON: {error}")
    rows: list[tuple[int, dict[str, str | None]]] = []
    for number, record in found:
        if not isinstance(record, dict):
            quarantine.add(f"row {number}", 'not an object like {"text": ..., "label": ...}')
            continue
        try:
            rows.append((number, {key: _cell(value) for key, value in record.items()}))
        except ValueError:  # half of a surrogate pair
            quarantine.add(f"row {number}", "characters that cannot be written")
    columns = list(dict.fromkeys(key for _, record in rows for key in record))
    if not columns:
        raise ValueError(f"{name!r} holds no JSON object: give one a line, {{column: value, ...}}")
    return columns, [(number, [record.get(column) for column in columns]) for number, record in rows]


# --- Parquet ---------------------------------------------------------------------------------------------


def _read_parquet(name: str, notes: list[str]) -> tuple[list[str], list[list[str | None]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{name!r} is Parquet, which pyarrow reads: pip install 'unfused[parquet]', or save it as CSV"
        ) from None
    if not os.path.isfile(name):
        raise ValueError(f"{name!r} cannot be read: no such file")
    try:
        table = pyarrow.parquet.read_table(name)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name!r} is no readable Parquet file: {str(error).splitlines()[0]}") from None
    columns, parts, left = [], [], []
    for column in table.column_names:
        kind = table.schema.field(column).type
        if (
            pyarrow.types.is_nested(kind)
            or pyarrow.types.is_binary(kind)
            or pyarrow.types.is_large_binary(kind)
        ):
            left.append(column)
            continue
        columns.append(column)
        parts.append(_plain_cells(table.column(column).to_pylist(), narrow=pyarrow.types.is_float32(kind)))
    if left:
        notes.append(f"left out: {', '.join(map(repr, left[:10]))}, which hold lists, records or bytes")
    if not columns:
        raise ValueError(f"{name!r} holds no column of plain values")
    return columns, [list(row) for row in zip(*parts, strict=True)]


def _plain_cells(values: list[Any], narrow: bool) -> list[str | None]:
    """As a CSV file would hold them; whole numbers that became fractions because some were missing are whole again."""
    import numpy as np

    known = [value for value in values if value is not None and value == value]
    if known and all(isinstance(value, float) for value in known):
        whole = all(value.is_integer() and abs(value) < 2**53 for value in known)

        def show(value: float) -> str:
            return str(int(value)) if whole else str(np.float32(value) if narrow else value)
    else:
        show = str  # type: ignore[assignment]
    return [None if value is None or value != value else show(value) for value in values]
