"""Merging checkpoints, one module per paper.

A method is a pure function `(base, deltas, **parameters) -> tensor` on one tensor. `merge(method, base, models, ...)` applies
it to state dicts, models or folders, one tensor at a time; `merge_to_folder` streams safetensors shards.
"""

from unfused._lazy import lazy_exports, lazy_family

lazy_family(__name__, __path__)
_EXPORTS = {
    **globals()["_lazy_exports"],
    **{name: "unfused.merge._plain" for name in ("dare", "linear", "slerp", "task_arithmetic", "ties")},
    "merge": "unfused.merge._engine",
    "merge_to_folder": "unfused.merge._engine",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
