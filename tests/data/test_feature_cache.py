from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from unfused.data import cache as cache_module
from unfused.data.cache import FeatureCache
from unfused.data.files import BadFile, DiskFull


class Loader:
    """Decodes a file of text as the codes of its letters, and notes what it did."""

    def __init__(self) -> None:
        self.decoded: list[str] = []
        self.chunks: list[int] = []

    def decode(self, path: str) -> np.ndarray:
        self.decoded.append(os.path.basename(path))
        text = Path(path).read_text()
        if text.startswith("bad"):
            raise BadFile(text)
        if text.startswith("crash"):
            raise ZeroDivisionError("unforeseen")
        return np.frombuffer(text.encode(), np.uint8).astype(np.float32)

    def compute(self, items: list[np.ndarray]) -> list[np.ndarray]:
        self.chunks.append(len(items))
        return [np.stack([item, -item]) for item in items]


def texts(folder: Path, n: int = 20, **more: str) -> list[Path]:
    contents = {f"{k:03d}.txt": f"text {k} " + "x" * (k % 7) for k in range(n)} | more
    for name, text in contents.items():
        (folder / name).write_text(text)
    paths = [folder / name for name in contents]
    age(paths)
    return paths


def age(paths: list[Path]) -> None:
    """As if the files were not from just now; those are hashed again, as they might still change."""
    time.sleep(0.06)


def expected(path: Path) -> np.ndarray:
    codes = np.frombuffer(path.read_bytes(), np.uint8).astype(np.float32)
    return np.stack([codes, -codes])


def get(folder: Path, paths: list, loader: Loader | None = None, key: str = "key", **how):
    loader = loader or Loader()
    cache = FeatureCache(folder / "cache", key, shape=(2, -1))
    return cache.get(paths, loader.decode, loader.compute, measure=len, workers=2, **how)


def check(items, paths: list[Path]) -> None:
    assert len(items) == len(paths)
    for item, path in zip(items, paths, strict=True):
        np.testing.assert_array_equal(item, expected(path))


def test_second_run_decodes_nothing(tmp_path: Path) -> None:
    paths = texts(tmp_path)
    loader = Loader()
    calls: list[tuple[int, int]] = []
    items = get(tmp_path, paths, loader, progress=lambda *a: calls.append(a))
    check(items, paths)
    assert sorted(loader.decoded) == [path.name for path in paths] and calls[-1] == (20, 20)
    assert items.values.tolist() == [len(path.read_text()) for path in paths]
    assert items[3].dtype == np.float32 and not items[3].flags.writeable and items.usable.all()

    calls.clear()
    again = Loader()
    items = get(tmp_path, paths[::-1], again, progress=lambda *a: calls.append(a))
    check(items, paths[::-1])
    assert again.decoded == [] and calls == [(20, 20)]
    assert items.values.tolist() == [len(path.read_text()) for path in paths[::-1]]


def test_unchanged_files_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = texts(tmp_path)
    get(tmp_path, paths)
    monkeypatch.setattr(cache_module, "digest", lambda path: pytest.fail("opened"))
    check(get(tmp_path, paths), paths)


def test_renamed_copied_and_touched_files_are_not_decoded(tmp_path: Path) -> None:
    paths = texts(tmp_path)
    get(tmp_path, paths)
    renamed, copied = tmp_path / "renamed", tmp_path / "copied"
    paths[0].rename(renamed)
    shutil.copy(paths[1], copied)
    os.utime(paths[2])
    loader = Loader()
    check(get(tmp_path, [renamed, copied, *paths[1:]], loader), [renamed, copied, *paths[1:]])
    assert loader.decoded == []


def test_changed_content_is_computed_again(tmp_path: Path) -> None:
    paths = texts(tmp_path)
    get(tmp_path, paths)
    status = paths[4].stat()
    paths[4].write_text(paths[4].read_text().upper())  # the same size
    os.utime(paths[4], ns=(status.st_atime_ns, status.st_mtime_ns))  # and the same time
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert loader.decoded == [paths[4].name]


def test_a_file_from_just_now_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_CLOCK_TICK_NS", 10**12)
    path = tmp_path / "a"
    path.write_text("one")
    get(tmp_path, [path])
    index = sqlite3.connect(tmp_path / "cache" / "index.sqlite")
    assert index.execute("SELECT count(*) FROM files").fetchone() == (0,)


def test_equal_files_are_decoded_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text("same")
    paths = [tmp_path / name for name in "abca"]
    loader = Loader()
    items = get(tmp_path, paths, loader)
    check(items, paths)
    assert len(loader.decoded) == 1 and len(set(items.start.tolist())) == 1


