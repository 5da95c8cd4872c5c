"""One training engine on transformers' Trainer."""

from __future__ import annotations

from unfused._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ArrayDataset": "unfused.train.data",
        "Engine": "unfused.train.engine",
        "FitResult": "unfused.train.engine",
        "PeakMemory": "unfused.train.memory",
        "Recipe": "unfused.train.engine",
        "StageProgress": "unfused.train.progress",
        "collate": "unfused.train.data",
        "fit": "unfused.train.engine",
        "supports_bf16": "unfused.train.engine",
    },
)
