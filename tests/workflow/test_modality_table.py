"""`adapt` on rows of a table: sources, columns, products, kill and resume, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import corpora
import numpy as np
import pandas as pd
import pytest

from unfused.data.files import Quarantine
from unfused.data.records import read_records
from unfused.workflow.modality_table import Rows


@pytest.fixture
def source(tmp_path) -> Path:
    corpora.write_rows(tmp_path / "flowers.csv")
    return tmp_path / "flowers.csv"


# --- from a source to a model ----------------------------------------------------------------------------


def test_target_in_a_column(source, adapt_tiny, tmp_path):
    options = dict(target="species", group="site", method="unfused,linear-probe,classic")
    run = adapt_tiny(source, **options)
    data = run.metrics["data"]
    assert (data["modality"], data["usable"], data["labelled"], data["groups"]) == ("table", 30, 30, 3)
    assert data["classes"] == ["setosa", "versicolor", "virginica"]
    assert data["notes"] == ["columns left out, the same in every row: 'unit'"]
    assert run.metrics["methods"]["classic"]["accuracy"]["mean"] >= 0.9
    config = json.loads((run.path / "model" / "config.json").read_text())
    assert {c["name"]: c["kind"] for c in config["columns"]} == {
        "length": "number",
        "width": "number",
        "colour": "name",
        "found": "date",
    }
    rows = corpora.read_rows(run.path / "pseudo_labels.csv")
    assert [row["path"] for row in rows] == [f"row {k}" for k in range(1, 31)]
    frame = pd.read_csv(source)
    by_file = run.model.predict_proba(source)
    np.testing.assert_allclose(by_file.max(1), [float(row["confidence"]) for row in rows], atol=2e-4)
    np.testing.assert_allclose(run.model.predict_proba(frame), by_file, atol=1e-5)
    np.testing.assert_allclose(run.model.predict_proba(frame.to_dict("records")), by_file, atol=1e-5)
    assert adapt_tiny(source, **options).metrics == run.metrics
    page = (run.path / "report.html").read_text()
    payload = json.loads(page.split('id="payload">')[1].split("</script>")[0])
    assert "width " in payload["points"]["text"][0] and " · " in payload["points"]["text"][0]
    card = (run.path / "model" / "README.md").read_text()
    assert "tabular-classification" in card and "30 rows" in card
    with pytest.raises(ValueError, match="lacks the columns 'length', 'found'"):
        run.model.predict(corpora.write_labels(tmp_path / "new.csv", [("1", "red")], ("width", "colour")))


def test_no_labels_then_answers_follow_their_row(tmp_path, adapt_tiny):
    source = tmp_path / "flowers.csv"
    truth = {row["width"]: row["species"] for row in corpora.write_rows(source)}
    corpora.write_rows(source, label=None)
    run = adapt_tiny(source, queue=6)
    queue = corpora.read_rows(run.path / "to_label.csv")
    assert list(queue[0])[:4] == ["path", "label", "length", "width"] and list(queue[0])[-2:] == [
        "cluster",
        "reason",
    ]
    answers = {row["path"]: truth[row["width"]] for row in queue}
    corpora.fill_in(run.path / "to_label.csv", answers)
    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[0], "9,9,red,2024-01-01,cm,s1", *lines[1:]]) + "\n")
    second = adapt_tiny(source, queue=6)
    kept = {row["path"]: row["label"] for row in corpora.read_rows(run.path / "labels.csv")}
    assert kept == {f"row {int(path.split()[1]) + 1}": label for path, label in answers.items()}
    assert second.metrics["data"]["labels_used"] == 6


def test_blank_target_means_unlabelled(tmp_path, adapt_tiny):
    rows = corpora.write_rows(tmp_path / "t.csv")
    for k, row in enumerate(rows):
        row["species"] = row["species"] if k < 9 else ""
    corpora.write_labels(tmp_path / "t.csv", [list(row.values()) for row in rows], list(rows[0]))
    run = adapt_tiny(tmp_path / "t.csv", target="species", method="unfused-literal,scratch")
    assert run.metrics["data"]["labelled"] == 9
    assert len(run.to_label) == 21


@pytest.mark.parametrize("form", ["parquet", "jsonl", "class column", "ids"])
def test_every_form_of_source(tmp_path, adapt_tiny, form):
    rows = corpora.write_rows(tmp_path / "t.csv")
    source, options = tmp_path / "t.csv", dict(target="species")
    if form == "parquet":
        frame = pd.read_csv(source, parse_dates=["found"])
        source = tmp_path / "t.parquet"
        frame.to_parquet(source)
    elif form == "jsonl":
        source = tmp_path / "t.jsonl"
        source.write_text("".join(json.dumps(row | {"width": float(row["width"])}) + "\n" for row in rows))
    elif form == "class column":
        corpora.write_labels(source, [list(row.values()) for row in rows], [*list(rows[0])[:-1], "Class"])
        options = {}
    elif form == "ids":
        corpora.write_labels(
            source, [[f"f{k}", *row.values()] for k, row in enumerate(rows)], ["id", *rows[0]]
        )
    run = adapt_tiny(source, **options, method="classic", teacher="random")
    data = run.metrics["data"]
    assert (data["modality"], data["usable"], len(data["classes"])) == ("table", 30, 3)
    assert run.metrics["methods"]["classic"]["accuracy"]["mean"] >= 0.8
    first = corpora.read_rows(run.path / "pseudo_labels.csv")[0]["path"]
    assert first == ("f0" if form == "ids" else "row 1")
    columns = json.loads((run.path / "stages" / "windows" / "columns.json").read_text())["columns"]
    assert [c["name"] for c in columns] == ["length", "width", "colour", "found", "site"]


def test_pool_alone_decides_what_columns_hold(tmp_path):
    corpora.write_labels(
        tmp_path / "t.csv", [(k, "ab"[k % 2]) for k in range(9)] + [(1000, "c")], ("x", "kind")
    )
    records = read_records(tmp_path / "t.csv", Quarantine())
    modality = Rows(records, [0, 1], 4)
    corpus = modality.read(records.manifest()[0], tmp_path, Quarantine())
    pool = np.arange(10) < 9
    inputs = modality.inputs(corpus, pool, tmp_path)
    modality.attach(tmp_path, pool)
    assert modality.described[0]["mean"] == 4.0 and modality.described[1]["values"] == ["a", "b"]
    assert inputs.values[-1].tolist() == [10.0, 1.0]  # cut, and `other`
    assert modality.classic_features(corpus).shape == (10, 5)


# --- what is set aside, and what is refused --------------------------------------------------------------


def test_spoilt_rows(tmp_path, adapt_tiny):
    """Empty rows, rows of too many cells and bytes that are no text are set aside; copies stay; odd cells are missing."""
    rows = [list(row.values()) for row in corpora.write_rows(tmp_path / "t.csv")]
    columns = list(corpora.write_rows(tmp_path / "t.csv")[0])
    rows[3][1], rows[4][0], rows[5][1] = "wide", "inf", "<script>alert(1)</script>"
    gap = ["", "", "", "", "", "", "setosa"]
    corpora.write_labels(tmp_path / "t.csv", [*rows, gap, rows[0], [*rows[0], "more"]], columns)
    with open(tmp_path / "t.csv", "ab") as file:
        file.write("1,2,größe,2024-01-01,cm,s1,setosa\n".encode() + b"1,2,\xff,2024-01-01,cm,s1,setosa\n")
    run = adapt_tiny(tmp_path / "t.csv", target="species")
    aside = {row["path"]: row["reason"] for row in corpora.read_rows(run.path / "quarantine.csv")}
    assert {path: reason.split(":")[0] for path, reason in aside.items()} == {
        "row 31": "no value in any column",
        "row 33": "8 cells, but the header has 7",
        "row 35": "bytes that are not UTF-8 in column 'colour'",
    }
    notes = run.metrics["data"]["notes"]
    assert "1 rows are copies of others, and stay" in notes
    assert "cells that are no number are taken as missing in: 'length', 'width'" in notes
    assert "<script>alert" not in (run.path / "report.html").read_text()


def test_ten_thousand_columns(tmp_path, adapt_tiny):
    rng = np.random.default_rng(0)
    width, count = 10_000, 24
    values = rng.normal(size=(count, width)).round(3)
    values[:, :50] += 3 * (np.arange(count) % 2)[:, None]
    lines = [",".join([f"g{k}" for k in range(width)] + ["kind"])]
    lines += [",".join([*map(str, row), "ab"[k % 2]]) for k, row in enumerate(values.tolist())]
    (tmp_path / "genes.csv").write_text("\n".join(lines))
    run = adapt_tiny(tmp_path / "genes.csv", target="kind", method="unfused,classic")
    assert run.metrics["data"]["usable"] == count
    assert len(run.model.config.columns) == width
    assert run.model.predict(tmp_path / "genes.csv")[0] in ("a", "b")
    assert (run.path / "report.html").stat().st_size < 3_000_000
    with pytest.raises(ValueError, match="has no column 'species'") as error:
        adapt_tiny(tmp_path / "genes.csv", target="species")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "content, options, message",
    [
        (None, dict(target="specie"), "has no column 'specie'; its columns are 'length', 'width'"),
        (None, dict(target="species", labels="species"), "both say where the labels are"),
        (None, dict(target="species", teacher="bert"), "teacher='bert': no pretrained encoder knows"),
        (None, dict(target="length"), "'length' holds 2. different numbers: classes are told apart here"),
        (
            "x,y\n1,a\n1,a\n1,a\n1,a\n1,b\n",
            dict(target="y"),
            "no column tells the rows apart: columns left out, the same",
        ),
        ("y\na\nb\na\nb\n", dict(target="y"), "has no column beside ids, labels"),
        ("x,y\n1,a\n2,a\n3,a\n4,a\n", dict(target="y"), "all 4 labels are 'a'"),
        ("x,y\n1,a\n2,\n3,\n4,\n", dict(target="y"), "there is a single label, 'a'"),
        ("x,y\n1,a\n2,b\n", dict(target="y"), "has 2 usable rows: at least 4 are needed"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, adapt_tiny, content, options, message):
    source = tmp_path / "t.csv"
    if content is None:
        corpora.write_rows(source)
    else:
        source.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        adapt_tiny(source, **options)
    assert "\n" not in str(error.value)


def test_what_is_no_table(tmp_path, adapt_tiny):
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is a spreadsheet: save it as CSV or Parquet"):
        adapt_tiny(tmp_path / "t.xlsx", target="y")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"modality='table': .* is no table"):
        adapt_tiny(tmp_path / "folder", modality="table")
    with pytest.raises(ValueError, match=r"target='y': .* has no columns"):
        adapt_tiny(tmp_path / "folder", target="y")


def test_a_table_of_pictures_stays_one(tmp_path, adapt_tiny):
    rows = corpora.write_pictures(tmp_path / "pictures", 8)
    corpora.write_labels(
        tmp_path / "list.csv",
        [(f"pictures/{path}", label, k) for k, (path, label) in enumerate(rows)],
        ("file", "hue", "n"),
    )
    run = adapt_tiny(tmp_path / "list.csv", target="hue", method="classic", teacher="random")
    assert run.metrics["data"]["modality"] == "image" and run.metrics["data"]["classes"] == ["blue", "red"]


@pytest.mark.parametrize("teacher", ["decar", "delores-s", "delores-m", "slicer"])
def test_every_objective(source, adapt_tiny, teacher):
    run = adapt_tiny(source, target="species", teacher=teacher, method="fine-tune", clusters="auto")
    assert run.metrics["methods"]["fine-tune"]["accuracy"]["mean"] is not None


# --- kill and resume -------------------------------------------------------------------------------------


def test_killed_and_resumed(source, tmp_path):
    corpora.assert_resumes(source, tmp_path, dict(target="species", method="unfused"))
