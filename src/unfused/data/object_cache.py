"""The feature cache for things in memory: texts, arrays, pictures that never were files.

It shares folder, index and guarantees with `unfused.data.cache`; only a thing's digest comes from its content in memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from unfused.data.cache import CachedItems, FeatureCache, _Fill
from unfused.data.files import BadFile

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

        def fill(index: sqlite3.Connection, threads: ThreadPoolExecutor) -> _Fill:
            found = _FillObjects(self, index, threads, objects, decode, compute, None, progress)  # type: ignore[arg-type]
            found.digest = digest
            return found

        return self._filled(fill, workers)


class _FillObjects(_Fill):
    digest: Callable[[Any], bytes]

    def _look_up_files(self) -> list[int]:
        return list(range(len(self.paths)))

    def _remember_files(self, contents: Any) -> None:
        """There are none."""

    def _by_content(self, positions: list[int]) -> dict[bytes, list[int]]:
        by_digest: dict[bytes, list[int]] = {}
        for position in positions:
            by_digest.setdefault(self.digest(self.paths[position]), []).append(position)
        return by_digest

    def _submit(self, position: int) -> Future:
        return self.threads.submit(_decode, self.decode, self.paths[position])


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
