from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.data.files import (
    BadFile,
    DiskFull,
    Quarantine,
    atomic_write,
    check_file,
    digest,
    disk_errors,
    kind_of,
    printable,
    read_json,
    write_csv,
    write_json,
)
from unfused.data.tables import read_table

# What os.fsdecode can give: any bytes but "/" and zero.
file_names = st.binary(min_size=1, max_size=40).map(
    lambda b: os.fsdecode(b.replace(b"\0", b"-").replace(b"/", b"-"))
)


def test_atomic_write_keeps_the_old_content_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@settings(max_examples=40, deadline=None)
@given(writes=st.lists(st.tuples(st.binary(max_size=100), st.booleans())))
def test_the_last_whole_write_is_what_is_there(
    writes: list[tuple[bytes, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("atomic") / "file"
    there = None
    for content, fails in writes:
        with suppress(KeyboardInterrupt), atomic_write(path, "wb") as file:
            file.write(content)
            if fails:
                raise KeyboardInterrupt
            there = content
        assert (path.read_bytes() if path.exists() else None) == there
    assert [p.name for p in path.parent.iterdir()] == ["file"] * (there is not None)


def test_atomic_write_keeps_mode_and_follows_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    with atomic_write(link, "wb") as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_atomic_write_takes_the_longest_names(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with atomic_write(path) as file:
        file.write("x")
    assert path.read_text() == "x"


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, list(range(1000)))
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from unfused.data.files import write_json\n"
        "n = 0\n"
        "while True: n += 1; write_json(sys.argv[1], [n] * (1000 + n % 3000))"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path), *sys.path])
    try:
        for _ in range(300):
            assert len(set(read_json(path)[1:])) in (1, 999)
    finally:
        writer.kill()  # in the middle of whatever it does
        writer.wait()
    read_json(path)


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(DiskFull, match=r"^no space left on /dev: free some and run the same command again$"):
        with atomic_write("/dev/full") as file:
            file.write("x" * 100_000)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        Exception("database or disk is full"),
    ],
)
def test_full_disks_of_other_libraries(error: Exception) -> None:
    with pytest.raises(DiskFull, match="no space left on /data"), disk_errors("/data"):
        raise error
    with pytest.raises(ZeroDivisionError), disk_errors("/data"):
        raise ZeroDivisionError


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(file_names, st.text(st.characters(codec="utf-8")))))
def test_csv_round_trip(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    write_csv(path, ("path", "label"), rows)
    assert [tuple(row) for row in read_table(path).rows] == rows


@settings(max_examples=40, deadline=None)
@given(value=st.dictionaries(file_names, st.lists(file_names)))
def test_json_round_trip(value: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    path.read_bytes().decode("ascii")


def test_json_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


@given(file_names)
def test_printable_is_one_ascii_safe_line(name: str) -> None:
    shown = printable(name)
    shown.encode("utf-8")
    assert shown.isprintable()


def test_digest(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * 3_000_000)
    b.write_bytes(b"x" * 3_000_000)
    assert digest(a) == digest(b) and len(digest(a)) == 40
    b.write_bytes(b"x" * 2_999_999 + b"y")
    assert digest(a) != digest(b)


def test_check_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, reason in [
        (tmp_path, "a folder, not a file"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "x" / "y", "no such file"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
        ("nul\0nul", "a name that no file can have"),
        ("half \ud800", "a name that no file can have"),
    ]:
        with pytest.raises(BadFile, match=reason):
            check_file(path)
    path = tmp_path / "a"
    path.write_text("x")
    assert check_file(path).st_size == 1

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read anything
    with pytest.raises(BadFile, match="permission denied"):
        check_file(path)


def test_kind_of(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, kind in [
        ("é".encode() * 300, "text"),
        (b"a" + "é".encode() * 300, "text"),
        (b"RIFF\0\0\0\0WAVE", "a WAV recording"),
        (b"RIFF\0\0\0\0WEBP", "a WebP picture"),
        (b"\0\0\0\x18ftypheic", "a HEIC picture"),
        (bytes(range(256)) * 2, "unknown data"),
    ]:
        path.write_bytes(content)
        assert kind_of(path) == kind


def test_quarantine(tmp_path: Path) -> None:
    quarantine = Quarantine()
    quarantine.write(tmp_path / "q.csv")
    assert (tmp_path / "q.csv").read_text() == "path,reason\n"
    odd = os.fsdecode(b"\xff\n\"',.wav")
    quarantine.add(odd, "silent")
    quarantine.add(odd, "another reason")
    quarantine.add(Path("a.wav"), "empty")
    quarantine.write(tmp_path / "q.csv")
    assert read_table(tmp_path / "q.csv").rows == [["a.wav", "empty"], [odd, "silent"]]
    assert len(quarantine) == 2 and odd in quarantine
    json.dumps(quarantine.rows)
