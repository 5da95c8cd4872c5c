"""Text embeddings, one module per paper.

A sentence-transformers loss or trainer that works in `SentenceTransformerTrainer`.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
