"""The encoder of table rows, and the classifier around it in Hugging Face form.

Columns are described in the config, so that a saved model reads raw rows: a number is standardised (missing: the median, and
an indicator where any was missing), a date is a number of days, a name is one of its column's known values, `other` or
missing. The network itself turns these into one vector and learns from that.

This file is copied into every saved model folder, so that `trust_remote_code=True` loads a model where `unfused` is not
installed: it imports nothing else of this package.

Reference: SCARF: Self-Supervised Contrastive Learning using Random Feature Corruption, ICLR 2022, arXiv:2106.15147 (an MLP
on such columns); UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation, 2023, arXiv:2303.05668 (block
features for self-distillation).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

__all__ = [
    "ColumnVector",
    "TableEncoder",
    "UnfusedTableConfig",
    "UnfusedTableForClassification",
    "UnfusedTableModel",
    "as_date",
    "as_numbers",
    "is_missing",
    "read_cells",
]

NO_VALUE = frozenset(("", "na", "n/a", "nan", "null", "?"))  # in lower case
MISSING, OTHER, FIRST = 0, 1, 2  # codes of a column of names; its known values follow from FIRST on
LIMIT = 10.0  # standardised numbers beyond are cut: one wild row must not decide a step


def is_missing(cell: Any) -> bool:
    """Whether a cell holds no value: None, NaN, or one of the words by which tables say so."""
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in NO_VALUE)


def as_numbers(cells: Sequence[Any], decimal: str = ".") -> np.ndarray:
    """Cells as float64, NaN where a cell is no finite number.

    Examples
    --------
    >>> as_numbers(["1.5", "", "two", 3, "inf"])
    array([1.5, nan, nan, 3. , nan])
    """
    try:
        numbers = np.array(cells, np.float64)  # all of them are: a hundred times as fast
    except (ValueError, TypeError):
        numbers = np.array([_number(cell, decimal) for cell in cells])
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def _number(cell: Any, decimal: str) -> float:
    try:
        return float(cell.replace(decimal, ".") if isinstance(cell, str) and decimal != "." else cell)
    except (ValueError, TypeError):
        return math.nan


def as_date(cell: Any) -> float:
    """Days since 1970 of a date or time in ISO 8601, NaN where it is none.

    Examples
    --------
    >>> as_date("1970-01-02 12:00:00"), as_date("2024-02-30")
    (1.5, nan)
    """
    if isinstance(cell, str):
        cell = cell.strip().replace("/", "-")
        if not cell[:4].isdigit() or cell[4:5] != "-":  # a bare number is no date
            return math.nan
        try:
            cell = datetime.datetime.fromisoformat(cell.replace("Z", "+00:00"))
        except ValueError:
            return math.nan
    if not isinstance(cell, datetime.date):
        return math.nan
    if not isinstance(cell, datetime.datetime):
        cell = datetime.datetime(cell.year, cell.month, cell.day)
    if cell.tzinfo is not None:
        cell = cell.astimezone(datetime.timezone.utc).replace(tzinfo=None)
    return (cell - datetime.datetime(1970, 1, 1)) / datetime.timedelta(days=1)


def read_cells(columns: Sequence[Mapping[str, Any]], cells: Sequence[Sequence[Any]]) -> np.ndarray:
    """The network's input of rows given column by column.

    Parameters
    ----------
    columns : sequence of dict
        As in `UnfusedTableConfig.columns`.
    cells : sequence of sequences, one for each of `columns`
        Strings, numbers, dates, None.

    Returns
    -------
    float32 array of shape (rows, columns)
        Standardised numbers, NaN where missing; of names the code: 0 missing, 1 other, 2 ... the known values.

    Examples
    --------
    >>> columns = [{"name": "age", "kind": "number", "mean": 40.0, "std": 10.0},
    ...            {"name": "pet", "kind": "name", "values": ["cat", "dog"]}]
    >>> read_cells(columns, [["50", None, "25"], ["dog", "", "newt"]]).tolist()
    [[1.0, 3.0], [nan, 0.0], [-1.5, 1.0]]
    """
    count = len(cells[0]) if len(cells) else 0
    result = np.empty((count, len(columns)), np.float32)
    for index, (column, own) in enumerate(zip(columns, cells, strict=True)):
        if column["kind"] == "name":
            code = {value: FIRST + place for place, value in enumerate(column["values"])}
            result[:, index] = [MISSING if is_missing(c) else code.get(str(c).strip(), OTHER) for c in own]
            continue
        if column["kind"] == "date":
            numbers = np.array([as_date(cell) for cell in own])
        else:
            numbers = as_numbers(own, column.get("decimal", "."))
        result[:, index] = np.clip((numbers - column["mean"]) / column["std"], -LIMIT, LIMIT)
    return result


class ColumnVector(nn.Module):
    """What `read_cells` gives, as one vector a row: numbers, indicators of missing ones, one-hot names.

    Parameters
    ----------
    columns : sequence of dict
        As in `UnfusedTableConfig.columns`.

    Attributes
    ----------
    size : int
        Numbers, their indicators, and for every column of names its values, `other` and missing.

    Examples
    --------
    >>> columns = [{"name": "age", "kind": "number", "mean": 40.0, "std": 10.0, "median": 39.0, "missing": True},
    ...            {"name": "pet", "kind": "name", "values": ["cat", "dog"]}]
    >>> ColumnVector(columns)(torch.tensor([[1.0, 3.0], [torch.nan, 0.0]]))
    tensor([[ 1.0000,  0.0000,  0.0000,  0.0000,  0.0000,  1.0000],
            [-0.1000,  1.0000,  1.0000,  0.0000,  0.0000,  0.0000]])
    """

    number: torch.Tensor
    name: torch.Tensor
    fill: torch.Tensor
    gappy: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    def __init__(self, columns: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if not columns:
            raise ValueError("columns is empty: a row needs at least one column to look at")
        self.columns = len(columns)
        numbers = [i for i, column in enumerate(columns) if column["kind"] != "name"]
        names = [i for i, column in enumerate(columns) if column["kind"] == "name"]
        sizes = [FIRST + len(columns[i]["values"]) for i in names]
        fill = [(columns[i].get("median", 0.0) - columns[i]["mean"]) / columns[i]["std"] for i in numbers]
        gappy = [place for place, i in enumerate(numbers) if columns[i].get("missing")]
        ends = np.cumsum([0, *sizes])
        for buffer, values, kind in (
            ("number", numbers, torch.long),
            ("name", names, torch.long),
            ("fill", fill, torch.float32),
            ("gappy", gappy, torch.long),
            ("first", ends[:-1].tolist(), torch.long),
            ("last", [size - 1 for size in sizes], torch.long),
        ):
            # Not persistent: the config says it all, and what is loaded cannot disagree with it.
            self.register_buffer(buffer, torch.tensor(values, dtype=kind), persistent=False)
        self.values = int(ends[-1])
        self.size = len(numbers) + len(gappy) + self.values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (batch, columns) to (batch, size)."""
        if x.ndim != 2 or x.shape[1] != self.columns:
            raise ValueError(f"input of shape {tuple(x.shape)}: give (batch, {self.columns})")
        numbers = x[:, self.number]
        missing = numbers.isnan()
        parts = [torch.where(missing, self.fill.to(x.dtype), numbers), missing[:, self.gappy].to(x.dtype)]
        if self.values:
            code = x[:, self.name].nan_to_num(MISSING).long().clamp_min(0)
            code = torch.where(code > self.last, OTHER, code) + self.first
            parts.append(x.new_zeros(len(x), self.values).scatter_(1, code, 1.0))
        return torch.cat(parts, 1)


