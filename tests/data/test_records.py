"""Tables whose rows are the items: every form they come in, what is set aside, what they are called."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from unfused.data.files import Quarantine
from unfused.data.records import Records, is_text, read_records
from unfused.data.splits import hold_out


def read(folder: Path, name: str, content: str | bytes) -> tuple[Records, dict[str, str]]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    quarantine = Quarantine()
    return read_records(path, quarantine), dict(quarantine.rows)


# --- forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.csv", 'text,label\nHello,x\n\n"a, b",\n'),
        ("t.csv", 'text;label\nHello;x\n"a, b";\n'),
        ("t.tsv", "text\tlabel\nHello\tx\na, b\t\n"),
        ("t.csv", "\ufefftext|label\r\nHello|x\r\na, b|\r\n"),
        ("t.csv", 'text,label\nHello,x\n"a, b"\n'.encode("utf-16")),
        ("t.jsonl", '{"text": "Hello", "label": "x"}\n\n{"text": "a, b"}\n'),
        ("t.json", '[{"text": "Hello", "label": "x"}, {"text": "a, b", "label": null}]'),
    ],
)
def test_every_form_is_read_alike(tmp_path, name, content):
    records, aside = read(tmp_path, name, content)
    assert records.columns == ["text", "label"] and not aside
    assert [row[0] for row in records.rows] == ["Hello", "a, b"]
    assert records.manifest()[0].labels == ["x", None]
    assert records.ids == ["row 1", "row 2"]


def test_parquet(tmp_path):
    frame = pd.DataFrame(
        {
            "n": [1.0, None, 3.0],
            "x": pd.array([0.1, 2.5, None], dtype="Float32"),
            "when": pd.to_datetime(["2024-01-02", "2024-01-03 12:00", None], format="ISO8601"),
            "kind": pd.Categorical(["a", None, "b"]),
            "yes": [True, False, True],
            "list": [[1], [2], [3]],
            "raw": [b"x", b"y", b"z"],
        },
        index=["r", "s", "t"],
    )
    frame.to_parquet(tmp_path / "t.parquet")
    records = read_records(tmp_path / "t.parquet", Quarantine())
    assert records.columns == ["n", "x", "when", "kind", "yes", "__index_level_0__"]
    assert records.ids == ["r", "s", "t"]
    assert [row[:5] for row in records.rows] == [
        ["1", "0.1", "2024-01-02 00:00:00", "a", "True"],
        [None, "2.5", "2024-01-03 12:00:00", None, "False"],
        ["3", None, None, "b", "True"],
    ]
    assert records.notes == ["left out: 'list', 'raw', which hold lists, records or bytes"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no readable Parquet file"):
        read_records(tmp_path / "t.parquet", Quarantine())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'unfused\[parquet\]'"):
        read_records(tmp_path / "t.parquet", Quarantine())


def test_one_column_needs_no_quotes(tmp_path):
    records, aside = read(tmp_path, "t.csv", 'text\nHello, world; yes\tno|"maybe"\n""\nbye\n')
    assert [row[0] for row in records.rows] == ['Hello, world; yes\tno|"maybe"', "bye"]
    assert aside == {"row 2": "an empty row"} and records.ids == ["row 1", "row 3"]


def test_a_cell_of_a_megabyte(tmp_path):
    before = csv.field_size_limit()
    records, _ = read(tmp_path, "t.csv", f"id,text\n1,{'word ' * 200_000}\n2,b\n")
    assert len(records.rows[0][1]) == 1_000_000 and csv.field_size_limit() == before


# --- what is set aside -----------------------------------------------------------------------------------


def test_bad_rows_are_named_and_the_others_keep_their_numbers(tmp_path):
    records, aside = read(tmp_path, "t.csv", "text,label\na,x\nb,c,d\n,\ne,y\n")
    assert records.ids == ["row 1", "row 4"]
    assert aside == {
        "row 2": "3 cells, but the header has 2: put quotes around what contains the separator",
        "row 3": "an empty row",
    }
    records, aside = read(
        tmp_path, "t.jsonl", '{"text": "a"}\n{"text": \n[1]\n{"text": "\\ud800"}\n{"text": "b"}'
    )
    assert records.ids == ["row 1", "row 5"]
    assert [reason.split(":")[0] for reason in aside.values()] == [
        "broken JSON",
        'not an object like {"text"',
        "characters that cannot be written",
    ]


def test_bytes_that_are_not_utf8(tmp_path):
    """One row damaged in UTF-8 is set aside; a file that is no UTF-8 at all is an old Windows file."""
    records, aside = read(tmp_path, "t.csv", "text,label\nCafé,x\n".encode() + b"bad \xff,y\nc,z\n")
    assert records.ids == ["row 1", "row 3"]
    assert aside == {"row 2": "bytes that are not UTF-8 in column 'text'"}
    records, aside = read(tmp_path, "t.csv", "text,label\nCafé “now”,x\nc,z\n".encode("cp1252"))
    assert records.rows[0] == ["Café “now”", "x"] and not aside
    assert records.notes == ["not UTF-8: read as Windows-1252 (Western European)"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b" \n ", "is empty"),
        ("t.csv", b"PK\x03\x04rest", "is a ZIP archive, not a table"),
        ("t.jsonl", b"[1, 2", "is no list in JSON"),
        ("t.jsonl", b"1\n2\n", "holds no JSON object"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path / "gone.csv", Quarantine())


# --- names -----------------------------------------------------------------------------------------------


def test_ids(tmp_path):
    for header, first in (("id,x", "7"), ("UUID,x", "7"), (",x", "7"), ("path,x", "7")):
        records, _ = read(tmp_path, "t.csv", f"{header}\n{first},a\n8,b\n")
        assert records.ids == ["7", "8"] and records.id_column == 0
    records, _ = read(tmp_path, "t.csv", "id,x\n7,a\n7,b\n")
    assert records.ids == ["row 1", "row 2"] and records.id_column is None
    assert records.notes == ["column 'id' does not name each row: rows are called by their number"]
    records, _ = read(tmp_path, "t.csv", "index,x\n7.5,a\n8.25,b\n")  # a measurement
    assert records.ids == ["row 1", "row 2"] and not records.notes


def test_repeated_and_missing_column_names(tmp_path):
    records, _ = read(tmp_path, "t.csv", "x,x,,x\n1,2,3,4\n2,2,3,4\n")
    assert records.columns == ["x", "x (2)", "column 3", "x (3)"]


# --- as a manifest ---------------------------------------------------------------------------------------

TABLE = "id,body,topic,who,split\n1,a,x,ann,train\n2,b,,bob,train\n3,c,y,ann,test\n"


def test_manifest_of_columns(tmp_path):
    records, _ = read(tmp_path, "t.csv", TABLE)
    manifest, special = records.manifest(target="topic", group="who")
    assert (manifest.paths, manifest.labels) == (["1", "2", "3"], ["x", None, "y"])
    assert (manifest.groups, manifest.split) == (["ann", "bob", "ann"], ["train", "train", "test"])
    assert {records.columns[index] for index in special} == {"id", "topic", "who", "split"}
    assert records.manifest(labels="topic")[0].labels == manifest.labels
    assert records.manifest(group="^(1|2)")[0].groups == ["1", "2", None]


def test_labels_in_another_file(tmp_path):
    records, _ = read(tmp_path, "t.csv", TABLE)
    (tmp_path / "labels.csv").write_text("id,label\n2,z\n3,w\n")
    assert records.manifest(labels=str(tmp_path / "labels.csv"))[0].labels == [None, "z", "w"]
    numbered, _ = read(tmp_path, "n.csv", "body\na b\nc d\n")
    (tmp_path / "labels.csv").write_text("path,label\nrow 2,z\n")
    assert numbered.manifest(labels=str(tmp_path / "labels.csv"))[0].labels == [None, "z"]


def test_held_out_by_a_list_of_ids(tmp_path):
    records, _ = read(tmp_path, "n.csv", "body,label\na b,x\nc d,y\ne f,x\n")
    (tmp_path / "test.csv").write_text("id\nrow 2\n")
    (tmp_path / "test.txt").write_text("row 1\nrow 3\n")
    manifest, _ = records.manifest()
    assert hold_out(manifest, tmp_path / "test.csv").tolist() == [False, True, False]
    assert hold_out(manifest, tmp_path / "test.txt").tolist() == [True, False, True]


def test_messages_of_labels(tmp_path):
    records, _ = read(tmp_path, "t.csv", TABLE)
    with pytest.raises(ValueError, match="has no column 'species'; its columns are 'id', 'body'"):
        records.manifest(target="species")
    with pytest.raises(
        ValueError, match=r"labels='species' is no column of .* and no file; its columns are 'id'"
    ):
        records.manifest(labels="species")
    with pytest.raises(ValueError, match="both say where the labels are"):
        records.manifest(labels="topic", target="topic")
    prices, _ = read(tmp_path, "p.csv", "x,price\n" + "".join(f"a,{k + 0.5}\n" for k in range(60)))
    with pytest.raises(ValueError, match="'price' holds 60 different numbers: classes are told apart"):
        prices.manifest(target="price")
    names, _ = read(tmp_path, "n.csv", "x,name\n" + "".join(f"a,name {k}\n" for k in range(60)))
    with pytest.raises(ValueError, match="'name' holds 60 different labels in 60 rows"):
        names.manifest(target="name")
    # one label a class of many classes is what few labels mean
    few = "x,name\n" + "".join(f"a,{f'class {k}' if k < 30 else ''}\n" for k in range(60))
    assert len(set(read(tmp_path, "f.csv", few)[0].manifest(target="name")[0].labels)) == 31


def test_what_reads_like_texts():
    assert is_text(["the cat sat on the mat", "a dog", "no one ever said a word about it"])
    assert not is_text(["red", "green", "red"]) and not is_text(["1.5", "2.5"], "text") and not is_text([])
    assert is_text(["two words", "other words"], "Body") and not is_text(["two words", "other words"], "city")
    assert is_text(["我想取消我的订单请帮忙", "你们的营业时间是什么时候"])


def test_wide_records_stay_quick(tmp_path):
    width = 10_000
    content = (
        ",".join(f"x{k}" for k in range(width)) + "\n" + "\n".join(",".join(["1"] * width) for _ in range(3))
    )
    records, _ = read(tmp_path, "t.csv", content)
    with pytest.raises(ValueError) as error:
        records.column("species")
    assert len(str(error.value)) < 1000
    assert records.texts_and_others(set()) == ([], [])


def test_json_cells_of_other_types(tmp_path):
    lines = [{"a": 1, "b": True, "c": [1, 2]}, {"a": 2.5, "b": None, "c": {"d": 1}}]
    records, _ = read(tmp_path, "t.jsonl", "\n".join(map(json.dumps, lines)))
    assert records.rows == [["1", "true", "[1, 2]"], ["2.5", None, '{"d": 1}']]
