"""Choosing the data to train on, one module per paper.

`scores(...)` returns an array and `choose(...)` indices; plain arrays or a `datasets.Dataset` in, the same
out.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
