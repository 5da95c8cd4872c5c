"""Preference and instruction tuning of language models, one module per paper.

A loss, a collator or a `Trainer` subclass that works with any `AutoModelForCausalLM`, on TRL's base where TRL
has one.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
