"""Labels from few labels or none, one module per paper.

A scikit-learn estimator: `fit`, `predict`, `predict_proba`, `transform` on arrays; it passes
`check_estimator` or documents each exempted check.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
