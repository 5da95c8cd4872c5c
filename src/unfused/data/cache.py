"""The feature cache: arrays computed from files, computed once.

A cache folder holds one SQLite index for all settings and, for each setting (`key`), one append-only data
file that is read through a memory map. Two tables of the index do the work:

    files   path, size, times  -> digest of the content     an unchanged file is not even opened again
    items   key, digest        -> place in the data file    a renamed, copied or touched file costs one hash
                                  or the reason why the file is bad

What happens when things go wrong:

- *killed at any moment*: data is flushed to disk before the transaction that names it is committed, and the
  next writer starts where the last committed item ends, over whatever a killed one left behind;
- *two processes at once*: writing happens inside SQLite's write transaction, so one waits for the other;
- *a truncated data file*: items beyond its end are forgotten and computed again;
- *a broken index*: it is thrown away together with its data files, whose names only it knows.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from unfused.data.files import BadFile, check_file, digest, disk_errors, printable

__all__ = ["CachedItems", "FeatureCache"]

CHUNK_FILES = 256  # what is decoded, computed and committed together, and so lost by a kill
CHUNK_BYTES = 1 << 24  # of files; bounds the memory for decoded items
ALIGNMENT = 64
_VERSION = 1
# A file that changed this recently might change again without a new time stamp.
_CLOCK_TICK_NS = 50_000_000

_SCHEMA = """
CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, ctime INTEGER, digest BLOB)
    WITHOUT ROWID;
CREATE TABLE items (key TEXT, digest BLOB, start INTEGER, size INTEGER, value REAL, reason TEXT,
    PRIMARY KEY (key, digest)) WITHOUT ROWID;
CREATE TABLE data (key TEXT PRIMARY KEY, file TEXT, stop INTEGER);
"""


class CachedItems(Sequence):
    """Read-only arrays in a memory-mapped file; only the parts that are used come into memory.

    ``items[i]`` is an ndarray, or None where file `i` is bad; ``items[slice, mask or indices]`` is again a
    `CachedItems`.

    Attributes
    ----------
    usable : ndarray of bool, shape (n,)
        False where a file is bad.
    reasons : dict of int to str
        Why, for each bad position.
    values : ndarray of float, shape (n,)
        What `measure` returned for each item (0 without it, NaN for bad files).
    start : ndarray of int, shape (n,)
        Place of each item; files of equal content share one, bad ones have -1.
    sizes : ndarray of int, shape (n,)
        How many numbers each item has.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype,
        shape: tuple[int, ...],
        start: np.ndarray,
        sizes: np.ndarray,
        values: np.ndarray,
        reasons: dict[int, str],
    ):
        self.path, self.dtype, self.shape = path, dtype, shape
        self.start, self.sizes, self.values, self.reasons = start, sizes, values, reasons
        self.usable = start >= 0
        stop = int((start + sizes)[self.usable].max(initial=0))
        self._map = np.asarray(np.memmap(path, dtype, "r", shape=(stop,))) if stop else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray | list[int]) -> CachedItems: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice | np.ndarray | list):
            chosen = np.arange(len(self))[index]
            reasons = {new: self.reasons[k] for new, k in enumerate(chosen.tolist()) if k in self.reasons}
            columns = self.start[chosen], self.sizes[chosen], self.values[chosen]
            return CachedItems(self.path, self.dtype, self.shape, *columns, reasons)
        start = self.start[index]
        return None if start < 0 else self._map[start : start + self.sizes[index]].reshape(self.shape)

    def __reduce__(self) -> tuple[Any, ...]:  # a data-loader process maps the file anew instead of copying it
        columns = self.start, self.sizes, self.values, self.reasons
        return CachedItems, (self.path, self.dtype, self.shape, *columns)


