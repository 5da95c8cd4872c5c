from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.data.files import Quarantine
from unfused.data.images import IMAGE_EXTENSIONS
from unfused.data.manifest import Manifest, check_labels, read_labels, read_manifest, scan, write_manifest

WAV = frozenset((".wav",))


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_scan_of_a_bad_corpus(bad_recordings: tuple[Path, dict[str, str | None]]) -> None:
    folder, reasons = bad_recordings
    quarantine = Quarantine()
    assert scan(folder, (".wav", ".mp3", ".ogg", ".flac", ".m4a"), quarantine) == sorted(reasons)
    assert len(quarantine) == 0


def test_ten_thousand_files_in_one_folder(tmp_path: Path) -> None:
    for k in range(10_000):
        os.close(os.open(tmp_path / f"clip {k}.wav", os.O_CREAT))
    start = time.process_time()
    manifest = read_manifest(tmp_path)
    assert len(manifest) == 10_000 and time.process_time() - start < 2


def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path / "corpus", "real/a.wav", "real/deep/b.wav")
    make(tmp_path / "elsewhere", "c.wav")
    (tmp_path / "corpus" / "again").symlink_to("real")  # sorts before "real"
    (tmp_path / "corpus" / "real" / "deep" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "outside").symlink_to(tmp_path / "elsewhere")
    assert scan(tmp_path / "corpus", WAV) == ["outside/c.wav", "real/a.wav", "real/deep/b.wav"]


def test_unlistable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.wav", "secret/b.wav")
    scandir = os.scandir

    def refuse(path: str):
        if "secret" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    quarantine = Quarantine()
    assert scan(tmp_path, WAV, quarantine) == ["a.wav"]
    assert quarantine.rows == [("secret/", "a folder that cannot be listed: Permission denied")]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    make(tmp_path, "b.wav", "a.WAV", ".hidden.wav", "notes.txt", "README")
    manifest = read_manifest(tmp_path)
    assert (manifest.root, manifest.paths) == (tmp_path, ["a.WAV", "b.wav"])
    assert manifest.labels == manifest.groups == manifest.split == [None, None]
    assert manifest.notes == ["left out by their extension: 1 .txt, 1 without one"]


def test_class_folders(tmp_path: Path) -> None:
    make(tmp_path, "dog/1.wav", "dog/far/2.wav", "cat/1.wav")
    manifest = read_manifest(tmp_path)
    assert manifest.labels == ["cat", "dog", "dog"] and "2 folders" in manifest.notes[0]
    assert read_manifest(tmp_path, labels=False).labels == [None] * 3
    make(tmp_path, "top.wav")
    assert read_manifest(tmp_path).labels == [None] * 4


def test_one_folder_each_or_one_in_all_is_no_class(tmp_path: Path) -> None:
    make(tmp_path, "x/a.wav", "x/b.wav")
    assert read_manifest(tmp_path).labels == [None, None]
    make(tmp_path / "each", "1/a.wav", "2/a.wav")
    assert read_manifest(tmp_path / "each").labels == [None, None]


