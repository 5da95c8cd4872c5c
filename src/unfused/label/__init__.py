"""Labels from few labels or none, one module per paper.

A scikit-learn estimator: `fit`, `predict`, `predict_proba`, `transform` on arrays; it passes
`check_estimator` or documents each exempted check. `FrozenEncoder` makes arrays of pictures, texts and recordings.
"""

from unfused._lazy import lazy_exports, lazy_family

lazy_family(__name__, __path__)
_EXPORTS = {
    **globals()["_lazy_exports"],
    "FrozenEncoder": "unfused.data.frozen_encoder",
    "load": "unfused.data.estimator_io",
    "save": "unfused.data.estimator_io",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
