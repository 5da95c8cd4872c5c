"""Rows of a table as numbers, the encoder on them, and the saved model that reads raw rows by itself."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from unfused.nn.augment_cells import CellCorruption
from unfused.nn.table_model import (
    ColumnVector,
    TableEncoder,
    UnfusedTableConfig,
    UnfusedTableForClassification,
    as_date,
    as_numbers,
    read_cells,
)

COLUMNS = [
    {"name": "age", "kind": "number", "mean": 40.0, "std": 10.0, "median": 39.0, "missing": True},
    {"name": "pet", "kind": "name", "values": ["cat", "dog"]},
    {"name": "since", "kind": "date", "mean": 0.0, "std": 2.0, "median": 1.0},
]
ROWS = [
    {"age": "50", "pet": "dog", "since": "1970-01-05", "more": 1},
    {"age": None, "pet": "newt", "since": ""},
    {"age": "30", "pet": "", "since": "1970-01-01"},
]


def test_cells():
    np.testing.assert_array_equal(
        as_numbers(["1", 2, " 3 ", "x", None, "-inf"]), [1, 2, 3, np.nan, np.nan, np.nan]
    )
    assert as_numbers(["1,5"], ",").tolist() == [1.5]
    assert as_date("1970-01-02T06:00:00+06:00") == 1.0 and as_date(datetime.date(1970, 1, 3)) == 2.0
    assert all(np.isnan(as_date(cell)) for cell in ("20240101", "12", "soon", "2024-13-01", None, 5))


def test_vector():
    x = torch.from_numpy(read_cells(COLUMNS, [[row.get(c["name"]) for row in ROWS] for c in COLUMNS]))
    vector = ColumnVector(COLUMNS)
    assert vector.size == 7  # two numbers, one indicator, missing, other, cat, dog
    np.testing.assert_allclose(
        vector(x),
        [[1, 2, 0, 0, 0, 0, 1], [-0.1, 0.5, 1, 0, 1, 0, 0], [-1, 0, 0, 1, 0, 0, 0]],
        atol=1e-6,
    )
    assert not list(vector.state_dict())
    with pytest.raises(ValueError, match=r"give \(batch, 3\)"):
        vector(x[:, :2])
    with pytest.raises(ValueError, match="columns is empty"):
        TableEncoder([])


def test_codes_that_no_column_has_are_other():
    vector = ColumnVector(COLUMNS[1:2])
    assert vector(torch.tensor([[99.0], [-3.0], [torch.nan]])).argmax(1).tolist() == [1, 0, 0]


def test_corruption_keeps_columns_apart():
    torch.manual_seed(0)
    x = torch.stack([torch.arange(1000.0), torch.arange(1000.0) + 1e5, torch.full((1000,), torch.nan)], 1)
    y = CellCorruption(0.4)(x)
    changed = (y[:, :2] != x[:, :2]).float().mean(0)
    assert changed.numpy() == pytest.approx([0.4, 0.4], abs=0.06)
    assert (y[:, 0] < 1000).all() and (y[:, 1] >= 1e5).all() and y[:, 2].isnan().all()
    with pytest.raises(ValueError, match="rate=2"):
        CellCorruption(2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    names = {0: "no", 1: "yes"}
    config = UnfusedTableConfig(columns=COLUMNS, width=8, id2label=names, label2id={"no": 0, "yes": 1})
    model = UnfusedTableForClassification(config).eval()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


def test_saved_model_reads_raw_rows(saved):
    from transformers import AutoModel, AutoModelForSequenceClassification

    from unfused.nn.register import register

    register()
    model, folder = saved
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(loaded) is UnfusedTableForClassification
    frame = pd.DataFrame(ROWS)
    with torch.inference_mode():
        expected = model(model.encode(ROWS)).logits
        for rows in (ROWS, frame, frame.to_dict("list")):
            assert loaded(loaded.encode(rows)).logits.equal(expected)
        assert AutoModel.from_pretrained(folder).eval()(loaded.encode(ROWS)).pooler_output.shape == (3, 8)
    with pytest.raises(ValueError, match="rows lack the columns 'pet', 'since'"):
        loaded.encode([{"age": 3}])
    with pytest.raises(ValueError, match="rows lack the columns 'pet'"):
        loaded.encode(frame.drop(columns="pet"))


def test_saved_model_works_without_us(saved, tmp_path):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "model")
    code = """
import sys
class NoUnfused:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "unfused":
            raise ImportError(name)
sys.meta_path.insert(0, NoUnfused())
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True).eval()
with torch.inference_mode():
    print(model(model.encode([{"age": "50", "pet": "dog", "since": "1970-01-05"}])).logits.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.inference_mode():
        expected = model(model.encode(ROWS[:1])).logits
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected)
