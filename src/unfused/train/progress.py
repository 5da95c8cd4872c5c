"""How far a run is and how long it will take: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Stage", "StageProgress", "duration"]


def duration(seconds: float) -> str:
    """A length of time in words, to two units.

    Examples
    --------
    >>> duration(7.4), duration(200), duration(7500)
    ('7 s', '3 min 20 s', '2 h 5 min')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


class StageProgress:
    """Shows the stages of a run, one after the other, each with its progress and the time left.

    Parameters
    ----------
    file : text stream, optional
        Where to write; default: standard output as it is on entering. A terminal gets bars, anything else
        plain lines.
    every : float, default=10
        Seconds between the plain lines of a stage.

    Examples
    --------
    >>> with StageProgress() as progress, progress.stage("read", total=3) as read:
    ...     for done in range(1, 4):
    ...         read.update(done, files=done)
    read: done in 0 s, files 3
    """

    def __init__(self, file: TextIO | None = None, every: float = 10.0) -> None:
        self.file, self.every = file, every
        self._bars: Progress | None = None

    def __enter__(self) -> StageProgress:
        self.file = self.file or sys.stdout
        if self.file.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(file=self.file),
                refresh_per_second=4,
            )
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None

    def stage(self, name: str, total: int | None = None) -> Stage:
        """Begin a stage of `total` units (None: not known), a context manager (or call `close()`)."""
        return Stage(self, name, total)

    def print(self, text: str) -> None:
        """Write a line above the bars."""
        if self._bars:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.file or sys.stdout, flush=True)


class Stage:
    """A stage of a `StageProgress`; `fit(progress=stage)` calls it as `stage(step, steps, loss)`."""

    def __init__(self, progress: StageProgress, name: str, total: int | None) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.done, self.info = 0, ""
        self._closed = False
        self._begun = self._printed = time.monotonic()
        self._first: tuple[float, int] | None = (
            None  # a resumed stage starts in its middle: the rate counts from here
        )
        self._bar = progress._bars.add_task(name, total=total, note="") if progress._bars else None

    def update(self, done: int, total: int | None = None, **info: Any) -> None:
        """`done` units of `total` are finished; `info` is shown beside them, numbers to three digits."""
        now = time.monotonic()
        self.done, self.total = done, self.total if total is None else total
        self._first = self._first or (now, done)
        self.info = "".join(
            f", {name} {f'{value:.3g}' if isinstance(value, float) else value}"
            for name, value in info.items()
        )
        if self.progress._bars and self._bar is not None:
            self.progress._bars.update(self._bar, completed=done, total=self.total, note=self._note(now))
        elif now - self._printed >= self.progress.every:
            self._printed = now
            self.progress.print(f"{self.name}: {self._note(now)}")

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.update(step, steps, loss=loss)

    def seconds_left(self) -> float | None:
        """Time left at the rate seen so far; None before there is one."""
        return self._left(time.monotonic())

    def close(self) -> None:
        """The stage is finished."""
        self._end("done")

    def _end(self, word: str) -> None:
        if self._closed:
            return
        self._closed = True
        note = f"{word} in {duration(time.monotonic() - self._begun)}{self.info}"
        if self.progress._bars and self._bar is not None:
            full = self.total or self.done or 1
            completed = full if word == "done" else self.done
            self.progress._bars.update(self._bar, completed=completed, total=full, note=note)
        else:
            self.progress.print(f"{self.name}: {note}")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._end("stopped" if kind else "done")

    def _left(self, now: float) -> float | None:
        if not self.total or not self._first:
            return None
        then, first = self._first
        if self.done <= first or now <= then:
            return None
        return (now - then) / (self.done - first) * max(0, self.total - self.done)

    def _note(self, now: float) -> str:
        left = self._left(now)
        count = (
            f"{self.done:,} of {self.total:,} ({self.done / self.total:.0%})"
            if self.total
            else f"{self.done:,}"
        )
        return count + (f", {duration(left)} left" if left is not None else "") + self.info
