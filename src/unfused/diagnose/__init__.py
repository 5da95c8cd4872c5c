"""Finding out what training did to a model, one module per paper.

A function returns a frozen dataclass with `.table()` and `.plot(ax=None)`.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
