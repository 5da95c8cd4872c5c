from __future__ import annotations

from unfused.adapters import SsfConfig


def config(kind: str, **options):
    """An RMSNorm cannot take a shift when merged: scales alone for Llama."""
    return SsfConfig(shift=kind != "llama", **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip", "resnet"],
    "identity_options": {"init_weights": "identity"},
    "merge": "",
    "compose": True,
}
