"""Merging checkpoints, one module per paper.

`merge(base, models, ...)` works on state dicts, one tensor at a time; the engine streams safetensors shards.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
