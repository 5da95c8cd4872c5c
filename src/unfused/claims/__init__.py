"""Runnable experiments that re-test what each paper promises, and their recorded results.

A claim is a module here whose docstring's first line is the sentence under test and which has a function
`claim(lab) -> Verdict | list[Verdict]`; it is named after its method's module and found automatically.
"""

from unfused._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"Lab": "unfused.claims.lab", "Verdict": "unfused.claims.lab", "run": "unfused.claims._runner"},
)
