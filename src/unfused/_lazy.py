"""Lazy exports (PEP 562): a package's names are known at once, their modules are imported on first use."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package in which an exported name wins over a submodule of the same name.

    Importing `merge/ties.py` makes Python set `merge.ties` to the module; where the family exports a function
    `ties` from it, `from unfused.merge import ties` must give that function, whatever was imported before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and self.__dict__["_lazy_exports"].get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for the `__init__.py` of `package`.

    Parameters
    ----------
    package : str
        The package's `__name__`.
    exports : mapping of str to str
        Public name -> full name of the module that defines it.

    Examples
    --------
    In `unfused/__init__.py`:

    ``__getattr__, __dir__, __all__ = lazy_exports(__name__, {"adapt": "unfused.workflow.adapt"})``
    """
    module = sys.modules[package]
    module.__dict__["_lazy_exports"] = dict(exports)
    module.__class__ = _LazyPackage

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(exports[name]), name)
        setattr(module, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*module.__dict__, *exports})

    return __getattr__, __dir__, sorted(exports)


def public_modules(folder: Path) -> list[Path]:
    """The modules of a family that are methods: `.py` files whose names do not begin with an underscore."""
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def exported_names(path: Path) -> list[str]:
    """The names in a module's literal `__all__`, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return []


def lazy_family(
    package: str, path: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`lazy_exports` of everything in the `__all__` of the family's modules: adding a paper edits no list."""
    exports: dict[str, str] = {}
    for folder in path:
        for file in public_modules(Path(folder)):
            module = f"{package}.{file.stem}"
            for name in exported_names(file):
                if exports.setdefault(name, module) != module:
                    raise ImportError(f"{name!r} is exported by {exports[name]} and by {module}: rename one")
    return lazy_exports(package, exports)
