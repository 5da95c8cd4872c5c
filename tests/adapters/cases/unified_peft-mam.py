from __future__ import annotations

from unfused.adapters import MamConfig


def config(kind: str, **options):
    return MamConfig(prefix_length=3, bottleneck_dim=4, prefix_hidden=8, **options)


CASE = {
    "config": config,
    "kinds": ["bert", "gpt2", "llama", "vit", "ast", "clip"],
    "refuses": {"plain": "no transformer blocks"},
    "identity_options": None,  # a prefix takes some of the attention from the first step on
    "merge": "Mam cannot be merged: prefixes and bottlenecks",
    "compose": True,
}
