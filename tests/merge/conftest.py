"""A family of small checkpoints; makes `small_checkpoints` and `killing` importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in (str(Path(__file__).parent), str(Path(__file__).parents[1])):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from small_checkpoints import save, state  # noqa: E402


@pytest.fixture
def family(tmp_path):
    """A base and three fine-tunes: their states, and their folders (sharded differently)."""
    base = state(0)
    models = [state(i, like=base) for i in (1, 2, 3)]
    folders = [
        save(tmp_path / name, s, size)
        for name, s, size in zip("BXYZ", (base, *models), (10**9, 300, 800, 10**9), strict=True)
    ]
    return base, models, folders


@pytest.fixture
def tree():
    def snapshot(folder):
        return {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
        }

    return snapshot
