from __future__ import annotations

from unfused.adapters import BottleneckConfig


def config(kind: str, **options):
    return BottleneckConfig.preset("pfeiffer", bottleneck_dim=4, **options)


CASE = {
    "config": config,
    "kinds": ["bert", "gpt2", "vit"],
    "refuses": {"plain": "no transformer blocks"},
    "identity_options": {"init": "lora"},
    "merge": "Bottleneck cannot be merged: a bottleneck with a nonlinearity is no change of a weight",
    "compose": True,
}
