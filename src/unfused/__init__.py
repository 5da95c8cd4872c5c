"""unfused: adapt pretrained models with few labels or none."""

from __future__ import annotations

from pathlib import Path

from unfused._lazy import lazy_exports
from unfused.nn.peft_register import announce
from unfused.nn.register import install_hook

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "FrozenEncoder": "unfused.data.frozen_encoder",
        "adapt": "unfused.workflow.adapt",
        "load": "unfused.workflow.predict",
        "methods": "unfused.catalog",
    },
)

install_hook()
announce("unfused.adapters", Path(__file__).parent / "adapters")
announce("unfused.label", Path(__file__).parent / "label")