class FeatureCache:
    """Arrays computed from files, kept in `folder` and found again by the files' content and `key`.

    Parameters
    ----------
    folder : path
        Made if missing. Any number of keys, runs and processes may share it.
    key : str
        Names everything that the arrays depend on beside the content of the files.
    shape : tuple of int
        Shape of one item, with at most one -1 for an axis that differs from item to item.
    dtype : str, default="float32"
        Of the items.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("1 2 3"), (folder / "b.txt").write_text("4")
    >>> cache = FeatureCache(folder / "cache", "numbers", shape=(1, -1))
    >>> items = cache.get([folder / "a.txt", folder / "b.txt"], decode=np.loadtxt, compute=list)
    >>> items[0]
    array([[1., 2., 3.]], dtype=float32)
    """

    def __init__(
        self, folder: str | os.PathLike[str], key: str, shape: tuple[int, ...], dtype: str = "float32"
    ):
        if sum(n < 0 for n in shape) > 1:
            raise ValueError(f"shape={shape} may have at most one -1")
        self.folder = Path(folder)
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.key = f"{key} {self.dtype.str} {self.shape}"

    def get(
        self,
        paths: Sequence[str | os.PathLike[str]],
        decode: Callable[[str], Any],
        compute: Callable[[list[Any]], Sequence[Any]],
        *,
        measure: Callable[[Any], float] | None = None,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> CachedItems:
        """Look up the arrays of `paths`; compute and keep those that are missing.

        Parameters
        ----------
        paths : sequence of path
        decode : callable
            Path -> anything; called in `workers` threads. Raises `BadFile` for a file that cannot be used:
            that is remembered too, until the content of the file changes.
        compute : callable
            List of what `decode` returned, for up to 256 files -> as many arrays, or a `BadFile` instead
            of one.
        measure : callable, optional
            What `decode` returned -> a number to keep with the item.
        workers : int, optional
            Threads. Default: one per processor that this process may use.
        progress : callable, optional
            Called with (files done, files in all).

        Returns
        -------
        CachedItems
            Aligned with `paths`.

        Raises
        ------
        DiskFull
            What was committed until then stays: the same call goes on from there.
        OSError
            If the folder cannot be written to.
        """
        names = [os.path.abspath(path) for path in paths]
        return self._filled(
            lambda index, threads: _Fill(self, index, threads, names, decode, compute, measure, progress),
            workers,
        )

    def _filled(
        self, fill: Callable[[sqlite3.Connection, ThreadPoolExecutor], _Fill], workers: int | None
    ) -> CachedItems:
        """Run what `fill` makes; a second time where the index turns out to be broken."""

        def attempt() -> CachedItems:
            threads = ThreadPoolExecutor(workers or _processors())
            with closing(self._open_index()) as index, threads:
                try:
                    return fill(index, threads).run()
                finally:
                    threads.shutdown(cancel_futures=True)

        with disk_errors(self.folder), _plain_sqlite_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return attempt()
            except sqlite3.DatabaseError as error:
                # An I/O error is what a writer sees whose index another process has just thrown away.
                if not (_is_corrupt(error) or "disk I/O error" in str(error)):
                    raise
                return attempt()

    def _open_index(self) -> sqlite3.Connection:
        path = self.folder / "index.sqlite"
        try:
            return self._connect(path)
        except sqlite3.DatabaseError as error:
            if not _is_corrupt(error):
                raise
        with open(self.folder / "rebuild.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return self._connect(path)  # another process may have been here first
            except sqlite3.DatabaseError as error:
                if not _is_corrupt(error):
                    raise
            # The journal first: once the index is gone, another process may be writing a new one.
            Path(f"{path}-journal").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return self._connect(path)

    def _connect(self, path: Path) -> sqlite3.Connection:
        index = sqlite3.connect(path, timeout=120, isolation_level=None)
        try:
            if index.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("the quick check failed")
            index.execute("PRAGMA temp_store = MEMORY")
            if _version(index) != _VERSION:
                self._create_tables(index)
            return index
        except BaseException:
            index.close()
            raise

    def _create_tables(self, index: sqlite3.Connection) -> None:
        with _transaction(index):
            if _version(index) == _VERSION:  # another process was faster
                return
            for (table,) in index.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                index.execute(f'DROP TABLE "{table}"')
            for orphan in self.folder.glob("*.data"):
                orphan.unlink(missing_ok=True)
            for statement in _SCHEMA.split(";"):
                index.execute(statement)
            index.execute(f"PRAGMA user_version = {_VERSION}")


class _Stat(NamedTuple):
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, path: str) -> _Stat:
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class _Job(NamedTuple):
    """One content that is being decoded, and the positions in `paths` that have it."""

    digest: bytes
    positions: list[int]
    future: Future


class _Fill:
    """One call of `FeatureCache.get`: the columns of its result, and how they are filled."""

    def __init__(
        self,
        cache: FeatureCache,
        index: sqlite3.Connection,
        threads: ThreadPoolExecutor,
        paths: list[str],
        decode: Callable[[str], Any],
        compute: Callable[[list[Any]], Sequence[Any]],
        measure: Callable[[Any], float] | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.cache, self.index, self.threads, self.paths = cache, index, threads, paths
        self.decode, self.compute, self.measure, self.progress = decode, compute, measure, progress
        self.start = np.full(len(paths), -1, np.int64)
        self.sizes = np.zeros(len(paths), np.int64)
        self.values = np.full(len(paths), np.nan)
        self.reasons: dict[int, str] = {}
        self.file_sizes = np.zeros(len(paths), np.int64)
        self.stats: dict[int, _Stat] = {}  # of the files in flight
        self.done = 0

    def run(self) -> CachedItems:
        self.file = self._data_file()
        missing = self._look_up_files()
        self._advance(len(self.paths) - len(missing))
        jobs: list[_Job] = []
        for chunk in self._chunks(missing):
            following = self._start_jobs(chunk)  # the threads decode this one while the last is computed
            self._finish_jobs(jobs)
            jobs = following
        self._finish_jobs(jobs)
        reasons = dict(sorted(self.reasons.items()))
        columns = self.start, self.sizes, self.values, reasons
        return CachedItems(self.file, self.cache.dtype, self.cache.shape, *columns)

    def _advance(self, files: int) -> None:
        self.done += files
        if files and self.progress:
            self.progress(self.done, len(self.paths))

    def _data_file(self) -> Path:
        """The key's data file; items that lie beyond its end are forgotten."""
        key = self.cache.key
        with _transaction(self.index):
            row = self.index.execute("SELECT file FROM data WHERE key = ?", (key,)).fetchone()
            if row is None:
                digest_of_key = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
                row = (f"{digest_of_key}-{secrets.token_hex(4)}.data",)
                self.index.execute("INSERT INTO data VALUES (?, ?, 0)", (key, *row))
            path = self.cache.folder / row[0]
            path.touch()
            self._committed_end(path)
        return path

    def _committed_end(self, path: Path) -> int:
        """Byte where the last whole item ends; to be called in a transaction."""
        key, size = self.cache.key, path.stat().st_size
        (stop,) = self.index.execute("SELECT stop FROM data WHERE key = ?", (key,)).fetchone()
        if stop > size:  # somebody cut the file
            self.index.execute("DELETE FROM items WHERE key = ? AND start + size > ?", (key, size))
            self.index.execute("UPDATE data SET stop = ? WHERE key = ?", (size, key))
        return min(stop, size)

    def _look_up_files(self) -> list[int]:
        """Fill what the index knows by path and time stamps; return the other positions."""
        execute = self.index.execute
        execute("CREATE TEMP TABLE wanted (position INTEGER PRIMARY KEY, path BLOB, size, mtime, ctime)")
        execute("BEGIN")
        self.index.executemany("INSERT INTO wanted VALUES (?, ?, ?, ?, ?)", self._wanted())
        missing = np.ones(len(self.paths), bool)
        for position, *item in execute(
            "SELECT position, start, items.size, value, reason"
            " FROM wanted CROSS JOIN files USING (path, size, mtime, ctime)"
            " CROSS JOIN items ON items.key = ? AND items.digest = files.digest",
            (self.cache.key,),
        ):
            missing[position] = False
            self._fill(position, *item)
        execute("COMMIT")
        return np.flatnonzero(missing).tolist()

    def _wanted(self) -> Iterator[tuple[Any, ...]]:
        for position, path in enumerate(self.paths):
            with suppress(OSError, ValueError):  # what is wrong with it is found out later
                status = _Stat.of(path)
                self.file_sizes[position] = status.size
                yield position, os.fsencode(path), *status

    def _fill(self, position: int, start: int | None, size: int, value: float, reason: str | None) -> None:
        if start is None:
            self.reasons[position] = str(reason)
        else:
            itemsize = self.cache.dtype.itemsize
            self.start[position], self.sizes[position] = start // itemsize, size // itemsize
            self.values[position] = value

    def _chunks(self, positions: list[int]) -> Iterator[list[int]]:
        chunk: list[int] = []
        size = 0
        for position in positions:
            chunk.append(position)
            size += int(self.file_sizes[position])
            if len(chunk) == CHUNK_FILES or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _start_jobs(self, positions: list[int]) -> list[_Job]:
        """Fill what the index knows by content, and have the rest decoded."""
        by_digest = self._by_content(positions)
        known = self._look_up_digests(list(by_digest))
        renamed = {content: by_digest.pop(content) for content in known}
        for content, same in renamed.items():
            for position in same:
                self._fill(position, *known[content])
        if renamed:
            with _transaction(self.index):
                self._remember_files(renamed)
            self._advance(sum(map(len, renamed.values())))
        return [_Job(content, same, self._submit(same[0])) for content, same in by_digest.items()]

    def _by_content(self, positions: list[int]) -> dict[bytes, list[int]]:
        """Hash the files: digest -> the positions that have it."""
        by_digest: dict[bytes, list[int]] = {}
        results = self.threads.map(_identify, [self.paths[position] for position in positions])
        for position, result in zip(positions, results, strict=True):
            if isinstance(result, BadFile):
                self.reasons[position] = result.reason
                self._advance(1)
            else:
                content, self.stats[position] = result
                by_digest.setdefault(content, []).append(position)
        return by_digest

    def _submit(self, position: int) -> Future:
        return self.threads.submit(_decode, self.decode, self.paths[position], self.stats[position])

    def _look_up_digests(self, digests: list[bytes]) -> dict[bytes, tuple[Any, ...]]:
        marks = ",".join("?" * len(digests))
        rows = self.index.execute(
            f"SELECT digest, start, size, value, reason FROM items WHERE key = ? AND digest IN ({marks})",
            (self.cache.key, *digests),
        )
        return {content: tuple(item) for content, *item in rows}

    def _remember_files(self, contents: Mapping[bytes, list[int]]) -> None:
        rows = [
            (os.fsencode(self.paths[position]), *self.stats.pop(position), content)
            for content, same in contents.items()
            for position in same
        ]
        settled = time.time_ns() - _CLOCK_TICK_NS
        rows = [row for row in rows if max(row[2:4]) < settled]
        self.index.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    def _finish_jobs(self, jobs: list[_Job]) -> None:
        """Wait for the decoded files, compute their arrays and commit them."""
        if not jobs:
            return
        decoded = {job.digest: job.future.result() for job in jobs}
        bad = {content: item for content, item in decoded.items() if isinstance(item, BadFile)}
        good = {content: item for content, item in decoded.items() if content not in bad}
        values = {
            content: float(self.measure(item)) if self.measure else 0.0 for content, item in good.items()
        }
        arrays = dict(zip(good, self.compute(list(good.values())), strict=True)) if good else {}
        self._commit(jobs, arrays | bad, values)
        self._advance(sum(len(job.positions) for job in jobs))

    def _commit(self, jobs: list[_Job], outcomes: dict[bytes, Any], values: dict[bytes, float]) -> None:
        with _transaction(self.index):
            known = self._look_up_digests([job.digest for job in jobs])  # another process may have added some
            first = place = -(-self._committed_end(self.file) // ALIGNMENT) * ALIGNMENT
            pieces: list[bytes] = []
            rows: list[tuple[Any, ...]] = []
            for content, positions, _ in jobs:
                outcome, item = outcomes[content], known.get(content)
                if item is None and isinstance(outcome, BadFile):
                    item = (None, 0, 0.0, printable(outcome.reason))
                elif item is None:
                    data = self._bytes(outcome)
                    item = (place, len(data), values[content], None)
                    pieces.append(data + bytes(-len(data) % ALIGNMENT))
                    place += len(pieces[-1])
                if content not in known and not isinstance(outcome, _Passing):
                    rows.append((self.cache.key, content, *item))
                for position in positions:
                    self._fill(position, *item)
            if pieces:
                _write_at(self.file, first, b"".join(pieces))
                self.index.execute("UPDATE data SET stop = ? WHERE key = ?", (place, self.cache.key))
            self.index.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._remember_files({job.digest: job.positions for job in jobs})

    def _bytes(self, array: Any) -> bytes:
        array, shape = np.asarray(array, self.cache.dtype), self.cache.shape
        try:
            return array.reshape(shape).tobytes()
        except ValueError:
            raise ValueError(f"compute returned an array of shape {array.shape}, not {shape}") from None


class _Passing(BadFile):
    """A reason that says nothing about the content, and so is not remembered."""


def _identify(path: str) -> tuple[bytes, _Stat] | BadFile:
    try:
        check_file(path)
        status = _Stat.of(path)
        return bytes.fromhex(digest(path)), status
    except BadFile as error:
        return error
    except OSError as error:  # since the check, a moment ago
        return BadFile(f"cannot be read: {error.strerror or error}")


def _decode(decode: Callable[[str], Any], path: str, before: _Stat) -> Any:
    result: Any
    try:
        result = decode(path)
    except BadFile as error:
        result = error
    except Exception as error:
        result = _Passing(f"could not be decoded ({type(error).__name__}: {error})")
    try:
        if _Stat.of(path) != before:  # what was decoded is not what was hashed
            result = _Passing("changed while it was read: run again")
    except OSError:
        result = _Passing("no such file (moved or deleted while it was read?)")
    return result


def _write_at(path: Path, place: int, data: bytes) -> None:
    # Not through a memory map: on a full disk that ends in a bus error.
    descriptor = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, place)
            view, place = view[written:], place + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(index: sqlite3.Connection) -> int:
    return index.execute("PRAGMA user_version").fetchone()[0]


@contextmanager
def _transaction(index: sqlite3.Connection) -> Iterator[None]:
    index.execute("BEGIN IMMEDIATE")
    try:
        yield
        index.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # after some errors SQLite has rolled back already
            index.execute("ROLLBACK")
        raise


def _is_corrupt(error: sqlite3.DatabaseError) -> bool:
    # Its subclasses mean other things: locked, full, read-only.
    return type(error) is sqlite3.DatabaseError


@contextmanager
def _plain_sqlite_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise
        raise OSError(f"the feature cache in {printable(folder)} cannot be used: {error}") from error
