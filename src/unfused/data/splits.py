"""Splits: what is held out, which labels are kept, what a model is selected on.

No group is ever on both sides of a split. Rows are chosen by a hash of the seed and their name, not by their
position: the order of the files does not matter, and a file that is added later moves few others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from unfused.data.manifest import Manifest
from unfused.data.tables import ID_COLUMNS, PATH_COLUMNS, Finder, read_table

__all__ = ["few_shot", "hold_out", "validation_split"]

# Of so many random choices of whole groups the best balanced is taken; with many groups any one is balanced.
_TRIALS, _TRIED_GROUPS = 32, 20_000


def hold_out(manifest: Manifest, test: float | str | os.PathLike[str], seed: int = 0) -> np.ndarray:
    """Choose the files that are kept for testing.

    Parameters
    ----------
    manifest : Manifest
    test : float, str or path
        One of

        - a fraction of the labelled files between 0 and 1: the same of each class, or, if the manifest has
          groups, whole groups that come closest to that;
        - a CSV, JSON-lines or TXT file (a path per line) that lists them;
        - ``"NAME=VALUE"``: the files of that group, or of several, ``"speaker=ann,bob"``; with
          ``"split=test"`` those that the data set itself calls so.
    seed : int, default=0

    Returns
    -------
    ndarray of bool, shape (len(manifest),)
        True: held out. By a fraction, only labelled files are chosen, and with them the rest of their group.

    Raises
    ------
    ValueError
        If `test` is none of these, names a group or file that does not exist, or leaves nothing on one side.

    Examples
    --------
    >>> from pathlib import Path
    >>> names, nothing = [f"{k}.wav" for k in range(10)], [None] * 10
    >>> manifest = Manifest(Path("/data"), names, ["dog"] * 5 + ["cat"] * 5, nothing, nothing)
    >>> held_out = hold_out(manifest, 0.4)
    >>> int(held_out[:5].sum()), int(held_out[5:].sum())
    (2, 2)
    """
    text = os.fspath(test) if isinstance(test, str | os.PathLike) else repr(float(test))
    fraction = _number(text)
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ValueError(f"test={test!r}: a fraction must lie between 0 and 1")
        chosen = _fraction(manifest, fraction, seed)
    elif os.path.isfile(text):
        chosen = _listed(manifest, text)
    elif "=" in text:
        chosen = _named(manifest, text)
    else:
        raise ValueError(f"test={text!r} is no fraction, no file and not GROUP=VALUE")
    if chosen.all() or not chosen.any():
        side = "held out" if not chosen.any() else "left to learn from"
        raise ValueError(f"test={text!r}: no file would be {side}")
    return chosen


def few_shot(
    labels: Sequence[str | None], per_class: int, seed: int = 0, eligible: np.ndarray | None = None
) -> np.ndarray:
    """Draw the labels that are kept when labels are made scarce.

    Parameters
    ----------
    labels : sequence of str or None
    per_class : int
        How many of each class; a class that has fewer keeps them all. The draw for a smaller number is
        part of the draw for a larger one.
    seed : int, default=0
    eligible : ndarray of bool, shape (len(labels),), optional
        Rows to draw from, for example those not held out.

    Returns
    -------
    ndarray of bool, shape (len(labels),)

    Examples
    --------
    >>> few_shot(["dog", "cat", "dog", None, "dog"], per_class=1).sum()
    np.int64(2)
    """
    if per_class < 1:
        raise ValueError(f"per_class={per_class} must be 1 or more")
    chosen = np.zeros(len(labels), bool)
    for name, rows in _rows_by_value(labels, eligible).items():
        generator = np.random.default_rng(
            [seed, _hash(name)]
        )  # a class draws the same whatever others there are
        chosen[generator.permutation(rows)[:per_class]] = True
    return chosen


def validation_split(
    labels: Sequence[str], groups: Sequence[str | None], fraction: float = 0.2, seed: int = 0
) -> np.ndarray:
    """Choose the labelled rows that a model is selected on, and not trained on.

    Whole groups, if there are groups and enough of them to leave each class something to train on;
    otherwise the same fraction of each class.

    Parameters
    ----------
    labels : sequence of str
        Of the labelled rows.
    groups : sequence of str or None
        Of the same rows.
    fraction : float, default=0.2
    seed : int, default=0

    Returns
    -------
    ndarray of bool, shape (len(labels),)
        Possibly all False, where every class has a single label.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must be at least 0 and below 1")
    names = [str(row) for row in range(len(labels))]
    if fraction and any(group is not None for group in groups):
        chosen = _whole_groups(labels, _group_names(groups, names), fraction, seed)
        if chosen is not None:
            return chosen
    return _stratified(labels, names, fraction, seed)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fraction(manifest: Manifest, fraction: float, seed: int) -> np.ndarray:
    if all(label is None for label in manifest.labels):
        raise ValueError(f"test={fraction}: there are no labels, so there is nothing to test on")
    if all(group is None for group in manifest.groups):
        return _stratified(manifest.labels, manifest.paths, fraction, seed)
    chosen = _whole_groups(manifest.labels, _group_names(manifest.groups, manifest.paths), fraction, seed)
    if chosen is None:
        raise ValueError(
            f"test={fraction}: no whole group can be held out without taking all labels of a class with it; "
            "use finer groups, or GROUP=VALUE"
        )
    return chosen


