"""The base of all diagnoses: tables, JSON, the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

import unfused.diagnose._report as report_module
from unfused.diagnose._report import Report, axes, commands, picture, plain, render_html, save_html, shown


@dataclasses.dataclass(frozen=True, eq=False)
class Found(Report):
    names: tuple[str, ...]
    values: torch.Tensor
    hidden: torch.Tensor = dataclasses.field(metadata={"json": False})

    def rows(self):
        return [
            {"name": n, "value": float(v), "why": None}
            for n, v in zip(self.names, self.values.tolist(), strict=True)
        ]

    def headline(self):
        return f"{len(self.names)} <things> & more"

    def notes(self):
        return ["A <note>."]

    def plot(self, ax=None):
        ax = axes(ax)
        ax.plot(self.values.numpy())
        return ax


@pytest.fixture
def found():
    return Found(("a", "<b>", "c"), torch.tensor([1.0, math.nan, 12345.678]), torch.ones(9))


def test_tables(found):
    table = found.table()
    assert list(table.columns) == ["name", "value", "why"] and len(table) == 3
    rich = found.table(rich=True)
    assert rich.row_count == 3 and [str(c.header) for c in rich.columns] == ["name", "value", "why"]
    assert [str(cell) for cell in rich.columns[1].cells] == ["1", "-", "1.235e+04"]


def test_json_has_no_nan_and_no_hidden_field(found, tmp_path):
    value = json.loads(dataclasses.replace(found, names=("a", "b", "c")).to_json(tmp_path / "x.json"))
    assert value == json.loads((tmp_path / "x.json").read_text())
    assert value["values"][1] is None and "hidden" not in value and value["kind"] == "Found"


def test_page_is_escaped_and_self_contained(found, tmp_path):
    save_html(tmp_path / "p.html", [found, found], "a <title>")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and "&lt;b&gt;" in page and "a &lt;title&gt;" in page
    assert not re.search(r"<b>|<things>|<note>|<title>.*<title>|<script|src=\"http", page)
    odd = dataclasses.replace(found, names=("a", "b", "c\udce9"))  # of a file name that is no UTF-8
    assert ">c?<" in odd.to_html()
    assert found.to_html("x").startswith("<!doctype html>")
    assert render_html([]).startswith("<!doctype html>")


def test_long_tables_are_cut_on_the_page(found, monkeypatch):
    monkeypatch.setattr(report_module, "PAGE_ROWS", 2)
    assert "and 1 more rows" in found.to_html()


def test_plain_and_shown():
    assert plain({"a": np.float32(1.5), 2: (np.arange(2), torch.tensor(True))}) == {
        "a": 1.5,
        "2": [[0, 1], True],
    }
    assert [shown(v) for v in (True, None, np.float64(0.25), [1, 2.0], "x")] == [
        "yes",
        "-",
        "0.25",
        "1, 2",
        "x",
    ]


def test_pictures_leave_pyplot_alone(found):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    assert picture(found.plot).startswith("data:image/png;base64,")
    assert plt.get_fignums() == before


def test_commands_are_read_without_importing(tmp_path, monkeypatch):
    (tmp_path / "_report.py").write_text("")
    text = '"""Some: does it."""\nCOMMAND = {"function": "f", "arguments": {"k": {"type": "int"}}}\nraise RuntimeError\n'
    (tmp_path / "some_thing.py").write_text(text)
    monkeypatch.setattr(report_module, "__file__", str(tmp_path / "_report.py"))
    assert commands()["some-thing"]["summary"] == "does it."
    (tmp_path / "some_thing.py").write_text(text.replace('"int"', '"tensor"'))
    with pytest.raises(ValueError, match=r"some_thing\.py: type of 'k'"):
        commands()
