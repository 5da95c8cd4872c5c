"""Fitting a model to labels, few or many, one module per paper.

An objective is an `nn.Module` whose `forward(**batch)` returns a `ModelOutput` with `loss`; the user keeps
`.encoder`. Trains under `unfused.train.fit` or any `transformers.Trainer`.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
