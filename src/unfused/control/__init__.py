"""Adapting agents, one module per paper.

An agent or sampler on gymnasium spaces and the environment's usual loop.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
