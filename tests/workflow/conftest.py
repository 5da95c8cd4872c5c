"""Makes `corpora` and `killing` importable, and one small corpus for all tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A killed process leaves its writes to the system: waiting for the platter is for power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 recordings of three pitches by three sources, and `labels.csv` beside the folder."""
    import corpora

    folder = tmp_path_factory.mktemp("tones") / "recordings"
    corpora.write_labels(folder.parent / "labels.csv", corpora.write_tones(folder))
    return folder


@pytest.fixture
def adapt_tiny(tmp_path: Path) -> Callable[..., Any]:
    """`adapt` with a tiny encoder and three steps a stage, into `tmp_path/runs`."""
    import corpora

    from unfused import adapt

    return partial(adapt, output=tmp_path / "runs", **corpora.TINY)
