"""Asking a black box, a language model's API say, within a budget: batches, a cache, second tries, time limits."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from unfused.nn.time_limit import in_thread

__all__ = ["BlackBox"]


class BlackBox:
    """Probabilities for queries, each asked once, by a function that may fail.

    Parameters
    ----------
    function : callable (list of queries) -> array of shape (n, n_classes)
        Also async. Rows need not sum to 1; they are normalised.
    n_classes : int
    budget : int, optional
        Queries that may be sent, repeated ones counted each time. None: no limit.
    batch_size : int, default=64
        Queries of one call.
    timeout : float, optional
        Seconds for one call. A call that takes longer is given up; a function that is not async goes on in its thread.
    retries : int, default=1
        Further tries of what failed: an exception, a timeout, an answer of another shape, a row that is no distribution.
    patience : int, default=3
        After so many calls in a row that failed in all tries the black box is `down` and not asked again.

    Attributes
    ----------
    n_calls : int
        Queries sent, failed ones among them.
    n_failed : int
        Queries given up.
    error : str
        The last failure.
    down, spent : bool
        Whether the black box is given up; whether queries had to go unasked for want of budget.

    Examples
    --------
    >>> box = BlackBox(lambda queries: [[len(query), 1] for query in queries], n_classes=2, budget=3)
    >>> box(["a", "abc", "a"]).tolist(), box.n_calls
    ([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]], 2)
    >>> box(["abcd", "abcde"]).tolist()  # the budget ends
    [[0.8, 0.2], [nan, nan]]
    """

    def __init__(
        self,
        function: Callable[[list[Any]], Any],
        n_classes: int,
        budget: int | None = None,
        batch_size: int = 64,
        timeout: float | None = None,
        retries: int = 1,
        patience: int = 3,
    ) -> None:
        self.function, self.n_classes, self.budget = function, n_classes, budget
        self.batch_size, self.timeout, self.retries, self.patience = batch_size, timeout, retries, patience
        self.n_calls = self.n_failed = self._in_a_row = 0
        self.error, self.down, self.spent = "", False, False
        self._cache: dict[Hashable, np.ndarray] = {}

    @property
    def left(self) -> float:
        """Queries that may still be sent."""
        return float("inf") if self.budget is None else self.budget - self.n_calls

    def __call__(self, queries: Sequence[Hashable]) -> np.ndarray:
        """Probabilities, (n, n_classes); NaN in the rows that got no answer."""
        fresh = [query for query in dict.fromkeys(queries) if query not in self._cache]
        for start in range(0, len(fresh), self.batch_size):
            self._ask(fresh[start : start + self.batch_size])
        nothing = np.full(self.n_classes, np.nan)
        return np.array([self._cache.get(query, nothing) for query in queries]).reshape(-1, self.n_classes)

    def _ask(self, pending: list[Hashable]) -> None:
        tries, answered = 0, False
        while pending and tries <= self.retries and not self.down:
            affordable = pending[: max(0, int(min(self.left, len(pending))))]
            self.spent |= len(affordable) < len(pending)
            pending = affordable
            if not pending:
                return
            tries += 1
            self.n_calls += len(pending)
            try:
                rows = self._checked(_within(self.timeout, self.function, list(pending)), len(pending))
            except Exception as error:  # whatever a stranger's service does, what was learned is kept
                self.error = f"{type(error).__name__}: {error}"
                continue
            good = np.isfinite(rows).all(1)
            if not good.all():
                self.error = "an answer was no probability distribution"
            answered |= bool(good.any())
            self._cache.update((q, row) for q, row, ok in zip(pending, rows, good, strict=True) if ok)
            pending = [query for query in pending if query not in self._cache]
        if pending and tries:
            self.n_failed += len(pending)
        if tries:
            self._in_a_row = 0 if answered else self._in_a_row + 1
            self.down = self._in_a_row >= self.patience

    def _checked(self, answer: Any, n: int) -> np.ndarray:
        rows = np.asarray(answer, dtype=float)
        if rows.shape != (n, self.n_classes):
            raise ValueError(f"the answer has shape {rows.shape}, not ({n}, {self.n_classes})")
        total = np.where((rows >= 0).all(1) & np.isfinite(rows).all(1), rows.sum(1), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total[:, None] > 0, rows / total[:, None], np.nan)


def _within(seconds: float | None, function: Callable[[list[Any]], Any], queries: list[Any]) -> Any:
    def call() -> Any:
        answer = function(queries)
        if not inspect.isawaitable(answer):
            return answer

        async def finish() -> Any:
            return await asyncio.wait_for(answer, seconds)

        return asyncio.run(finish())

    if seconds is None and not _in_a_loop():
        return call()
    return in_thread(call, seconds, grace=0.05)


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
