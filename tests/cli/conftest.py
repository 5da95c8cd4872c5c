"""Makes `corpora` (and what it needs) importable, and commands callable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for folder in (str(Path(__file__).parents[1] / "workflow"), str(Path(__file__).parents[1])):
    if folder not in sys.path:
        sys.path.insert(0, folder)


@pytest.fixture
def unfused(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run a command in `tmp_path`: exit code, standard output, standard error."""
    from unfused.cli.main import main

    monkeypatch.chdir(tmp_path)

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unfused", *map(str, words)])
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err  # type: ignore[call-overload]

    return command
