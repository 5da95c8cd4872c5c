from __future__ import annotations

import codecs
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.data.tables import Finder, label_of, read_table


def table_of(tmp_path: Path, content: str | bytes, name: str = "t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_spreadsheets_write(tmp_path: Path, delimiter: str, encoding: str, end: str) -> None:
    rows = [["File ", "CLASS", "x"], ["größe, 1;2.wav", "dög", "1|2"], ["b.wav", "", ""]]
    text = end.join(delimiter.join(f'"{cell}"' for cell in row) for row in rows) + end + end
    table = table_of(tmp_path, text.encode(encoding))
    assert table.column("path", "file") == ["größe, 1;2.wav", "b.wav"]
    assert [label_of(cell) for cell in table.column("label", "class")] == ["dög", None]


def test_a_header_without_known_names_still_finds_the_delimiter(tmp_path: Path) -> None:
    assert table_of(tmp_path, "Aufnahme;Art, genau\na.wav;dog\n").columns == ["Aufnahme", "Art, genau"]


def test_undecodable_bytes_survive(tmp_path: Path) -> None:
    assert table_of(tmp_path, b"path\ncaf\xe9.wav\n").rows == [["caf\udce9.wav"]]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.ndjson"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    records = [
        {"audio": {"path": "a.wav", "bytes": None}, "label": 3},
        {"audio": "b.wav", "label": None, "who": "caf\udce9"},
        {"audio": "c.wav", "label": True, "score": float("nan")},
    ]
    for text in ("\n\n".join(map(json.dumps, records)), json.dumps(records)):
        table = table_of(tmp_path, text, name)
        assert table.columns == ["audio", "label", "who", "score"]
        assert table.rows == [
            ["a.wav", "3", None, None],
            ["b.wav", None, "caf\udce9", None],
            ["c.wav", "true", None, None],
        ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", codecs.BOM_UTF8 + b"\n\n", "is empty"),
        ("t.csv", "path,label\nx, y.wav,dog\n", "line 2: 3 cells, but the header has 2; put quotes"),
        ("t.csv", 'path,label\n"' + "x" * 200_000, "field larger than field limit"),
        ("t.jsonl", '{"path": "a"}\n{"path": ', "line 2: Expecting value"),
        ("t.jsonl", '{"path": "a"}\n["b"]', "line 2: not an object"),
        ("t.jsonl", '{"path": "\\ud800"}', "line 1: .*surrogates not allowed"),
        ("t.json", "[1]", "not an object"),
    ],
)
def test_malformed(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(tmp_path, content, name)


def test_missing_table_and_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels\.csv' cannot be read: No such file"):
        read_table(tmp_path / "labels.csv")
    with pytest.raises(
        ValueError, match=r"t\.csv' has no column 'label' \(or class\); its columns are 'path', 'sound'"
    ):
        table_of(tmp_path, "path,sound\na,b\n").column("label", "class")


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_a_table_or_a_value_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("t.csv", "t.jsonl"):
        (folder / name).write_bytes(content)
        try:
            table = read_table(folder / name)
        except ValueError:
            continue
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_finder(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    decomposed = unicodedata.normalize("NFD", "sub/größe.wav")
    paths = ["a.wav", "sub/a.wav", "sub/b.wav", "sub/ c.wav", decomposed]
    finder = Finder(root, paths, base=tmp_path)
    for name, row in {
        "a.wav": 0,
        "./sub//a.wav": 1,
        "sub\\a.wav": 1,
        " sub/a.wav ": 1,
        "b.wav": 2,
        str(root / "sub/b.wav"): 2,
        "corpus/sub/b.wav": 2,
        str(tmp_path / "link/sub/b.wav"): 2,
        "sub/ c.wav": 3,
        " c.wav": 3,
        "sub/größe.wav": 4,
        "größe.wav": 4,
        decomposed: 4,
        "other/b.wav": None,
        "c.wav": None,
        "nul\0.wav": None,
    }.items():
        assert finder.find(name) == row, name
    with pytest.raises(ValueError, match=r"2 files are called 'd\.wav': write the path relative to"):
        Finder(root, ["x/d.wav", "y/d.wav"], root).find("d.wav")
    with pytest.raises(ValueError, match=r"6 of its 7 rows name no file that is among the 5 of .*, \.\.\.$"):
        finder.rows(["a.wav", *(f"{k}.wav" for k in range(6))], "labels.csv")
