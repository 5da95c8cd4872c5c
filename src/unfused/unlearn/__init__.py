"""Making a model forget data, one module per paper.

`unlearn(model, forget=..., retain=..., ...)` returns the model and a report against retraining.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