def test_keys_and_shapes_do_not_mix(tmp_path: Path) -> None:
    paths = texts(tmp_path)
    get(tmp_path, paths)
    loader = Loader()
    cache = FeatureCache(tmp_path / "cache", "other", shape=(1, 1, -1), dtype="uint8")
    items = cache.get(paths, loader.decode, lambda items: [item[:2] for item in items])
    assert items[0].tolist() == [[[116, 101]]] and items[0].dtype == np.uint8
    assert len(loader.decoded) == 20
    check(get(tmp_path, paths), paths)


def test_bad_files_are_remembered_until_they_change(tmp_path: Path) -> None:
    paths = texts(tmp_path, 3, bad="bad: silent \ud8ff"[:11], crash="crash")
    gone = tmp_path / "gone"
    for _ in range(2):
        loader = Loader()
        items = get(tmp_path, [*paths, gone, tmp_path, Path("nul\0nul")], loader)
        assert items.usable.tolist() == [True] * 3 + [False] * 5
        assert list(items.reasons) == [3, 4, 5, 6, 7] and items[3] is None and np.isnan(items.values[3])
        assert items.reasons[3] == "bad: silent" and "unforeseen" in items.reasons[4]
        assert items.reasons[5].startswith("no such file") and items.reasons[6] == "a folder, not a file"
    assert loader.decoded == ["crash"]  # what was not foreseen may be cured by a new version
    paths[3].write_text("good now")
    loader = Loader()
    assert get(tmp_path, paths, loader).usable.tolist() == [True] * 4 + [False]
    assert "bad" in loader.decoded


def test_compute_can_find_a_file_bad(tmp_path: Path) -> None:
    paths = texts(tmp_path, 3)
    loader = Loader()
    loader.compute = lambda items: [
        BadFile("no good") if k == 1 else [item, item] for k, item in enumerate(items)
    ]  # type: ignore[method-assign]
    for _ in range(2):
        assert get(tmp_path, paths, loader).reasons == {1: "no good"}
    assert len(loader.decoded) == 3


def test_wrong_shape_is_an_error(tmp_path: Path) -> None:
    paths = texts(tmp_path, 3)
    loader = Loader()
    loader.compute = lambda items: [np.zeros(3)] * len(items)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"compute returned an array of shape \(3,\), not \(2, -1\)"):
        get(tmp_path, paths, loader)
    check(get(tmp_path, paths), paths)
    with pytest.raises(ValueError, match="at most one -1"):
        FeatureCache(tmp_path, "key", shape=(-1, -1))


def test_files_that_vanish_or_change_while_read(tmp_path: Path) -> None:
    paths = texts(tmp_path, 4)

    class Slow(Loader):
        def decode(self, path: str) -> np.ndarray:
            result = super().decode(path)
            if path.endswith("001.txt"):
                os.unlink(path)
            if path.endswith("002.txt"):
                Path(path).write_text("longer than before")
            return result

    items = get(tmp_path, paths, Slow())
    assert items.usable.tolist() == [True, False, False, True]
    assert "while it was read" in items.reasons[1] and "changed" in items.reasons[2]
    assert get(tmp_path, paths).usable.tolist() == [True, False, True, True]


def test_undecodable_names(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 \n'\"")
    folder.mkdir()
    paths = texts(folder, 3)
    for _ in range(2):
        loader = Loader()
        check(get(folder, paths, loader), paths)
    assert loader.decoded == []


def test_many_chunks_and_bounded_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = texts(tmp_path, 50)
    monkeypatch.setattr(cache_module, "CHUNK_FILES", 7)
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert loader.chunks == [7] * 7 + [1]
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 20)
    loader = Loader()
    check(get(tmp_path, paths, loader, key="other"), paths)
    assert max(loader.chunks) == 3


def test_selection_and_pickle(tmp_path: Path) -> None:
    paths = texts(tmp_path, 6, bad="bad")
    items = get(tmp_path, paths)
    assert items[-2].shape == (2, 12) and items[-1] is None
    assert items[3:].reasons == {3: "bad"}
    for part in (items[items.usable], items[np.arange(6)], items[[0, 1, 2, 3, 4, 5]], items[:6]):
        check(part, paths[:6])
    check(pickle.loads(pickle.dumps(items[:6])), paths[:6])
    assert len(items[:0]) == 0 and list(items[items.start > 10**9]) == []
    with pytest.raises(IndexError):
        items[7]


def test_no_files(tmp_path: Path) -> None:
    assert len(get(tmp_path, [])) == 0


