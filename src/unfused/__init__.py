"""unfused: adapt pretrained models with few labels or none."""

from __future__ import annotations

from unfused._lazy import lazy_exports

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "adapt": "unfused.workflow.adapt",
        "load": "unfused.workflow.predict",
        "methods": "unfused.catalog",
    },
)

try:
    from unfused.nn.register import install_hook
except ImportError:  # until nn/register.py lands
    pass
else:
    install_hook()
