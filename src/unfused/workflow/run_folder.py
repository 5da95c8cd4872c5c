"""The run folder: stages that are computed once, resumed after a kill and reused by the next command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unfused.data.files import read_json, write_csv, write_json
from unfused.data.tables import label_of, read_table

OWN_COLUMNS = (
    "path",
    "label",
    "cluster",
    "reason",
)  # of `to_label.csv`; what stands beside them is the item itself


def beside(shown: dict[str, str]) -> dict[str, str]:
    """Cells of an item under names that do not collide with the columns of `to_label.csv`."""
    return {
        f"{name} (data)" if name.strip().lower() in OWN_COLUMNS else name: cell
        for name, cell in shown.items()
    }


def fingerprint(value: Any) -> str:
    """A short hash of anything JSON can write; two equal settings give equal hashes."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _wait_for_the_disk(folder: Path) -> None:
    """After a power cut there must be no `done.json` without the arrays that it stands for."""
    for file in folder.iterdir():
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


@dataclass
class StageResult:
    """What a finished stage left: its folder, its `done.json` and whether this command computed it."""

    name: str
    folder: Path
    key: str
    info: dict[str, Any]
    reused: bool


@dataclass
class RunFolder:
    """`runs/NAME/`: the products of a run on top, the stages' own files in `stages/`.

    A stage is identified by a *key*, the fingerprint of everything that its result depends on (settings and the keys of
    the stages before it). A folder whose `done.json` carries the same key is reused; one without `done.json` was
    interrupted and is handed to `compute` again, which resumes from the checkpoints it finds there; one with another
    key is stale and is computed afresh.

    `relocate(path, cells)` says what an item is called today that had this name, and these cells beside it, when somebody
    was asked for its label.
    """

    path: Path
    on_stage: Callable[[str, bool], None] = lambda name, reused: None
    relocate: Callable[[str, dict[str, str]], str] = lambda path, beside: path
    results: list[StageResult] = field(default_factory=list)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of writers that were killed."""
        for file in [*self.path.glob(".tmp-*"), *(self.path / "stages").rglob(".tmp-*")]:
            file.unlink(missing_ok=True)

    def stage(
        self, name: str, depends_on: Any, compute: Callable[[Path], dict[str, Any] | None]
    ) -> StageResult:
        """Run `compute(folder)` unless its result for the same `depends_on` is there already.

        `compute` writes its arrays into `folder` and returns the numbers to keep (JSON); wall time is added to them.
        """
        key = fingerprint(depends_on)
        folder = self.path / "stages" / name
        done, started = folder / "done.json", folder / "started.json"
        if done.exists() and (info := read_json(done)).get("key") == key:
            result = StageResult(name, folder, key, info, reused=True)
        else:
            if folder.exists() and not (
                started.exists() and read_json(started).get("key") == key and not done.exists()
            ):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not started.exists():
                write_json(started, {"key": key, "depends_on": depends_on})
            self.on_stage(name, False)
            begin = time.perf_counter()
            info = {"key": key, **(compute(folder) or {})}
            info.setdefault("seconds", round(time.perf_counter() - begin, 3))
            _wait_for_the_disk(folder)
            write_json(done, info)
            result = StageResult(name, folder, key, info, reused=False)
        if result.reused:
            self.on_stage(name, True)
        self.results.append(result)
        return result

    def collect_answers(self) -> dict[str, str]:
        """What a person has filled in into `to_label.csv`, now or before: path -> label.

        Kept in `labels.csv` beside it before anything else happens, since `to_label.csv` is written anew. Rows of a table
        are kept with their cells: `relocate` finds them again when rows above them have come or gone.
        """
        kept = self.path / "labels.csv"
        answers: dict[str, str] = {}
        cells: dict[str, dict[str, str]] = {}
        for file in (kept, self.path / "to_label.csv"):
            if file.exists():
                table = read_table(file)
                others = [
                    i for i, name in enumerate(table.columns) if name.strip().lower() not in OWN_COLUMNS
                ]
                rows = zip(table.column("path"), table.column("label"), table.rows, strict=True)
                for path, cell, row in rows:
                    if path and (label := label_of(cell)):
                        shown = {table.columns[i]: row[i] or "" for i in others}
                        path = self.relocate(path, shown)
                        answers[path], cells[path] = label, shown
        if answers:
            names = list(dict.fromkeys(name for shown in cells.values() for name in shown))
            rest = {path: [shown.get(name, "") for name in names] for path, shown in cells.items()}
            write_csv(
                kept,
                ("path", "label", *names),
                [(path, label, *rest[path]) for path, label in sorted(answers.items())],
            )
        return answers