def test_split_folders(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.png", "train/dog/1.png", "Test/dog/2.png")
    manifest = read_manifest(tmp_path, extensions=IMAGE_EXTENSIONS)
    assert manifest.paths == ["Test/dog/2.png", "train/cat/1.png", "train/dog/1.png"]
    assert manifest.labels == ["dog", "cat", "dog"] and manifest.split == ["Test", "train", "train"]


def test_csv_manifest(tmp_path: Path) -> None:
    make(tmp_path, "audio/a.wav", "audio/b c.wav", "outside.wav")
    outside = str(tmp_path / "outside.wav")
    (tmp_path / "audio" / "m.csv").write_text(
        "Speaker;FILENAME;Category;Split\n"
        "ann;a.wav;dog;train\n"
        f"bob;{tmp_path}/audio/b c.wav; cat ;test\n"
        "ann;a.wav;dog;train\n"
        f";{outside};;\n"
        ";../outside.wav;;\n"
        ";.\\missing.wav;;\n"
    )
    manifest = read_manifest(tmp_path / "audio" / "m.csv", group="speaker")
    assert manifest.root == tmp_path / "audio"
    assert manifest.paths == ["a.wav", "b c.wav", outside, "../outside.wav", ".\\missing.wav"]
    assert manifest.labels == ["dog", "cat", None, None, None]
    assert manifest.groups == ["ann", "bob", None, None, None]
    assert manifest.split == ["train", "test", None, None, None]
    assert manifest.notes == ["group: 3 of 5 files have none, and count as one each"]
    assert read_manifest(tmp_path / "audio" / "m.csv", labels="speaker").labels[:2] == ["ann", "bob"]


def test_json_lines_manifest(tmp_path: Path) -> None:
    make(tmp_path, "a.wav", "sub/b.wav")
    records = [{"audio": {"path": "a.wav"}, "label": 1}, {"audio": "sub\\b.wav", "label": 2}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert manifest.paths == ["a.wav", "sub/b.wav"] and manifest.labels == ["1", "2"]


def test_labels_file(tmp_path: Path) -> None:
    make(tmp_path / "corpus", "a.wav", "sub/b.wav", "c.wav", "d.wav")
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label,site\nb.wav,dog,north\ncorpus/a.wav,cat,south\nc.wav,,north\n")
    manifest = read_manifest(tmp_path / "corpus", labels=labels, group="SITE")
    assert manifest.paths == ["a.wav", "c.wav", "d.wav", "sub/b.wav"]
    assert manifest.labels == ["cat", None, None, "dog"]
    assert manifest.groups == ["south", "north", None, "north"]
    assert read_labels(labels, manifest) == manifest.labels


def test_group_patterns(tmp_path: Path) -> None:
    make(tmp_path, "1_ann_0.wav", "2_bob_0.wav", "noise.wav")
    assert read_manifest(tmp_path, group=r"_(\w+?)_").groups == ["ann", "bob", None]
    assert read_manifest(tmp_path, group=r"^\d").groups == ["1", "2", None]
    assert read_manifest(tmp_path, group=r"(noise)|\d_").groups == ["1_", "2_", "noise"]


MESSAGES = [
    # source ("t.csv": the table below), labels, group, content of t.csv, message
    ("corpsu", None, None, "", r"there is no such folder or manifest"),
    ("corpus/a.wav", None, None, "", r"is a single file: give the folder"),
    ("texts", None, None, "", r"no file with extension .*\.wav.*; the extensions found are 2 \.txt, 1 \.md"),
    ("empty", None, None, "", r"it holds no files"),
    (
        "t.csv",
        None,
        None,
        "name,label\na.wav,dog",
        r"has no column 'path' .*; its columns are 'name', 'label'",
    ),
    (
        "t.csv",
        None,
        None,
        "path,label\na.wav,dog\n./a.wav,cat",
        r"twice, with label 'dog' and 'cat': drop one",
    ),
    ("t.csv", None, None, "path\nn.wav\nm.wav", r"none of its 2 files exists, such as 'n\.wav'"),
    ("t.csv", None, None, "path,label\na.wav,x\n,dog", r"row 2 below the header has no path"),
    ("t.csv", None, None, "path,label\n", r"lists no files"),
    (
        "corpus",
        "t.csv",
        None,
        "path,sound\na.wav,dog",
        r"has no column 'label' .*; its columns are 'path', 'sound'",
    ),
    ("corpus", "no.csv", None, "", r"no\.csv' cannot be read"),
    ("corpus", "t.csv", None, "path,label\na.wav,dog\n./a.wav,cat", r"labels 'a\.wav' both 'dog' and 'cat'"),
    (
        "corpus",
        "t.csv",
        None,
        "path,label\na.wav,dog\nz.wav,cat\nq.wav,",
        r"2 of its 3 rows .*: 'z\.wav', 'q\.wav'",
    ),
    ("corpus", "t.csv", None, "path,label\nd.wav,dog", r"2 files are called 'd\.wav'"),
    (
        "corpus",
        "t.csv",
        "who",
        "path,label\na.wav,dog",
        r"group='who' is no column \('path', 'label'\), and as a",
    ),
    (
        "corpus",
        None,
        "who",
        "",
        r"group='who' is no column, and as a regular expression it matches no .* 'a\.wav'",
    ),
    ("corpus", None, "(", "", r"group='\(' is no column and no regular expression"),
]


@pytest.mark.parametrize(("source", "labels", "group", "table", "message"), MESSAGES)
def test_messages(
    tmp_path: Path, source: str, labels: str | None, group: str | None, table: str, message: str
) -> None:
    corpus = make(tmp_path / "corpus", "a.wav", "b.wav", "x/d.wav", "y/d.wav")
    make(tmp_path / "texts", "a.txt", "b.txt", "c.md")
    (tmp_path / "empty").mkdir()
    (corpus / "t.csv").write_text(table)
    path = corpus / source if source == "t.csv" else tmp_path / source
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(path, labels=labels and corpus / labels, group=group)
    assert "\n" not in str(caught.value)


def test_check_labels() -> None:
    def manifest(*labels: str | None) -> Manifest:
        n = len(labels)
        return Manifest(Path("/"), [f"{k}.wav" for k in range(n)], list(labels), [None] * n, [None] * n)

    assert check_labels(manifest(None, None)) == {}
    assert check_labels(manifest("dog", "cat", None, "dog")) == {"cat": 1, "dog": 2}
    with pytest.raises(ValueError, match="there is a single label, 'dog'; label files of two classes"):
        check_labels(manifest("dog", None))
    with pytest.raises(ValueError, match="all 2 labels are 'dog'"):
        check_labels(manifest("dog", "dog", None))


def test_select() -> None:
    manifest = Manifest(Path("/"), ["a", "b", "c"], ["x", None, "y"], [None] * 3, ["t", "t", "u"])
    for chosen in (np.array([True, False, True]), np.array([0, 2])):
        assert manifest.select(chosen).paths == ["a", "c"] and manifest.select(chosen).labels == ["x", "y"]
        assert manifest.select(chosen).split == ["t", "u"]


names = st.binary(min_size=1, max_size=20).map(
    lambda b: os.fsdecode(b.replace(b"\0", b"-").replace(b"/", b"-"))
)
labels = st.none() | st.text(st.characters(codec="utf-8"), min_size=1).map(str.strip).map(lambda s: s or None)


@settings(max_examples=30, deadline=None)
@given(rows=st.dictionaries(names.filter(lambda name: name[0] != "."), st.tuples(labels, labels)))
def test_round_trip(rows: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round")
    rows = {f"sub/{name}.wav": value for name, value in rows.items()} | {"b.wav": ("x", None)}
    make(folder, *rows)
    manifest = Manifest(
        folder, list(rows), *([v[k] for v in rows.values()] for k in (0, 1)), [None] * len(rows)
    )
    write_manifest(manifest, folder / "m.csv")
    read = read_manifest(folder / "m.csv", group="group")
    assert (read.paths, read.labels, read.groups) == (manifest.paths, manifest.labels, manifest.groups)
    assert sorted(rows) == scan(folder, WAV)
    by_folder = read_manifest(folder, labels=folder / "m.csv", group="group", extensions=WAV)
    assert (
        dict(zip(by_folder.paths, zip(by_folder.labels, by_folder.groups, strict=True), strict=True)) == rows
    )
