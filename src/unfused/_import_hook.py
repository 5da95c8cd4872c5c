"""Runs something right after a module is first imported: at once where it is loaded already.

`import unfused` has to stay light and yet teach heavy libraries about us (PEFT our adapters) as soon as they are there.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action()` once module `name` has run, now or later.

    Examples
    --------
    >>> when_imported("sys", lambda: print("sys is here"))
    sys is here
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module where the other finders do, and acts when it has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        # Only those behind this one: a second finder of the same module stands before it, and asks it in turn.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this instance, for one module
        return spec
