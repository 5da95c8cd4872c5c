"""Columns of a table: numbers, dates, names, and what is left out with a remark."""

from __future__ import annotations

import numpy as np
import pytest

from unfused.data.columns import MOST_VALUES, describe_columns
from unfused.nn.table_model import FIRST, MISSING, OTHER, read_cells


def describe(**table):
    described, notes = describe_columns(((name, lambda c=c: c) for name, c in table.items()), len(table))
    return {column["name"]: column for column in described}, notes


def test_kinds():
    rows = 20
    found, notes = describe(
        number=[f"{k}.5" for k in range(rows)],
        comma=[f"{k},5" for k in range(rows)],
        date=[f"2024-01-{k + 1:02d}" for k in range(rows)],
        name=["red", "green"] * (rows // 2),
        yes=["True", "False"] * (rows // 2),
    )
    assert {name: column["kind"] for name, column in found.items()} == {
        "number": "number",
        "comma": "number",
        "date": "date",
        "name": "name",
        "yes": "name",
    }
    assert found["comma"]["decimal"] == "," and found["comma"]["mean"] == pytest.approx(10.0)
    assert found["name"]["values"] == ["green", "red"] and not notes


def test_missing_values():
    found, _ = describe(x=["1", "", "3", "NA", None, "5"], pet=["cat", None, "dog", "?", "cat", "dog"])
    assert found["x"]["missing"] and found["x"]["median"] == 3.0
    cells = read_cells([found["x"], found["pet"]], [["3", "n/a"], ["NaN", "cat"]])
    assert np.isnan(cells[1, 0]) and cells[:, 1].tolist() == [MISSING, FIRST]


def test_mixed_types():
    """A few words among numbers are missing numbers, said so; half of them make names of it."""
    found, notes = describe(age=[str(k) for k in range(38)] + ["unknown", "inf"], half=["1", "two"] * 20)
    assert found["age"]["kind"] == "number" and found["age"]["missing"] and found["half"]["kind"] == "name"
    assert notes == ["cells that are no number are taken as missing in: 'age'"]


def test_what_is_left_out():
    rows = 40
    found, notes = describe(
        same=["kg"] * rows,
        one=["1.0"] * rows,
        nothing=[""] * rows,
        code=[f"A{k:03d}" for k in range(rows)],
        story=[f"this is what happened to number {k}" for k in range(rows)],
        x=[str(k) for k in range(rows)],
    )
    assert list(found) == ["x"]
    assert notes == [
        "columns left out, the same in every row: 'same', 'one'",
        "columns left out, without any value: 'nothing'",
        "columns left out, different in nearly every row: 'code'",
        "columns of texts, not looked at here (text_column takes one of them): 'story'",
    ]


def test_constant_with_gaps_says_where_it_is_missing():
    found, notes = describe(x=["1"] * 10 + [""] * 10, pet=["cat"] * 10 + [""] * 10)
    assert set(found) == {"x", "pet"} and not notes
    assert found["x"]["std"] == 1.0


def test_many_values():
    cells = [f"v{k % 100}" for k in range(200)] + ["often"] * 50 + ["once"]
    found, _ = describe(x=cells)
    assert len(found["x"]["values"]) == MOST_VALUES and found["x"]["values"][0] == "often"
    assert read_cells([found["x"]], [["often", "once", "never seen"]])[:, 0].tolist() == [FIRST, OTHER, OTHER]


def test_wild_numbers_are_cut_and_huge_ones_keep_their_differences():
    found, _ = describe(x=[str(1e12 + k) for k in range(100)])
    values = read_cells([found["x"]], [[str(1e12), str(1e12 + 99), "1e300"]])[:, 0]
    assert values[1] - values[0] == pytest.approx(99 / np.arange(100).std(), rel=1e-4)
    assert values[2] == 10.0


def test_invariance_under_the_order_of_rows():
    rng = np.random.default_rng(0)
    cells = [str(v) for v in rng.normal(size=50)]
    names = [f"n{v}" for v in rng.integers(0, 5, 50)]
    order = rng.permutation(50)
    first, _ = describe(x=cells, n=names)
    second, _ = describe(x=[cells[k] for k in order], n=[names[k] for k in order])
    assert first["n"] == second["n"]
    assert first["x"]["mean"] == pytest.approx(second["x"]["mean"], abs=1e-12)
