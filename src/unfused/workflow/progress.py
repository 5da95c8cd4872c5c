"""What a person sees of a run on the terminal: one summary, then a bar per stage with the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def no_bars_of_transformers() -> Iterator[None]:
    """Without the bars that transformers draws when it loads or saves weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Console:
    """Progress of `adapt`; with `enabled=False` it is silent, and training runs all the same.

    Parameters
    ----------
    enabled : bool or callable
        A callable gets `(stage, done, total)`.
    """

    def __init__(self, enabled: bool | Callable[[str, int, int], Any] = False) -> None:
        self.enabled = bool(enabled)
        self.callback = enabled if callable(enabled) else None
        self.current = "read"
        self._bars: ExitStack | None = None
        self._task: Any = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exc: Any) -> None:
        """Give the terminal back, also when a stage fails or is interrupted."""
        if self._bars is not None:
            bars, self._bars = self._bars, None
            bars.__exit__(*exc)

    def stage(self, name: str, reused: bool) -> None:
        self.current = name
        self._close()
        if reused and self.enabled and self.callback is None:
            self._print(f"  {name}: done before, reused")

    def task(self, name: str, total: int) -> Callable[..., None]:
        """A callable `(done, total, loss=None)` for one stage."""
        self.current = name

        def update(done: int, of: int, loss: float | None = None) -> None:
            if self.callback is not None:
                self.callback(name, done, of)
            elif self.enabled:
                self._bar(name, of).update(done, **({} if loss is None else {"loss": loss}))
                if done >= of:
                    self._close()

        return update

    def fit(self, model: Any, data: Any, **options: Any) -> Any:
        """`unfused.train.fit` with this console's progress and, for convolutions, the memory layout that suits them."""
        import torch

        from unfused.train import fit

        model.to(memory_format=torch.channels_last)
        return fit(model, data, progress=self.task(self.current, options["steps"]), **options)

    def summary(self, data: Any, folder: Path | None = None) -> None:
        """The run on one screen: after reading (what was found) and at the end (what came out)."""
        if self.enabled and self.callback is None:
            from unfused.workflow.summary import print_summary

            self._close()
            print_summary(data, folder=folder)

    def say(self, text: str) -> None:
        self._close()
        if self.enabled and self.callback is None:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _bar(self, name: str, total: int) -> Any:
        if self._bars is None:
            from unfused.train.progress import StageProgress

            self._bars = ExitStack()
            bars = self._bars.enter_context(StageProgress(sys.stderr))
            self._task = self._bars.enter_context(bars.stage(name, total))
        return self._task

    def _close(self) -> None:
        self.__exit__(None, None, None)
