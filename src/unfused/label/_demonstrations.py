"""Which labelled texts are shown before a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Demonstrations", "text_key"]

BLOCK = 1024
"""Texts whose similarities to the pool are held at once."""


def text_key(text: str) -> str:
    """Equal for texts that count as the same: letter case and whitespace do not."""
    return " ".join(text.lower().split())


class Demonstrations:
    """A pool of labelled texts, each of them once.

    Parameters
    ----------
    texts : sequence of str
    labels : ndarray of int
    features : array or sparse matrix of shape (n, d), rows of length 1, optional
        For "knn".
    selector : {"knn", "random"}
    count : int
        K.
    """

    def __init__(
        self, texts: Sequence[str], labels: np.ndarray, features: Any, selector: str, count: int
    ) -> None:
        first: dict[str, int] = {}
        for i, text in enumerate(texts):
            first.setdefault(text_key(text), i)
        rows = np.fromiter(first.values(), dtype=int, count=len(first))
        self.index = {key: place for place, key in enumerate(first)}
        self.texts, self.labels = [str(texts[i]) for i in rows], np.asarray(labels)[rows]
        self.features = None if features is None else features[rows]
        self.selector, self.count = selector, count
        self.pairs = [(text, int(label)) for text, label in zip(self.texts, self.labels, strict=True)]

    def choose(
        self, texts: Sequence[str], features: Any, rng: np.random.Generator
    ) -> list[tuple[tuple[str, int], ...]]:
        """Demonstrations for each text, never the text itself; the nearest last, or balanced at random."""
        kept = min(self.count, len(self.pairs))
        if not kept:
            return [()] * len(texts)
        own = np.array([self.index.get(text_key(text), -1) for text in texts])
        found: list[tuple[tuple[str, int], ...]] = []
        for start in range(0, len(texts), BLOCK):
            mine = own[start : start + BLOCK]
            there = np.flatnonzero(mine >= 0)
            if self.selector == "knn":
                assert self.features is not None
                near = features[start : start + BLOCK] @ self.features.T
                near = np.array(near.toarray() if hasattr(near, "toarray") else near, dtype=float)
                near[there, mine[there]] = -np.inf
            else:
                near = self._balanced(len(mine), there, mine[there], rng)
            top = np.argpartition(-near, kept - 1, axis=1)[:, :kept]
            value = np.take_along_axis(near, top, 1)
            order = np.argsort(value, axis=1, kind="stable")  # the nearest last
            top, value = np.take_along_axis(top, order, 1), np.take_along_axis(value, order, 1)
            for row, ok in zip(top.tolist(), np.isfinite(value).tolist(), strict=True):
                found.append(tuple(self.pairs[i] for i, good in zip(row, ok, strict=True) if good))
        return found

    def _balanced(self, n: int, there: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Minus the rank inside the class by a random key, ties between classes broken at random."""
        _, label, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        key = rng.random((n, len(label)))
        key[there, own] = 1.5  # the last of its class
        order = np.argsort(2 * label + key, axis=1)
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(len(label)), order.shape), 1)
        near = -(rank - (np.cumsum(counts) - counts)[label] + 0.9 * rng.random(rank.shape))
        near[there, own] = -np.inf
        return near
