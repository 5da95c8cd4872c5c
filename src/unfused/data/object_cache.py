"""The feature cache for things in memory: texts, arrays, pictures that never were files.

It shares folder, index and guarantees with `unfused.data.cache`; only a thing's digest comes from its content in memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np

from unfused.data.cache import (
    CachedItems,
    FeatureCache,
    _Fill,
    _is_corrupt,
    _Job,
    _plain_sqlite_errors,
    _processors,
)
from unfused.data.files import BadFile, disk_errors

__all__ = ["ObjectCache", "stack"]


class ObjectCache(FeatureCache):
    """`FeatureCache` whose items are found by the content of objects.

    Examples
    --------
    >>> import hashlib, tempfile
    >>> cache = ObjectCache(tempfile.mkdtemp(), "lengths", shape=(1,))
    >>> items = cache.get_objects(
    ...     ["ab", "c", "ab"],
    ...     digest=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest(),
    ...     decode=str,
    ...     compute=lambda texts: [[len(text)] for text in texts],
    ... )
    >>> stack(items, width=1)[:, 0].tolist()
    [2.0, 1.0, 2.0]
    """

    def get_objects(
        self,
        objects: Sequence[Any],
        digest: Callable[[Any], bytes],
        decode: Callable[[Any], Any],
        compute: Callable[[list[Any]], Sequence[Any]],
        *,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> CachedItems:
        """As `FeatureCache.get`, objects for paths.

        Parameters
        ----------
        objects : sequence
        digest : callable
            Object -> bytes that differ where the content does.
        decode, compute, workers, progress
            As in `FeatureCache.get`; what else than `BadFile` `decode` raises goes through.
        """

        def attempt() -> CachedItems:
            threads = ThreadPoolExecutor(workers or _processors())
            with closing(self._open_index()) as index, threads:
                fill = _FillObjects(self, index, threads, objects, decode, compute, None, progress)  # type: ignore[arg-type]
                fill.digest = digest
                try:
                    return fill.run()
                finally:
                    threads.shutdown(cancel_futures=True)

        with disk_errors(self.folder), _plain_sqlite_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return attempt()
            except sqlite3.DatabaseError as error:
                if not (_is_corrupt(error) or "disk I/O error" in str(error)):
                    raise
                return attempt()


class _FillObjects(_Fill):
    digest: Callable[[Any], bytes]

    def _look_up_files(self) -> list[int]:
        return list(range(len(self.paths)))

    def _remember_files(self, contents: Any) -> None:
        """There are none."""

    def _start_jobs(self, positions: list[int]) -> list[_Job]:
        by_digest: dict[bytes, list[int]] = {}
        for position in positions:
            by_digest.setdefault(self.digest(self.paths[position]), []).append(position)
        known = self._look_up_digests(list(by_digest))
        for content, item in known.items():
            same = by_digest.pop(content)
            for position in same:
                self._fill(position, *item)
            self._advance(len(same))
        return [
            _Job(content, same, self.threads.submit(_decode, self.decode, self.paths[same[0]]))
            for content, same in by_digest.items()
        ]


def _decode(decode: Callable[[Any], Any], item: Any) -> Any:
    try:
        return decode(item)
    except BadFile as error:
        return error


def stack(items: CachedItems, width: int) -> np.ndarray:
    """Items of one length as rows (n, width); NaN where one is bad.

    Raises
    ------
    ValueError
        Where an item has another length.
    """
    usable = items.usable
    if (items.sizes[usable] != width).any():
        raise ValueError(f"items have {sorted(set(items.sizes[usable].tolist()))} numbers, not {width}")
    rows = np.full((len(items), width), np.nan, items.dtype)
    if usable.any():
        rows[usable] = items._map[items.start[usable, None] + np.arange(width)]
    return rows
