"""Calls that may hang: each in a thread of its own, waited for so long and no longer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


def in_thread(call: Callable[[], T], seconds: float | None = None, grace: float = 0.0) -> T:
    """What `call()` returns or raises; it runs in a new thread.

    Parameters
    ----------
    call : callable
    seconds : float, optional
        After so many a TimeoutError is raised here, and the call is left to itself. None: no limit.
    grace : float, default=0.0
        Waited beyond that, for calls that keep the limit themselves.

    Examples
    --------
    >>> in_thread(lambda: 6 * 7, seconds=10)
    42
    """
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:  # raised where the answer is waited for
            box.put((None, error))

    # A daemon: a call that hangs for good must not keep the program from ending.
    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = box.get(timeout=None if seconds is None else seconds + grace)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
