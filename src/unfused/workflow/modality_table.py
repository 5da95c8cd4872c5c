"""Rows of a table: standardised numbers and names, an MLP, cells replaced by draws from their column, boosted trees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import Quarantine, read_json, write_json
from unfused.data.manifest import Manifest
from unfused.data.records import Records
from unfused.workflow.modality import Corpus, Inputs, _new_array

__all__ = ["Rows"]

CORRUPTION = 0.3
SHOWN = 40  # columns in `to_label.csv` and the report


class Rows:
    """The columns of a table of records.

    Parameters
    ----------
    records : Records
    columns : sequence of int
        The columns to look at.
    width : int, default=32
        An eighth of the network's layers.
    """

    name = "table"
    task = "tabular-classification"
    classic_on_one_scale = False

    def __init__(self, records: Records, columns: list[int], width: int = 32) -> None:
        self.records, self.columns, self.width = records, columns, width
        self.described: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.values: np.ndarray | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "modality": self.name,
            "encoder": f"3 layers of {8 * self.width}",
            "columns": [self.records.columns[index] for index in self.columns],
            "augment": CORRUPTION,
        }

    def read(
        self, manifest: Manifest, cache: Path, quarantine: Quarantine, progress: Callable | None = None
    ) -> Corpus:
        """The rows; those without any value in the columns are set aside. Copies stay: rows of a table may well be alike."""
        cells = [[row[index] for index in self.columns] for row in self.records.rows]
        usable = np.array([any(cell and cell.strip() for cell in row) for row in cells], bool)
        for index in np.flatnonzero(~usable).tolist():
            quarantine.add(manifest.paths[index], "no value in any column")
        chosen = manifest.select(usable)
        raw = [row for row, good in zip(cells, usable, strict=True) if good]
        if copies := len(raw) - len({tuple(row) for row in raw}):
            chosen.notes.append(f"{copies:,} rows are copies of others, and stay")
        if progress is not None:
            progress(len(cells), len(cells))
        content = hashlib.blake2b(b"rows-1", digest_size=16)
        for path, row in zip(chosen.paths, raw, strict=True):
            line = "\0".join("" if cell is None else cell for cell in row)
            content.update(f"{path}\0{line}\n".encode("utf-8", "surrogatepass"))
        return Corpus(chosen, raw, np.zeros(len(raw)), content.hexdigest())

    def inputs(self, corpus: Corpus, pool: np.ndarray, folder: Path) -> Inputs:
        """Learn from the pool what each column holds, and write all rows as numbers."""
        from unfused.data.columns import describe_columns
        from unfused.nn.table_model import read_cells

        names = [self.records.columns[index] for index in self.columns]
        inside = np.flatnonzero(pool).tolist()

        def cells_of(at: int) -> list[str | None]:
            return [corpus.raw[row][at] for row in inside]

        columns = ((name, partial(cells_of, at)) for at, name in enumerate(names))
        described, notes = describe_columns(columns, len(names))
        if not described:
            raise ValueError(
                f"no column tells the rows apart: {'; '.join(notes) or 'there is none beside the labels'}"
            )
        place = {name: at for at, name in enumerate(names)}
        values = _new_array(folder / "inputs.npy", (len(corpus), len(described)))
        for start in range(0, len(described), 256):
            part = described[start : start + 256]
            cells = [[row[place[column["name"]]] for row in corpus.raw] for column in part]
            values[:, start : start + len(part)] = read_cells(part, cells)
        values.flush()  # type: ignore[attr-defined]
        write_json(folder / "columns.json", {"columns": described, "notes": notes})
        return Inputs(values, np.arange(len(corpus)), {"columns": len(described)})

    def attach(self, folder: Path, pool: np.ndarray) -> None:
        found = read_json(folder / "columns.json")
        self.described, self.notes = found["columns"], found["notes"]
        self.values = np.load(folder / "inputs.npy", mmap_mode="r")

    def encoder(self) -> Any:
        from unfused.nn.table_model import TableEncoder

        return TableEncoder(self.described, 8 * self.width)

    def augment(self, normaliser: dict[str, Any]) -> Any:
        from unfused.nn.augment_cells import CellCorruption

        return CellCorruption(CORRUPTION)

    def classic_input(self, corpus: Corpus) -> np.ndarray:
        assert self.values is not None
        return np.array(self.values)

    def classic_features(self, corpus: Corpus) -> np.ndarray:
        """The standardised and one-hot columns."""
        import torch

        from unfused.nn.table_model import ColumnVector

        assert self.values is not None
        vector, rows = ColumnVector(self.described), range(0, len(self.values), 4096)
        blocks = [vector(torch.from_numpy(np.array(self.values[row : row + 4096]))).numpy() for row in rows]
        return np.concatenate(blocks)

    def classic(self, seed: int) -> Any:
        from unfused.finetune.classic import ClassicTable

        names = [index for index, column in enumerate(self.described) if column["kind"] == "name"]
        return ClassicTable(names, seed=seed)

    def classifier(self, encoder: Any, head: Any, classes: list[str]) -> Any:
        from unfused.nn.table_model import UnfusedTableConfig, UnfusedTableForClassification

        config = UnfusedTableConfig(
            columns=self.described,
            width=8 * self.width,
            id2label=dict(enumerate(classes)),
            label2id={name: index for index, name in enumerate(classes)},
        )
        model = UnfusedTableForClassification(config)
        model.encoder = encoder
        model.classifier.load_state_dict(head.state_dict())
        return model.eval()

    def processor(self, normaliser: dict[str, Any]) -> Any:
        """None: the columns are described in the model's config."""
        return None

    def preview(self, path: Path) -> str | None:
        return None

    def shown(self, corpus: Corpus, row: int) -> dict[str, str]:
        cells = [
            (self.records.columns[i], cell) for i, cell in zip(self.columns, corpus.raw[row], strict=True)
        ]
        return {name: cell or "" for name, cell in cells[:SHOWN]}