def _stratified(labels: Sequence[str | None], names: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """`fraction` of each class, rounded so that the total is right; every class keeps a row to train on."""
    chosen = np.zeros(len(labels), bool)
    classes = sorted(_rows_by_value(labels).items())
    sizes = np.array([len(rows) for _, rows in classes], int)
    counts = np.minimum(np.floor(fraction * sizes).astype(int), np.maximum(sizes - 1, 0))
    left = round(fraction * sizes.sum()) - counts.sum()
    # Largest remainder first; ties by a hash, lest classes early in the alphabet always win.
    remainder = fraction * sizes - counts
    for k in sorted(range(len(classes)), key=lambda k: (-remainder[k], _hash(f"{seed} {classes[k][0]}"))):
        if left > 0 and counts[k] + 1 < sizes[k]:
            counts[k] += 1
            left -= 1
    for (_, rows), count in zip(classes, counts, strict=True):
        order = sorted(rows, key=lambda row: _hash(f"{seed} {names[row]}"))
        chosen[order[:count]] = True
    return chosen


def _whole_groups(
    labels: Sequence[str | None], groups: Sequence[str], fraction: float, seed: int
) -> np.ndarray | None:
    """Whole groups with about `fraction` of the labels, balanced over the classes; None if that cannot be."""
    members = _rows_by_value(groups)
    names = sorted(members)
    classes = {name: k for k, name in enumerate(sorted({label for label in labels if label is not None}))}
    counts = np.zeros((len(names), len(classes)), int)  # labelled rows
    for k, name in enumerate(names):
        for row in members[name]:
            label = labels[row]
            if label is not None:
                counts[k, classes[label]] += 1
    labelled = np.flatnonzero(counts.sum(axis=1)).tolist()
    total = counts.sum(axis=0)
    target = fraction * total
    best, best_cost = None, np.inf
    for trial in range(max(1, min(_TRIALS, _TRIED_GROUPS // max(1, len(labelled))))):
        taken: list[int] = []
        held = np.zeros(len(classes), int)
        for k in sorted(labelled, key=lambda k: _hash(f"{seed} {trial} {names[k]}")):
            with_it = held + counts[k]
            closer = abs(with_it.sum() - target.sum()) < abs(held.sum() - target.sum())
            if closer and (with_it < total).all():
                taken.append(k)
                held = with_it
        cost = abs(held.sum() - target.sum()) + np.abs(held - target).sum()
        if taken and cost < best_cost:
            best, best_cost = taken, cost
    if best is None:
        return None
    chosen = np.zeros(len(labels), bool)
    for k in best:
        chosen[members[names[k]]] = True
    return chosen


def _listed(manifest: Manifest, path: str) -> np.ndarray:
    if os.path.splitext(path)[1].lower() == ".txt":
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            names: list[str | None] = [line for line in file.read().split("\n") if line.strip()]
    else:
        names = read_table(path).column(*PATH_COLUMNS, *ID_COLUMNS)
    finder = Finder(manifest.root, manifest.paths, os.path.dirname(os.path.abspath(path)))
    chosen = np.zeros(len(manifest), bool)
    chosen[finder.rows(names, path)] = True
    crossing = {manifest.groups[row] for row in np.flatnonzero(chosen)} - {None}
    crossing &= {manifest.groups[row] for row in np.flatnonzero(~chosen)}
    if crossing:
        some = ", ".join(map(repr, sorted(map(str, crossing))[:5]))
        raise ValueError(
            f"test={path!r} divides {len(crossing):,} groups, such as {some}: list all of their files"
        )
    return chosen


def _named(manifest: Manifest, text: str) -> np.ndarray:
    name, _, value = text.partition("=")
    by_split = name.strip().lower() == "split"
    column = manifest.split if by_split else manifest.groups
    known = {cell for cell in column if cell is not None}
    if not known:
        need = (
            "the data comes with no split"
            if by_split
            else "no groups are named; give group=REGEX or a COLUMN"
        )
        raise ValueError(f"test={text!r}: {need}")
    wanted = {value.strip()} if value.strip() in known else {part.strip() for part in value.split(",")}
    if unknown := sorted(wanted - known):
        there = ", ".join(map(repr, sorted(known)[:10])) + (", ..." if len(known) > 10 else "")
        raise ValueError(f"test={text!r}: no file has {name.strip()} {unknown[0]!r}; there are {there}")
    return np.array([cell in wanted for cell in column], bool)


def _group_names(groups: Sequence[str | None], names: Sequence[str]) -> list[str]:
    """A row without a group is a group of its own; the prefixes keep the two kinds apart."""
    return [
        f"row {name}" if group is None else f"group {group}"
        for group, name in zip(groups, names, strict=True)
    ]


def _rows_by_value(values: Sequence[str | None], eligible: np.ndarray | None = None) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None and (eligible is None or eligible[row]):
            rows.setdefault(value, []).append(row)
    return rows


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )
