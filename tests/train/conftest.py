"""Makes `killing` and `resumable` importable, here and in the processes that tests start."""

import gc
import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session", autouse=True)
def _quick_collections():
    """The Trainer collects garbage before each run: spare it the imported modules."""
    import unfused.train.engine  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
