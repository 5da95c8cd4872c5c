"""Which code a result depends on, read from the source without importing it.

A cached number must not outlive the code that made it, and an edit elsewhere must not throw hours away: the
key is the hash of a module and of every `unfused` module that it imports, directly or not, at its top or in a
function. Comments, formatting and docstrings do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import unfused
from unfused._lazy import exported_names, public_modules

PACKAGE = Path(unfused.__file__).parent
BENCH = {PACKAGE / "claims" / "lab" / f"{name}.py" for name in ("__init__", "verdict", "cache", "sources")}
"""The bench itself: it moves no number, and polishing a table must not throw results away."""


def code_hash(file: str | Path) -> str:
    """Hash (16 hex digits) of the code in `file` and in all of `unfused` that it leads to."""
    total = hashlib.blake2b(digest_size=8)
    seen: set[Path] = set()
    todo = [Path(file).resolve()]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += _imports(path)
    for path in sorted(seen - BENCH):
        total.update(_code(path))
    return total.hexdigest()


def module_file(name: str) -> Path | None:
    """Source file of a module of this package, or None."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    if name.split(".")[0] != "unfused":
        return None
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


@cache
def _code(path: Path) -> bytes:
    tree = _parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return hashlib.blake2b(ast.dump(tree).encode()).digest()


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    return tuple(file for name in _imported_names(path) if (file := module_file(name)))


def _parse(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    try:
        return ast.parse(text)
    except SyntaxError:  # a file that somebody is writing at this moment is no reason to stop hours of work
        return ast.Module([ast.Expr(ast.Constant(0)), ast.Expr(ast.Constant(text))], [])


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(PACKAGE.parent).parts[: -node.level] if _ours(path) else ()
                base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            for alias in node.names:
                yield f"{base}.{alias.name}"
                yield from _family_module(base, alias.name)


def _ours(path: Path) -> bool:
    return PACKAGE in path.parents


def _family_module(package: str, name: str) -> Iterator[str]:
    """The module behind a name that a family exports lazily."""
    init = module_file(package)
    if init and init.name == "__init__.py":
        for file in public_modules(init.parent):
            if name in exported_names(file):
                yield f"{package}.{file.stem}"
