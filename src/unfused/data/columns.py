"""Columns of a table: what each holds, learned from the unlabelled pool, in the form that `unfused.nn.table_model` reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from unfused.data.records import is_text
from unfused.nn.table_model import as_date, as_numbers, is_missing

__all__ = ["describe_columns"]

MOST_VALUES = 32  # of a column of names; the rarer ones are `other`
MOST_FEATURES = 20_000  # of all columns of names together
SHARE = 0.9  # of the cells that must be numbers (dates) for the column to be one; the others then count as missing


def describe_columns(
    columns: Iterable[tuple[str, Callable[[], Sequence[Any]]]], count: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """What every column is, and what the user should know about it.

    Parameters
    ----------
    columns : iterable of (name, callable)
        The callable gives the column's cells in the rows to learn from.
    count : int
        How many columns there are.

    Returns
    -------
    columns : list of dict
        As in `unfused.nn.table_model.UnfusedTableConfig`; columns that say nothing are left out.
    notes : list of str
        A line for each kind of remark: columns left out, and cells that were taken as missing.

    Examples
    --------
    >>> table = {"age": ["31", "", "45", "38"], "pet": ["cat", "dog", "cat", "cat"], "unit": ["kg"] * 4}
    >>> described, notes = describe_columns(((n, lambda c=c: c) for n, c in table.items()), 3)
    >>> [(column["name"], column["kind"]) for column in described], notes
    ([('age', 'number'), ('pet', 'name')], ["columns left out, the same in every row: 'unit'"])
    """
    most = int(np.clip(MOST_FEATURES // max(count, 1), 2, MOST_VALUES))
    described: list[dict[str, Any]] = []
    left: dict[str, list[str]] = defaultdict(list)
    for name, read in columns:
        column, remark = _describe(name, read(), most)
        if column is not None:
            described.append(column)
        if remark:
            left[remark].append(name)
    return described, [f"{remark}: {_some(names)}" for remark, names in left.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def _describe(name: str, cells: Sequence[Any], most: int) -> tuple[dict[str, Any] | None, str]:
    known = [cell for cell in cells if not is_missing(cell)]
    if not known:
        return None, "columns left out, without any value"
    gaps = len(known) < len(cells)
    decimal = "."
    numbers = as_numbers(known)
    if np.isnan(numbers).mean() > 1 - SHARE:
        with_comma = as_numbers(known, ",")
        if not np.isnan(with_comma).any():
            numbers, decimal = with_comma, ","
    if np.isnan(numbers).mean() <= 1 - SHARE:
        column = _numeric(name, "number", numbers, gaps) | ({} if decimal == "." else {"decimal": decimal})
        return _unless_constant(column, numbers, gaps)
    if isinstance(known[0], str) and np.isnan(as_date(known[0])) and np.isnan(as_date(known[-1])):
        dates = np.full(1, np.nan)
    else:
        dates = np.array([as_date(cell) for cell in known])
    if np.isnan(dates).mean() <= 1 - SHARE:
        return _unless_constant(_numeric(name, "date", dates, gaps), dates, gaps)
    return _names(name, [str(cell).strip() for cell in known], gaps, most)


def _numeric(name: str, kind: str, numbers: np.ndarray, gaps: bool) -> dict[str, Any]:
    numbers = numbers[~np.isnan(numbers)]
    deviation = float(numbers.std())
    # Rounding leaves a tiny deviation where all are the same.
    if not np.isfinite(deviation) or deviation <= 1e-13 * max(float(np.abs(numbers).max()), 1e-300):
        deviation = 1.0
    return {
        "name": name,
        "kind": kind,
        "mean": float(numbers.mean()),
        "std": deviation,
        "median": float(np.median(numbers)),
        "missing": gaps,
    }


def _unless_constant(
    column: dict[str, Any], numbers: np.ndarray, gaps: bool
) -> tuple[dict[str, Any] | None, str]:
    odd = np.isnan(numbers).any()
    if odd:
        column["missing"] = True
    if len(np.unique(numbers[~np.isnan(numbers)])) == 1 and not gaps and not odd:
        return None, "columns left out, the same in every row"
    return column, f"cells that are no {column['kind']} are taken as missing in" if odd else ""


def _names(name: str, known: Sequence[str], gaps: bool, most: int) -> tuple[dict[str, Any] | None, str]:
    counts = Counter(known)
    if len(counts) == 1 and not gaps:
        return None, "columns left out, the same in every row"
    repeated = sum(count for count in counts.values() if count > 1)
    if len(counts) > 10 and repeated < 0.2 * len(known):
        if is_text(known[:1000], name):
            return None, "columns of texts, not looked at here (text_column takes one of them)"
        return None, "columns left out, different in nearly every row"
    by_count = sorted(counts, key=lambda value: (-counts[value], value))
    values = [value for value in by_count[:most] if counts[value] > 1 or len(counts) <= most]
    return {"name": name, "kind": "name", "values": values}, ""