class TableEncoder(nn.Module):
    """Three layers `Linear - BatchNorm - ReLU - Dropout` on the vector of all columns.

    Parameters
    ----------
    columns : sequence of dict
        As in `UnfusedTableConfig.columns`.
    width : int, default=256
        Of the layers.
    dropout : float, default=0.1

    Attributes
    ----------
    embedding_dim : int
        `width`.
    block_dims : list of int
        Of the first two layers' outputs.

    Examples
    --------
    >>> columns = [{"name": "age", "kind": "number", "mean": 40.0, "std": 10.0},
    ...            {"name": "pet", "kind": "name", "values": ["cat", "dog"]}]
    >>> encoder = TableEncoder(columns, width=8)
    >>> frames, blocks = encoder(torch.tensor([[1.0, 3.0], [torch.nan, 0.0]]))
    >>> frames.shape, [block.shape[1] for block in blocks]
    (torch.Size([2, 1, 8]), [8, 8])
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]], width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.vector = ColumnVector(columns)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(inside, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
            for inside in (self.vector.size, width, width)
        )
        self.block_dims, self.embedding_dim = [width, width], width

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Rows (batch, columns) to (batch, 1, width) and the outputs of the first two layers."""
        x, states = self.vector(x), []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return x[:, None], states[:-1]

    def pool(self, frames: torch.Tensor) -> torch.Tensor:
        return frames[:, 0]

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (batch, columns) to embeddings (batch, embedding_dim)."""
        return self.pool(self(x)[0])


class UnfusedTableConfig(PreTrainedConfig):
    """Configuration of `UnfusedTableModel` and `UnfusedTableForClassification`.

    Attributes
    ----------
    columns : list of dict
        Of each column its `name` and `kind`. "number" and "date": `mean`, `std` and `median` (dates in days since 1970),
        `missing` (whether an indicator says that a value is), `decimal` (where it is a comma). "name": `values`, the known
        ones.
    width, dropout
        As in `TableEncoder`.

    Examples
    --------
    >>> columns = [{"name": "pet", "kind": "name", "values": ["cat", "dog"]}]
    >>> UnfusedTableConfig(columns=columns, width=8, num_labels=3).num_labels
    3
    """

    model_type = "unfused-table"

    columns: list | None = None
    width: int = 256
    dropout: float = 0.1

    def encoder(self) -> TableEncoder:
        """A new encoder with these settings."""
        return TableEncoder(self.columns or [], self.width, self.dropout)


class _UnfusedTablePreTrainedModel(PreTrainedModel):
    config: UnfusedTableConfig
    config_class = UnfusedTableConfig
    base_model_prefix = "unfused_table"
    main_input_name = "input_values"
    _no_split_modules = ["TableEncoder"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation, through the functions that spare weights already loaded."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(
            module, ColumnVector
        ):  # loading starts on no device: what is not in the file is made again
            for name, value in ColumnVector(self.config.columns or []).named_buffers():
                init.copy_(getattr(module, name), value)
        else:
            super()._init_weights(module)

    def encode(self, rows: Any) -> torch.Tensor:
        """Raw rows to the model's input.

        Parameters
        ----------
        rows : DataFrame, sequence of dicts, or dict of columns
            With the config's columns; others are not looked at.

        Returns
        -------
        torch.Tensor of shape (rows, columns)

        Raises
        ------
        ValueError
            If a column is missing.
        """
        described = self.config.columns or []
        if isinstance(rows, Mapping) or hasattr(rows, "columns"):
            there = {str(name): name for name in (rows.columns if hasattr(rows, "columns") else rows)}
            absent = [column["name"] for column in described if column["name"] not in there]
            cells = [] if absent else [list(rows[there[column["name"]]]) for column in described]
        else:
            rows = list(rows)
            known = set().union(*rows) if rows else set()
            absent = [column["name"] for column in described if rows and column["name"] not in known]
            cells = [[row.get(column["name"]) for row in rows] for column in described]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            raise ValueError(f"rows lack the columns {', '.join(map(repr, absent[:5]))}{more}")
        return torch.from_numpy(read_cells(described, cells)).to(self.device)


class UnfusedTableModel(_UnfusedTablePreTrainedModel):
    """The encoder alone, for `AutoModel`.

    Examples
    --------
    >>> columns = [{"name": "age", "kind": "number", "mean": 40.0, "std": 10.0}]
    >>> model = UnfusedTableModel(UnfusedTableConfig(columns=columns, width=8)).eval()
    >>> model(model.encode([{"age": "50"}, {"age": None}])).pooler_output.shape
    torch.Size([2, 8])
    """

    def __init__(self, config: UnfusedTableConfig) -> None:
        super().__init__(config)
        self.encoder = config.encoder()
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """Embeddings of rows.

        Parameters
        ----------
        input_values : torch.Tensor of shape (batch, columns)
            What `encode` gives.
        output_hidden_states : bool, optional
            Also return the outputs of the first two layers.
        """
        frames, blocks = self.encoder(input_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=frames,
            pooler_output=self.encoder.pool(frames),
            hidden_states=tuple(blocks) if output_hidden_states else None,
        )


class UnfusedTableForClassification(_UnfusedTablePreTrainedModel):
    """The encoder with a linear head, for `AutoModelForSequenceClassification`: a row is a sequence of cells.

    Examples
    --------
    >>> columns = [{"name": "pet", "kind": "name", "values": ["cat", "dog"]}]
    >>> model = UnfusedTableForClassification(UnfusedTableConfig(columns=columns, width=8, num_labels=3)).eval()
    >>> model(model.encode({"pet": ["cat", "newt"]}), labels=torch.tensor([0, 2])).logits.shape
    torch.Size([2, 3])
    """

    def __init__(self, config: UnfusedTableConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = config.encoder()
        self.classifier = nn.Linear(self.encoder.embedding_dim, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Class logits, and the cross-entropy when labels are given.

        Parameters
        ----------
        input_values : torch.Tensor of shape (batch, columns)
        labels : torch.Tensor of shape (batch,), int, or (batch, num_labels), class probabilities; optional
        """
        logits = self.classifier(self.encoder.embed(input_values))
        return SequenceClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits
        )


# Set here, so that save_pretrained writes this code into the folder however the class was reached.
UnfusedTableConfig.register_for_auto_class("AutoConfig")
UnfusedTableModel.register_for_auto_class("AutoModel")
UnfusedTableForClassification.register_for_auto_class("AutoModelForSequenceClassification")