# What goes wrong with the cache itself ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 200, 700])
def test_a_truncated_data_file_is_filled_again(tmp_path: Path, size: int) -> None:
    paths = texts(tmp_path, 12)
    get(tmp_path, paths)
    (data,) = (tmp_path / "cache").glob("*.data")
    os.truncate(data, size)
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert 0 < len(loader.decoded) <= 12 and (size < 500 or len(loader.decoded) < 12)
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert loader.decoded == []


def test_a_missing_data_file_is_filled_again(tmp_path: Path) -> None:
    paths = texts(tmp_path)
    get(tmp_path, paths)
    next((tmp_path / "cache").glob("*.data")).unlink()
    check(get(tmp_path, paths), paths)


def spoil_start(index: Path) -> None:
    index.write_bytes(b"no database" * 100)


def spoil_middle(index: Path) -> None:
    content = bytearray(index.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    index.write_bytes(content)


def spoil_pages(index: Path) -> None:
    content = bytearray(index.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 8] = b"\xff" * 8
    index.write_bytes(content)


def cut(index: Path) -> None:
    os.truncate(index, index.stat().st_size // 2 + 100)


def other_version(index: Path) -> None:
    connection = sqlite3.connect(index)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize(
    "spoil",
    [spoil_start, spoil_middle, spoil_pages, cut, other_version, Path.unlink, lambda p: os.truncate(p, 0)],
)
def test_a_broken_index_is_made_anew(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    paths = texts(tmp_path, 300)
    get(tmp_path, paths)
    spoil(tmp_path / "cache" / "index.sqlite")
    for decoded in (300, 0):
        loader = Loader()
        check(get(tmp_path, paths, loader), paths)
        assert len(loader.decoded) == decoded
    assert len(list((tmp_path / "cache").glob("*.data"))) == 1  # the old one does not stay behind


def test_a_full_disk_leaves_a_cache_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = texts(tmp_path, 30)
    monkeypatch.setattr(cache_module, "CHUNK_FILES", 10)
    pwrite, calls = os.pwrite, []

    def full_the_second_time(descriptor: int, data: memoryview, place: int) -> int:
        calls.append(place)
        if len(calls) > 1:
            pwrite(descriptor, bytes(data)[:100], place)
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", full_the_second_time)
    with pytest.raises(DiskFull, match=r"no space left on .*cache: free some and run the same command again"):
        get(tmp_path, paths)
    monkeypatch.setattr(os, "pwrite", pwrite)
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert len(loader.decoded) == 20


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.sqlite").mkdir()
    with pytest.raises(
        OSError, match=r"^the feature cache in .* cannot be used: unable to open database file"
    ):
        get(tmp_path, texts(tmp_path, 2))


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
sys.path[:0] = sys.argv[2].split("\\n")
from unfused.data import cache
cache.CHUNK_FILES = 5
folder = Path(sys.argv[1])
def decode(path):
    time.sleep(0.002)
    return np.frombuffer(Path(path).read_bytes(), np.uint8).astype(np.float32)
paths = sorted(folder.glob("*.txt"))
items = cache.FeatureCache(folder / "cache", "key", shape=(2, -1)).get(
    paths, decode, lambda loaded: [np.stack([x, -x]) for x in loaded], workers=2)
assert all(np.array_equal(item[0], decode(path)) for item, path in zip(items, paths, strict=True))
"""


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), "\n".join(sys.path)])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    paths = texts(tmp_path, 300)
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(10):
        process = start(tmp_path)
        deadline = time.monotonic() + 20
        before = counts[-1] if counts else 0
        while process.poll() is None and time.monotonic() < deadline and count(tmp_path) <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(count(tmp_path))
    assert 0 < counts[0] < 300 and counts == sorted(counts)
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert len(loader.decoded) == 300 - counts[-1]


def count(folder: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{folder}/cache/index.sqlite?mode=rw", uri=True)) as index:
            return index.execute("SELECT count(*) FROM items").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0


def test_processes_at_once(tmp_path: Path) -> None:
    paths = texts(tmp_path, 200)
    processes = [start(tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    loader = Loader()
    check(get(tmp_path, paths, loader), paths)
    assert loader.decoded == [] and count(tmp_path) == 200


def test_processes_that_find_a_broken_index_at_once(tmp_path: Path) -> None:
    paths = texts(tmp_path, 60)
    get(tmp_path, paths)
    spoil_start(tmp_path / "cache" / "index.sqlite")
    processes = [start(tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    check(get(tmp_path, paths), paths)


def test_a_forked_process_can_use_the_items(tmp_path: Path) -> None:
    paths = texts(tmp_path, 5)
    items = get(tmp_path, paths)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(np.sum, (items[0],)) == 0
