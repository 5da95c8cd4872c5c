"""Adapting diffusion models, one module per paper.

A diffusers-compatible module, callback or loss that works with `UNet2DModel` and `UNet2DConditionModel`
pipelines.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
