"""Every test runs offline, on one thread, with a cache of the session's own."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("UNFUSED_DEBUG", None)

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the controller's
    _cache = tempfile.TemporaryDirectory(prefix="unfused-tests-")
    os.environ["UNFUSED_CACHE"] = _cache.name
