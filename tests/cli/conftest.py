"""Makes `corpora` importable."""

import sys
from pathlib import Path

folder = str(Path(__file__).parents[1] / "workflow")
if folder not in sys.path:
    sys.path.insert(0, folder)
