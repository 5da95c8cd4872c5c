from __future__ import annotations

from unfused.adapters import BottleneckConfig


def config(kind: str, **options):
    return BottleneckConfig.preset("mh_pa", bottleneck_dim=3, **options)


CASE = {
    "config": config,
    "kinds": ["bert", "gpt2", "llama", "clip"],
    "refuses": {"plain": "no transformer blocks"},
    "identity_options": {},
    "merge": "Bottleneck cannot be merged: prefixes and heads",
    "compose": True,
}
